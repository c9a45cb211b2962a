"""What a user can do wrong: one clear message, status 2 (1 for a fault found in a folder), nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from folder_cases import W2, WQKV, change_json, change_tensors, link_copy, listing, replace_bytes, shard

from s2quant.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = REPOSITORY / "recipes" / "tiny-w4a16.yaml"
TEXT = "Hello there."


@pytest.fixture(autouse=True)
def voice_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep voices away from the user's own cache, and from the folder whose content is compared."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def work(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder with a copy of the tiny checkpoint as `model` and of its recipe as `recipes/recipe.yaml`."""
    link_copy(tiny_folder, tmp_path / "model")
    (tmp_path / "recipes" / "calibration").mkdir(parents=True)
    (tmp_path / "recipes" / "recipe.yaml").write_text(RECIPE.read_text("utf-8"), "utf-8")
    lines = (REPOSITORY / "recipes" / "calibration" / "tiny-en.jsonl").read_text("utf-8")
    (tmp_path / "recipes" / "calibration" / "tiny-en.jsonl").write_text(lines, "utf-8")
    return tmp_path


def recipe_edit(old: str, new: str) -> Callable[[Path], None]:
    def edit(work: Path) -> None:
        path = work / "recipes" / "recipe.yaml"
        assert old in path.read_text("utf-8")
        path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")

    return edit


