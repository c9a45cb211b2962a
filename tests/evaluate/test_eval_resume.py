"""A killed run that goes on ends as the unbroken one does, in bfloat16, where a clip's companions move its codes."""

import hashlib
import itertools
import threading

import numpy as np
import pytest
import soundfile
from run_cases import TEXTS, SpectrumModel, records, run, write_suite

from s2quant.errors import UserError
from s2quant.evaluate import generate as module
from s2quant.evaluate import run as run_module
from s2quant.evaluate.generate import generate
from s2quant.evaluate.groups import GROUP_ROUNDS, cut_groups
from s2quant.evaluate.plan import EvalOptions, make_plan
from s2quant.evaluate.ranks import Ranks
from s2quant.evaluate.store import Store
from s2quant.files import sha256_file
from s2quant.runtime.engine import Engine
from s2quant.runtime.loading import load_engine

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
        patch.setattr("s2quant.records.git_commit", lambda: None)  # files are edited while tests run, in a checkout
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
    plain, calls = getattr(place, name), itertools.count(1)

    def killed(*args):
        mine = next(calls)  # threads call at the same time
        if mine == number and step.startswith("before"):
            raise KeyboardInterrupt
        found = plain(*args)
        if mine == number and step.startswith("after"):
            raise KeyboardInterrupt
        return found

    patch.setattr(place, name, killed)


def count_spoken(patch):
    """Note the requests of each batch that is spoken."""
    plain, sizes = Engine.generate, []
    patch.setattr(Engine, "generate", lambda self, some: sizes.append(len(some)) or plain(self, some))
    return sizes


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
    for clip in Store(folder=out).clips().values():
        stem = out / "audio" / clip.arm / f"{clip.utt}-{clip.seed}"
        if clip.error is None:
            assert np.load(f"{stem}.npy").shape[1] == clip.num_frames
            assert clip.sound is None or clip.sound == sha256_file(stem.with_suffix(".wav"))


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


def test_a_file_that_is_missing_has_its_group_spoken_anew_and_nothing_else(
    whole, suite, tiny_folder, tiny_quantized, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    run(suite, tiny_quantized, out, tiny_folder, **MORE)
    sizes = count_spoken(monkeypatch)
    run(suite, tiny_quantized, out, tiny_folder, resume=True, **MORE)
    assert sizes == []
    (out / "audio/baseline/utt-1-0.wav").unlink()
    (out / "audio/model/utt-4-1.npy").unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill(patch, "before line", SIZE)  # in its last clip, of which the go before has all files and a line
        run(suite, tiny_quantized, out, tiny_folder, resume=True, **MORE)
    assert len(set(codes(whole)) - set(codes(out))) == 2  # that one is not there, though all its other files are
    run(suite, tiny_quantized, out, tiny_folder, resume=True, **MORE)
    assert sizes == [SIZE, SIZE, 10 - SIZE]
    assert_same(out, whole)


def test_other_utterances_and_seeds_give_what_they_give_in_one_go(
    whole, suite, tiny_folder, tiny_quantized, tmp_path, monkeypatch
):
    """Also after a kill at a clip that the larger plan speaks in other company than the smaller one."""
    out, small = tmp_path / "run", tmp_path / "small"
    few = {"limit": 3, "seeds": (1,)}
    run(suite, tiny_quantized, small, tiny_folder, **MORE, **few)
    run(suite, tiny_quantized, out, tiny_folder, **MORE, **few)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill(patch, "before line", 3)
        run(suite, tiny_quantized, out, tiny_folder, resume=True, **MORE)
    run(suite, tiny_quantized, out, tiny_folder, resume=True, **MORE, **few)
    assert records(out) == records(small)
    assert (out / "results.json").read_bytes() == (small / "results.json").read_bytes()
    run(suite, tiny_quantized, out, tiny_folder, resume=True, **MORE)
    assert_same(out, whole)
    sizes = count_spoken(monkeypatch)
    run(
        suite, tiny_quantized, out, tiny_folder, resume=True, limit=4, **MORE
    )  # the first group of each arm is the same
    assert sizes == []
    run(suite, tiny_quantized, out, tiny_folder, resume=True, limit=3, **MORE)
    assert sizes == [6] * 3
    run(suite, tiny_quantized, out, tiny_folder, resume=True, **MORE)
    assert_same(out, whole)


# ---- clips that fail -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def voiced(tmp_path_factory):
    """Texts one of which cannot be spoken, in a voice that some of them have."""
    folder = tmp_path_factory.mktemp("voiced")
    soundfile.write(folder / "tone.wav", 0.2 * np.sin(np.arange(16000) * 0.05), 16000)
    sha256 = sha256_file(folder / "tone.wav")
    voices = {"tone": {"audio": "tone.wav", "text": "A tone.", "sha256": sha256}}
    more = {"voices": voices, "seeds": [0], "floor_seeds": None}
    return write_suite(folder, [*TEXTS, "No <|im_end|> here.", "It rains."], **more)


def test_what_is_refused_does_not_have_its_group_spoken_again(suite, tiny_folder, tmp_path, monkeypatch):
    suite = write_suite(tmp_path / "suite", [*TEXTS, "No <|im_end|> here."], floor_seeds=None)
    sizes = count_spoken(monkeypatch)
    run(suite, tiny_folder, tmp_path / "run", **MORE)
    assert sizes == [6]
    before = records(tmp_path / "run")
    for _ in range(2):
        run(suite, tiny_folder, tmp_path / "run", resume=True, **MORE)
    assert sizes == [6] and records(tmp_path / "run") == before
    assert sum(row["error"] is not None for row in before) == 2


def test_what_failed_has_its_group_spoken_anew(voiced, tiny_folder, tiny_quantized, tmp_path, monkeypatch):
    """A voice that could not be read, then a clip that could not be decoded, which broke its batch."""
    good, out = tmp_path / "good", tmp_path / "run"
    run(voiced, tiny_quantized, good, tiny_folder, **MORE)
    assert sum(row["error"] is not None for row in records(good)) == 2

    def unreadable(self, path, text):
        raise UserError(f"{path}: no sound", "a recording", "use another")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "voice", unreadable)
        run(voiced, tiny_quantized, out, tiny_folder, **MORE)
    assert all(row["error"] is not None for row in records(out))
    plain, calls, sizes = Engine.decode, [], count_spoken(monkeypatch)

    def broken(self, codes):
        calls.append(codes)
        if len(calls) in (2, 5):  # and again when it is alone, after two of its companions
            raise RuntimeError("an illegal memory access")
        return plain(self, codes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "decode", broken)
        run(voiced, tiny_quantized, out, tiny_folder, resume=True, **MORE)
    assert sizes == [4, 1, 1, 1, 4]
    assert sum(row["error"] is not None for row in records(out)) == 3
    sizes.clear()
    run(voiced, tiny_quantized, out, tiny_folder, resume=True, **MORE)
    assert sizes == [4]
    assert_same(out, good)


