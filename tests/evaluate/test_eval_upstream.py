"""`bench --against`: a checkout in a process of its own, with its own path; a small one made here stands for it."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from s2quant.cli import main
from s2quant.errors import UserError
from s2quant.evaluate import upstream_worker
from s2quant.evaluate.upstream import INFERENCE, Upstream, check_upstream, measure_upstream

STANDIN = """
import json, sys, time
from pathlib import Path
import torch

assert "s2quant" not in sys.modules

class Model:
    def __init__(self, folder):
        config = json.loads((Path(folder) / "config.json").read_text())
        self.weights = sorted(path.name for path in Path(folder).glob("*.safetensors"))
        assert self.weights and "int4" not in folder and "int8" not in folder
        self.config = type("Config", (), {
            "max_seq_len": config["text_config"]["max_seq_len"],
            "vocab_size": config["text_config"]["vocab_size"],
            "semantic_begin_id": config["semantic_start_token_id"],
            "semantic_end_id": config["semantic_end_token_id"],
        })
        self.cached = None

    def setup_caches(self, max_batch_size, max_seq_len, dtype):
        assert max_batch_size == 1 and dtype == torch.float32
        self.cached = max_seq_len

def init_model(folder, device, precision, compile):
    print("compiled" if compile else "eager")
    return Model(folder), decode_one_token_ar

def decode_one_token_ar(model, x, input_pos, temperature, top_p, top_k, semantic_logit_bias, audio_masks, audio_parts):
    assert x.shape[0] == 1 and x.dtype == torch.int32 and model.cached == model.config.max_seq_len
    assert semantic_logit_bias.shape == (1, 1, model.config.vocab_size)
    may = semantic_logit_bias[0, 0] == 0
    assert may.nonzero()[:, 0].tolist() == list(range(model.config.semantic_begin_id, model.config.semantic_end_id + 1))
    assert input_pos.tolist() == list(range(x.shape[2]))
    time.sleep(0.02)
    return torch.full((11, 1), model.config.semantic_begin_id + 7)

