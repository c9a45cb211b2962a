"""A baseline that spoke once serves many runs: the same results as when it speaks anew, and no other baseline's."""

import hashlib

import numpy as np
import pytest
import soundfile
from run_cases import TEXTS, KnowingAsr, SpectrumModel, records, run, write_suite

from s2quant.errors import UserError
from s2quant.evaluate import run as run_module

MORE = {"dtype": "bfloat16", "num_slots": 2}


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
    voices = {"tone": {"audio": "tone.wav", "text": "A tone.", "sha256": sha256}}
    return write_suite(folder, [*TEXTS, "It rains.", "Nobody is there."], voices=voices)


@pytest.fixture(scope="module")
def first(suite, tiny_folder, tmp_path_factory):
    """The baseline against itself, of all but the last text."""
    out = tmp_path_factory.mktemp("first") / "run"
    run(suite, tiny_folder, out, tiny_folder, limit=4, **MORE)
    return out


def test_results_are_those_of_a_run_that_speaks_all_itself(first, suite, tiny_folder, tiny_quantized, tmp_path):
    whole = run(suite, tiny_quantized, tmp_path / "whole", tiny_folder, **MORE)
    spoken: dict[str, int] = {}

    def count(phase, done, total):
        spoken[phase.partition(",")[0]] = total

    out = tmp_path / "shared"
    results = run(suite, tiny_quantized, out, tiny_folder, baseline_run=first, progress=count, **MORE)
    assert results == whole and records(out) == records(tmp_path / "whole")
    for path in (tmp_path / "whole").glob("audio/*/*.npy"):
        assert (out / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    assert spoken["speaking"] == 10 + 2 + 2  # the model's, and of the others what is no first group
    assert spoken["transcribing"] == 10 + 2 + 2  # what sounds as before in the same company is not heard again
    taken = first / "audio/baseline/utt-0-0.wav"
    assert taken.stat().st_ino == (out / "audio/baseline/utt-0-0.wav").stat().st_ino
    lacking = first / "audio/floor/utt-1-100.npy"  # its group is spoken here
    lacking.rename(tmp_path / "aside")
    more = MORE | {"limit": 4, "metrics": ("failures",), "progress": count}
    run(suite, tiny_quantized, tmp_path / "two", tiny_folder, baseline_run=first, **more)
    (tmp_path / "aside").rename(lacking)
    assert spoken["speaking"] == 8 + 8
    for path in first.glob("audio/[bf]*/*.npy"):
        assert (tmp_path / "two" / path.relative_to(first)).read_bytes() == path.read_bytes()
    spoken.clear()
    run(suite, tiny_quantized, tmp_path / "all", tiny_folder, baseline_run=first, **more)
    assert spoken["speaking"] == 8


def test_a_run_of_something_else_is_refused(first, suite, tiny_folder, tiny_quantized, tmp_path):
    out, more = tmp_path / "run", MORE | {"seeds": (0,), "metrics": ("failures",)}
    with pytest.raises(UserError, match="baseline: other files"):
        run(suite, tiny_folder, out, tiny_quantized, baseline_run=first, **more)
    with pytest.raises(UserError, match="dtype: 'bfloat16' there, 'float32' here"):
        run(suite, tiny_quantized, out, tiny_folder, baseline_run=first, **more | {"dtype": "float32"})
    with pytest.raises(UserError, match="num_slots: 2 there, 3 here"):
        run(suite, tiny_quantized, out, tiny_folder, baseline_run=first, **more | {"num_slots": 3})
    with pytest.raises(UserError, match="holds no run"):
        run(suite, tiny_quantized, out, tiny_folder, baseline_run=tmp_path, **more)
    with pytest.raises(UserError, match="without --baseline"):
        run(suite, tiny_quantized, out, baseline_run=first, **more)
    alone = tmp_path / "alone"
    run(suite, tiny_folder, alone, **more)
    with pytest.raises(UserError, match="it has no baseline"):
        run(suite, tiny_quantized, out, tiny_folder, baseline_run=alone, **more)
    assert not out.exists()
