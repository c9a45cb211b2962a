"""A killed run that goes on ends as the unbroken one does, in bfloat16, where a clip's companions move its codes."""

import hashlib

import numpy as np
import pytest
from run_cases import TEXTS, SpectrumModel, records, run, write_suite

from s2quant.evaluate import generate as module
from s2quant.evaluate import run as run_module
from s2quant.evaluate.groups import GROUP_ROUNDS
from s2quant.evaluate.store import Store

MORE = {"dtype": "bfloat16", "num_slots": 2}
SIZE = GROUP_ROUNDS * MORE["num_slots"]
WORDS = ("good", "morning", "train", "door", "rains", "nobody", "station", "nine")


class HashAsr:
    """Hears words that no other sound has, and other ones in other company, as a recognizer of whole batches may."""

    name = "hash:1"

    def transcribe(self, audio, sample_rate, lang):
        return self.transcribe_batch([audio], sample_rate, lang)[0]

    def transcribe_batch(self, clips, sample_rate, lang):
        digests = [hashlib.sha256(np.asarray(clip, dtype=np.float32).tobytes()).digest() for clip in clips]
        together = hashlib.sha256(b"".join(digests)).digest()
        return [" ".join(WORDS[byte % 8] for byte in (*digest[:3], together[0])) for digest in digests]


@pytest.fixture(scope="module", autouse=True)
def listeners():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load_asr", lambda *_: HashAsr())
        patch.setattr(run_module, "load_similarity", lambda *_: SpectrumModel())
        yield


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite"), [*TEXTS, "It rains.", "Nobody is there."])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, suite, tiny_folder, tiny_quantized):
    out = tmp_path_factory.mktemp("whole") / "run"
    run(suite, tiny_quantized, out, tiny_folder, **MORE)
    assert len(records(out)) == 30 > 3 * SIZE
    return out


def kill(patch, step, number):
    """Stop at a step of writing a clip: before it is done, or after."""
    place, name = (Store, "add_clip") if step.endswith("line") else (module, "save_array")
    plain, calls = getattr(place, name), 0

    def killed(*args):
        nonlocal calls
        calls += 1
        if calls == number and step.startswith("before"):
            raise KeyboardInterrupt
        found = plain(*args)
        if calls == number and step.startswith("after"):
            raise KeyboardInterrupt
        return found

    patch.setattr(place, name, killed)


def codes(out):
    return {path.relative_to(out).as_posix(): np.load(path) for path in sorted(out.glob("audio/*/*.npy"))}


def assert_same(out, whole):
    mine, theirs = codes(out), codes(whole)
    assert set(mine) == set(theirs)
    assert [name for name in mine if not np.array_equal(mine[name], theirs[name])] == []
    assert records(out) == records(whole)
    for name in ("results.json", "summary.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for path in sorted(whole.glob("audio/*/*.wav")):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "steps",
    [
        [("before line", 4)],
        [("after line", 2), ("before array", 5), ("after array", 17), ("after line", 11)],
        [("after line", 13), ("after line", 2), ("before line", 9), ("after line", 3)],
    ],
    ids=["once", "within clips", "between clips"],
)
def test_killed_within_groups(steps, whole, suite, tiny_folder, tiny_quantized, tmp_path):
    out = tmp_path / "run"
    for number, step in enumerate(steps):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            kill(patch, *step)
            run(suite, tiny_quantized, out, tiny_folder, resume=number > 0, **MORE)
        assert not (out / "results.json").exists()
    run(suite, tiny_quantized, out, tiny_folder, resume=True, **MORE)
    assert_same(out, whole)