def truncate(work: Path) -> None:
    content = (work / "model" / "model.safetensors").read_bytes()
    replace_bytes(work / "model" / "model.safetensors", content[: len(content) // 2])


def lose_a_shard(work: Path) -> None:
    shard(work / "model")
    (work / "model" / "model-00002-of-00003.safetensors").unlink()


def poison(work: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{W2}.weight"] = tensors[f"{W2}.weight"].clone()
        tensors[f"{W2}.weight"][0, 0] = float("nan")

    change_tensors(work / "model", change)


def misshape(work: Path) -> None:
    change_tensors(work / "model", lambda t: t.update({f"{WQKV}.weight": t[f"{WQKV}.weight"][:-1].clone()}))


def mistype(work: Path) -> None:
    change_tensors(work / "model", lambda t: t.update({f"{WQKV}.weight": t[f"{WQKV}.weight"].to(torch.int32)}))


def pack_one(work: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        rows, columns = tensors.pop(f"{WQKV}.weight").shape
        tensors[f"{WQKV}.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        tensors[f"{WQKV}.qzeros"] = torch.full((columns // 32, rows // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{WQKV}.scales"] = torch.ones(columns // 32, rows, dtype=torch.float16)
        tensors[f"{WQKV}.g_idx"] = torch.arange(columns, dtype=torch.int32) // 32

    change_tensors(work / "model", change)


def audio(samples: np.ndarray, rate: int = 44100) -> Callable[[Path], None]:
    return lambda work: soundfile.write(work / "voice.wav", samples, rate)


def unlink(name: str) -> Callable[[Path], None]:
    return lambda work: (work / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda work: replace_bytes(work / name, content)


def nothing(work: Path) -> None:
    pass


LINES = "recipes/calibration/tiny-en.jsonl"
QUANTIZE = ["quantize", "recipes/recipe.yaml", "--model", "model", "--out", "out"]
SPEAK = ["speak", TEXT, "--model", "model", "--out", "x.wav"]
EXPORT = ["export", "model", "--profile", "bf16", "--out", "out"]
VOICE = [*SPEAK, "--voice", "voice.wav", "--voice-text", "What I say."]
CASES: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "truncated safetensors": (truncate, SPEAK, "model.safetensors is truncated or corrupt"),
    "truncated, quantize": (truncate, QUANTIZE, "model.safetensors is truncated or corrupt"),
    "corrupt safetensors": (write("model/model.safetensors", b"\xff" * 100), SPEAK, "truncated or corrupt"),
    "missing shard": (lose_a_shard, QUANTIZE, "shard model-00002-of-00003.safetensors is missing"),
    "wrong dtype": (mistype, QUANTIZE, f"{WQKV}.weight has dtype I32"),
    "wrong shape": (misshape, QUANTIZE, f"{WQKV}.weight has shape [255, 128], not [256, 128]"),
    "NaN weights, speak": (poison, SPEAK, "has 1 NaN or infinite weights"),
    "NaN weights, quantize": (poison, QUANTIZE, "NaN or infinite"),
    "no config": (unlink("model/config.json"), SPEAK, "config.json"),
    "config of another model": (
        lambda work: change_json(work / "model", lambda t: t.update(model_type="llama")),
        SPEAK,
        "model_type is 'llama'",
    ),
    "no such model": (nothing, ["speak", TEXT, "--model", "nowhere", "--out", "x.wav"], "nowhere is not a folder"),
    "codec absent": (unlink("model/codec.pth"), SPEAK, "codec.pth"),
    "codec corrupt": (write("model/codec.pth", b"no codec"), SPEAK, "codec.pth"),
    "tokenizer absent": (unlink("model/tokenizer.json"), SPEAK, "tokenizer.json"),
    "tokenizer absent, quantize": (unlink("model/tokenizer.json"), QUANTIZE, "tokenizer.json"),
    "tokenizer corrupt": (write("model/tokenizer.json", b"{}"), SPEAK, "tokenizer.json"),
    "codec absent, quantize": (unlink("model/codec.pth"), QUANTIZE, "codec.pth is missing"),
    "codec absent, export": (unlink("model/codec.pth"), EXPORT, "codec.pth is missing"),
    "truncated, export": (truncate, EXPORT, "truncated or corrupt"),
    "NaN weights, export": (poison, EXPORT, "has 1 NaN or infinite weights"),
    "index is no JSON": (write("model/model.safetensors.index.json", b"{"), SPEAK, "index.json"),
    "config is not UTF-8": (write("model/config.json", b"\xff"), SPEAK, "config.json: byte 0 is not UTF-8"),
    "quantized already": (pack_one, QUANTIZE, "is quantized already"),
    "no such recipe": (unlink("recipes/recipe.yaml"), QUANTIZE, "recipe.yaml"),
    "recipe not YAML": (write("recipes/recipe.yaml", b"rules: ["), QUANTIZE, "a YAML recipe"),
    "unknown recipe key": (recipe_edit("rules:", "colour: red\nrules:"),
                           QUANTIZE, "unknown key 'colour'"),
    "recipe key twice": (recipe_edit("  bits: 4", "  bits: 8\n  bits: 4"), QUANTIZE, "key 'bits' comes twice"),
    "nothing to quantize": (recipe_edit("- quantize:", "- keep:"), QUANTIZE, "quantizes nothing"),
    "unknown setting": (recipe_edit("bits: 4", "bit: 4"), QUANTIZE, "quantize: unknown key 'bit'"),
    "bits out of range": (recipe_edit("bits: 4", "bits: 5"), QUANTIZE, "quantize.bits is 5"),
    "asymmetric": (recipe_edit("sym: true", "sym: false"), QUANTIZE, "quantize.sym is False"),
    "rule that matches nothing": (recipe_edit("rules:", "rules:\n  - keep: '**.w9'"), QUANTIZE, "**.w9 matches no"),
    "layer that does not exist": (recipe_edit("{1,3}", "{1,40}"), QUANTIZE, "layers.40.feed_forward.w2 matches no"),
    "linear without a rule": (recipe_edit("  - keep: audio_decoder.**\n", ""), QUANTIZE, "no rule matches the linear"),
    "group that does not divide": (recipe_edit("group_size: 32", "group_size: 128"), QUANTIZE, "not divide its 192"),
    "more sequences than lines": (nothing, [*QUANTIZE, "--sequences", "99"], "32"),
    "no sequences": (nothing, [*QUANTIZE, "--sequences", "0"], "--sequences 0"),
    "calibration empty": (write(LINES, b""), QUANTIZE, "tiny-en.jsonl"),
    "calibration not UTF-8": (write(LINES, b'{"text": "\xff"}\n'), QUANTIZE, "not UTF-8"),
    "calibration not JSON": (write(LINES, b"hello\n"), QUANTIZE, "not JSON"),
    "calibration without text": (write(LINES, b'{"id": "a"}\n'), QUANTIZE, "text"),
    "calibration set of another run": (write("set.safetensors", b"x"), [*QUANTIZE, "--calibration", "set.safetensors"],
                                       "set.safetensors"),
    "no --out": (nothing, QUANTIZE[:4], "no --out"),
    "out exists": (lambda work: (work / "out").mkdir(), QUANTIZE, "out exists already"),
    "out below a file": (nothing, [*QUANTIZE[:-1], "model/config.json/out"], "config.json is a file"),
    "out with a name too long": (nothing, [*QUANTIZE[:-1], "x" * 300], "name too long"),
    "random where something is": (nothing, ["random", "--size", "tiny", "--out", "model"], "model exists already"),
    "random of a recipe": (nothing, ["random", "--config", "recipes/recipe.yaml", "--out", "out"], "a JSON object"),
    "export where something is": (nothing, [*EXPORT[:-1], "recipes"], "recipes exists already"),
    "recipe is a folder": (nothing, ["quantize", "recipes", *QUANTIZE[2:]], "recipes: Is a directory"),
    "wav is a folder": (nothing, [*SPEAK[:-1], "recipes"], "recipes"),
    "wav exists": (write("x.wav", b"mine"), SPEAK, "x.wav exists already"),
    "device absent": (nothing, [*SPEAK, "--device", "cuda:77"], "cuda:77"),
    "device unknown": (nothing, [*SPEAK, "--device", "abacus"], "abacus"),
    "text empty": (nothing, ["speak", "", "--model", "model", "--out", "x.wav"], "text without words"),
    "text blank": (nothing, ["speak", " \n ", "--model", "model", "--out", "x.wav"], "text without words"),
    "text of 100k characters": (nothing, ["speak", "word " * 20_000, "--model", "model", "--out", "x.wav"], "100,000"),
    "control token": (nothing, ["speak", "Hi <|im_end|>", "--model", "model", "--out", "x.wav"], "<|im_end|>"),
    "text before the first speaker": (nothing, ["speak", "Hi <|speaker:0|>there", "--model", "model", "--out", "x.wav"],
                                      "speaker"),
    "temperature": (nothing, [*SPEAK, "--temperature", "0"], "temperature is 0"),
    "top_p": (nothing, [*SPEAK, "--top-p", "2"], "top_p is 2"),
    "top_k": (nothing, [*SPEAK, "--top-k", "0"], "top_k is 0"),
    "max_frames": (nothing, [*SPEAK, "--max-frames", "0"], "max_frames is 0"),
    "seed": (nothing, [*SPEAK, "--seed", str(2**70)], "seed"),
    "codes-out": (nothing, [*SPEAK, "--codes-out", "codes.txt"], ".npy"),
    "voice without text": (nothing, [*SPEAK, "--voice", "voice.wav"], "a transcript for every recording"),
    "voice absent": (nothing, VOICE, "voice.wav"),
    "voice unreadable": (write("voice.wav", b"RIFF no sound"), VOICE, "voice.wav"),
    "voice silent": (audio(np.zeros(44100, np.float32)), VOICE, "silence"),
    "voice too short": (audio(np.ones(4410, np.float32)), VOICE, "0.10 s"),
    "export of nothing": (nothing, ["export", "nowhere", "--profile", "bf16", "--out", "out"], "is not a folder"),
    "random of no config": (nothing, ["random", "--config", "nowhere.json", "--out", "out"], "nowhere.json"),
    "inspect nothing": (nothing, ["inspect", "nowhere"], "nowhere is not a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    damage, arguments, fragment = CASES[name]
    monkeypatch.chdir(work)
    damage(work)
    before = listing(work)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert fragment in printed.err
    for part in ("got: ", "expected: ", "do: "):
        assert sum(line.startswith(part) for line in printed.err.splitlines()) == 1
    assert "Traceback" not in printed.err
    assert listing(work) == before
    assert (work / "x.wav").read_bytes() == b"mine" if name == "wav exists" else not (work / "x.wav").exists()


@pytest.mark.parametrize(
    ("samples", "rate"),
    [
        (np.random.default_rng(0).normal(0, 0.1, (44100, 2)), 44100),  # stereo
        (np.random.default_rng(0).normal(0, 0.1, 8000), 8000),  # 8 kHz
    ],
    ids=["stereo", "8 kHz"],
)
def test_usable_references_are_used(
    work: Path, monkeypatch: pytest.MonkeyPatch, samples: np.ndarray, rate: int
) -> None:
    monkeypatch.chdir(work)
    audio(samples, rate)(work)
    assert main([*VOICE, "--seed", "1", "--max-frames", "8", "--quiet"]) == 0
    assert soundfile.info(work / "x.wav").frames > 0


@pytest.mark.parametrize("damage", [truncate, lose_a_shard, poison, misshape, unlink("model/codec.pth")])
def test_inspect_finds_it_and_exits_1(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(work)
    damage(work)
    assert main(["inspect", "model", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found["faults"]) >= 1
    assert main(["inspect", "model"]) == 1
    assert "FAULT" in capsys.readouterr().out


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from s2quant.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("limit", "arguments"),
    [
        (1_000_000, ["random", "--size", "tiny", "--out", "out"]),
        (20_000, [*SPEAK, "--max-frames", "64", "--seed", "1"]),
        (1_000_000, ["export", "model", "--profile", "bf16", "--out", "out"]),
        (50_000, QUANTIZE),
        (5_000_000, QUANTIZE),
    ],
)
def test_disk_full(work: Path, limit: int, arguments: list[str]) -> None:
    """No file may grow beyond a limit, as on a disk without room: the system refuses the write itself."""
    before = listing(work)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), *arguments],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "failed: " in done.stderr
    assert "bytes free" in done.stderr
    assert "Traceback" not in done.stderr
    assert {entry for entry in listing(work) - before if not entry.startswith("out.partial")} == set()