# ---- several processes ---------------------------------------------------------------------------------------------


def speak(plan, folder, go, world, tiny_folder):
    """Speak a plan by several processes, here threads, which meet as processes do."""
    barrier, faults = threading.Barrier(world), []

    def one(rank):
        ranks = Ranks(rank=rank, world=world, wait=lambda: barrier.wait(60) and None)
        loaders = dict.fromkeys(("baseline", "model"), lambda: load_engine(tiny_folder, num_slots=MORE["num_slots"]))
        try:
            generate(plan, loaders, Store(folder=folder, rank=rank, go=go), ranks, MORE["num_slots"])
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
            faults.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return faults


def test_another_process_may_go_on_with_a_group(suite, tiny_folder, tmp_path):
    """What the last go wrote counts, whichever process wrote what before, even when that was another clip."""
    plan = make_plan(EvalOptions(suite=suite, model=tiny_folder, baseline=tiny_folder, out=tmp_path / "run"))
    assert speak(plan, tmp_path / "whole", 0, 1, tiny_folder) == []
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        calls = itertools.count(1)

        def broken(self, codes, plain=Engine.decode):
            if next(calls) in (2, 6, 7):  # batches break, and what is left of them is spoken alone: other codes
                raise RuntimeError("an illegal memory access")
            return plain(self, codes)

        patch.setattr(Engine, "decode", broken)
        assert speak(plan, out, 0, 3, tiny_folder) == []
    alone = {
        name: value for name, value in codes(out).items() if not np.array_equal(value, codes(tmp_path / "whole")[name])
    }
    assert alone
    groups = cut_groups(plan, ("baseline", "model"), MORE["num_slots"])
    for group in groups:
        Store(folder=out).codes(group.jobs[-1]).unlink(missing_ok=True)  # as if each had been stopped
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "after line", 13)
        assert [type(fault) for fault in speak(plan, out, 1, 2, tiny_folder)] == [KeyboardInterrupt]
    assert speak(plan, out, 2, 1, tiny_folder) == []
    found, whole = codes(out), codes(tmp_path / "whole")
    assert set(found) == set(whole) and all(np.array_equal(found[name], whole[name]) for name in whole)
    clips, wanted = Store(folder=out).clips(), Store(folder=tmp_path / "whole").clips()
    assert set(clips) == set(wanted)
    assert all(
        clips[key].sound == clip.sound and clips[key].num_frames == clip.num_frames for key, clip in wanted.items()
    )
