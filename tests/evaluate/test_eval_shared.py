"""A baseline that spoke once serves many runs: the same results as when it speaks anew, and no other baseline's."""

import hashlib
import json

import numpy as np
import pytest
import soundfile
from run_cases import KnowingAsr, SpectrumModel, records, run, write_suite

from s2quant.errors import UserError
from s2quant.evaluate import run as run_module


@pytest.fixture(scope="module", autouse=True)
def listeners():
    asr = KnowingAsr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load_asr", lambda *_: asr)
        patch.setattr(run_module, "load_similarity", lambda *_: SpectrumModel())
        yield asr


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    soundfile.write(folder / "tone.wav", 0.2 * np.sin(np.arange(16000) * 0.05), 16000)
    sha256 = hashlib.sha256((folder / "tone.wav").read_bytes()).hexdigest()
    return write_suite(folder, voices={"tone": {"audio": "tone.wav", "text": "A tone.", "sha256": sha256}})


@pytest.fixture(scope="module")
def first(suite, tiny_folder, tmp_path_factory):
    """The baseline against itself, of all but the last text."""
    out = tmp_path_factory.mktemp("first") / "run"
    run(suite, tiny_folder, out, tiny_folder, limit=2, seeds=(0,))
    return out


def test_results_are_those_of_a_run_that_speaks_all_itself(first, suite, tiny_folder, tiny_quantized, tmp_path):
    whole = run(suite, tiny_quantized, tmp_path / "whole", tiny_folder, seeds=(0,))
    spoken: dict[str, int] = {}

    def count(phase, done, total):
        spoken[phase.partition(",")[0]] = total

    out = tmp_path / "shared"
    results = run(suite, tiny_quantized, out, tiny_folder, seeds=(0,), baseline_run=first, progress=count)
    assert results == whole and records(out) == records(tmp_path / "whole")
    assert spoken["speaking"] == 3 + 2  # the model's, and of the others the text that the first run has not
    assert spoken["transcribing"] == 3 + 2 * 3  # a group with one new clip is heard again as a whole
    taken = first / "audio/baseline/utt-0-0.wav"
    assert taken.stat().st_ino == (out / "audio/baseline/utt-0-0.wav").stat().st_ino
    (first / "audio/floor/utt-1-100.npy").rename(tmp_path / "aside")  # what lacks a file is spoken here
    spoken.clear()
    more = {"seeds": (0,), "limit": 2, "metrics": ("failures",), "progress": count}
    run(suite, tiny_quantized, tmp_path / "two", tiny_folder, baseline_run=first, **more)
    (tmp_path / "aside").rename(first / "audio/floor/utt-1-100.npy")
    assert spoken["speaking"] == 2 + 1
    rows = (tmp_path / "two/work/clips-000.jsonl").read_text("utf-8").splitlines()
    assert len({tuple(json.loads(row)[key] for key in ("arm", "utt", "seed")) for row in rows}) == len(rows) == 6


def test_a_run_of_something_else_is_refused(first, suite, tiny_folder, tiny_quantized, tmp_path):
    out, more = tmp_path / "run", {"seeds": (0,), "metrics": ("failures",)}
    with pytest.raises(UserError, match="baseline: other files"):
        run(suite, tiny_folder, out, tiny_quantized, baseline_run=first, **more)
    with pytest.raises(UserError, match="dtype: 'float32' there, 'bfloat16' here"):
        run(suite, tiny_quantized, out, tiny_folder, baseline_run=first, dtype="bfloat16", **more)
    with pytest.raises(UserError, match="holds no run"):
        run(suite, tiny_quantized, out, tiny_folder, baseline_run=tmp_path, **more)
    with pytest.raises(UserError, match="without --baseline"):
        run(suite, tiny_quantized, out, baseline_run=first, **more)
    alone = tmp_path / "alone"
    run(suite, tiny_folder, alone, **more)
    with pytest.raises(UserError, match="it has no baseline"):
        run(suite, tiny_quantized, out, tiny_folder, baseline_run=alone, **more)
    assert not out.exists()