def decode_n_tokens(model, cur_token, input_pos, num_new_tokens, decode_one_token, **sampling):
    assert cur_token.shape == (1, 11, 1) and decode_one_token is decode_one_token_ar
    time.sleep(0.01 * num_new_tokens)
    return torch.zeros(11, num_new_tokens)
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder laid out as a checkout, with the packages that it imports beside it."""

    def make(code=STANDIN, without=()):
        folder = tmp_path / "checkout"
        path = folder / INFERENCE
        path.parent.mkdir(parents=True)
        path.write_text(textwrap.dedent(code))
        for name in ("click", "einops", "loguru", "loralib"):
            if name not in without:
                (folder / f"{name}.py").write_text("")
        return folder

    return make


def measured(checkout, folder, **changes):
    options = {"num_frames": 9, "repeats": 2, "device": "cpu", "dtype": "float32", "frame_s": 0.05}
    upstream = Upstream(checkout=checkout, **({"positions": 4096} | changes))
    return measure_upstream(upstream, folder, torch.zeros(11, 30, dtype=torch.int64), **options)


def test_the_figures_follow_from_the_rounds(checkout, tiny_folder):
    eager, compiled = measured(checkout(), tiny_folder, modes=("eager", "compiled"), positions=1000)
    assert (eager["mode"], compiled["mode"]) == ("eager", "compiled")
    for row in (eager, compiled):
        assert row["positions"] == 1000 and row["best_first_code"] == 7 and row["commit"] is None
        assert len(row["samples"]) == 2 and row["peak_device_bytes"] is None and row["torch"] == torch.__version__
        assert row["ms_per_frame"] == pytest.approx(1e3 * sum(row["samples"]) / 2 / 8)
        assert 10 <= row["ms_per_frame"] < 20 and 0.02 <= row["prefill_s"] < 0.05
        assert row["ar_rtf"] == pytest.approx((row["prefill_s"] + row["ms_per_frame"] * 8e-3) / (9 * 0.05))
        assert row["warmup_s"] > 0.1


def test_positions_are_at_most_the_model_s(checkout, tiny_folder):
    (row,) = measured(checkout(), tiny_folder, positions=32768)
    assert row["positions"] == 4096 and row["mode"] == "compiled"


def test_a_commit_is_told(checkout, tiny_folder, tmp_path):
    folder = checkout()
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert measured(folder, tiny_folder)[0]["commit"] == head
    inside = folder / "inside"  # files that are only a part of another repository have no commit of their own
    shutil.copytree(folder, inside, ignore=shutil.ignore_patterns(".git", "inside"))
    assert measured(inside, tiny_folder)[0]["commit"] is None


@pytest.mark.skipif(upstream_worker.importlib.util.find_spec("loralib") is not None, reason="loralib is installed")
def test_what_is_not_installed_is_named(checkout, tiny_folder):
    with pytest.raises(UserError, match=r"imports what is not installed: loralib[\s\S]*pip install loralib"):
        measured(checkout(without=("loralib",)), tiny_folder)


def test_a_package_that_only_the_import_finds_absent_is_named_too(checkout, tiny_folder):
    with pytest.raises(UserError, match="not installed: surely_absent"):
        measured(checkout("import surely_absent.part\n"), tiny_folder)


def test_what_it_said_last_is_shown(checkout, tiny_folder):
    with pytest.raises(UserError, match=r"ended with status 1:[\s\S]*ValueError: no such thing"):
        measured(
            checkout(STANDIN + "\ndef init_model(*_, **__):\n    raise ValueError('no such thing')\n"), tiny_folder
        )


def test_what_cannot_be_measured_is_refused(checkout, tiny_folder, tiny_quantized, tmp_path):
    with pytest.raises(UserError, match="a checkout of fish-speech 2"):
        check_upstream(Upstream(checkout=tmp_path, positions=100), tiny_folder, 10)
    folder = checkout()
    with pytest.raises(UserError, match="is quantized"):
        check_upstream(Upstream(checkout=folder, positions=100), tiny_quantized, 10)
    with pytest.raises(UserError, match="100 or more"):
        check_upstream(Upstream(checkout=folder, positions=99), tiny_folder, 100)
    check_upstream(Upstream(checkout=folder, positions=100), tiny_folder, 100)


def test_bench_prints_it_beside_ours(checkout, tiny_folder, tiny_quantized, tmp_path, capsys):
    out, folder = tmp_path / "out", checkout()
    words = ["bench", "--frames", "4", "--repeats", "1", "--dtype", "float32", "--against", str(folder)]
    models = ["--model", str(tiny_folder), "--model", str(tiny_quantized)]
    assert main([*words, *models, "--against-mode", "both", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "bench.json").read_text())
    ours = {row["arm"]: row["ms_per_frame"] for row in result["rows"]}
    for row in result["upstream"]:
        assert row["ratios"] == {name: pytest.approx(row["ms_per_frame"] / ms) for name, ms in ours.items()}
        assert row["same_first_code"] is False
    assert "its time over ours" in printed and printed.count(" no | bf16 ") == 2
    assert main([*words, *models[2:]]) == 2
    assert "is quantized" in capsys.readouterr().err
    assert main([*words, *models, "--against-positions", "5"]) == 2


@pytest.mark.skipif(not os.environ.get("FISH_SPEECH"), reason="needs FISH_SPEECH, a checkout, and what it imports")
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_the_real_one_finds_the_same_code(tiny_folder, mode):
    from s2quant.runtime.loading import load_engine
    from s2quant.runtime.speech import Request
    from s2quant.sampling import Sampling

    engine = load_engine(tiny_folder, dtype=torch.float32)
    request = Request(text="Hello there.", sampling=Sampling(top_k=1), max_frames=1, ignore_end=True)
    upstream = Upstream(checkout=Path(os.environ["FISH_SPEECH"]), modes=(mode,), positions=512)
    options = {"num_frames": 9, "repeats": 1, "device": "cpu", "dtype": "float32", "frame_s": 0.05}
    (row,) = measure_upstream(upstream, tiny_folder, engine.spoken_sequence(request, []), **options)
    assert row["best_first_code"] == int(engine.speak(request).codes[0, 0]) and row["positions"] == 512


def test_the_worker_imports_nothing_of_ours():
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, upstream_worker.__file__], capture_output=True, text=True, check=True
    )
    assert not {"torch", "s2quant", "numpy"} & set(done.stdout.split())
