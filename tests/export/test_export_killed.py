"""`kill -9` where no handler can tidy up: `resume` ends with the same bytes and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folder_cases import REPOSITORY, listing

from s2quant.calibrate.lines import read_lines
from s2quant.calibrate.sequences import CalibrationSet
from s2quant.errors import DiskError, OutOfMemory, UserError
from s2quant.export import quantized
from s2quant.export.calibration import set_key
from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint
from s2quant.recipe import load_recipe
from s2quant.records import folder_hashes
from s2quant.runtime.engine import Engine
from s2quant.runtime.speech import Request, Speech

KILLED = """
import os, signal, sys
from pathlib import Path
from s2quant.calibrate import sequences, spoken
from s2quant.export import quantized
from s2quant.quantize import store

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

owners = {"quantized": quantized, "sequences": sequences, "spoken": spoken, "store": store}
owner, name = owners[sys.argv[1]], sys.argv[2]
whole, count = getattr(owner, name), int(sys.argv[3])

def after(*arguments, **more):
    global count
    count -= 1
    return whole(*arguments, **more) if count >= 0 else die()

setattr(owner, name, after)
recipe, model, out = map(Path, sys.argv[4:7])
more = {"num_sequences": 16, "num_slots": 2} if sys.argv[7:] else {}
quantized.quantize_checkpoint(quantized.QuantizeOptions(recipe=recipe, model=model, out=out, **more))
"""
MOMENTS = {  # what is called when the process dies, and how many calls go well before
    "before the run has a name": ("store", "write_json", 0),
    "writing the calibration set": ("sequences", "save_file", 0),
    "writing the second block": ("store", "save_file", 1),
    "the folder is written but not verified": ("quantized", "verify_quantized", 0),
    "the folder has its name": ("quantized", "disk_errors", 0),
}


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Round-to-nearest: what is tested here does not depend on how long the work takes."""
    changed = {
        "method: gptq": "method: rtn",
        "desc_act: true": "desc_act: false",
        "source: calibration": f"source: {REPOSITORY}/recipes/calibration",
    }
    return written(REPOSITORY / "recipes" / "tiny-w4a16.yaml", changed, tmp_path_factory.mktemp("speaking"))


@pytest.fixture(scope="module")
def recipe(speaking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on text alone."""
    return written(speaking, {"codes: speak": "codes: none"}, tmp_path_factory.mktemp("recipe"))


def written(recipe: Path, changed: dict[str, str], folder: Path) -> Path:
    text = recipe.read_text("utf-8")
    for old, new in changed.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "rtn.yaml"
    path.write_text(text, "utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(recipe: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    quantize_checkpoint(QuantizeOptions(recipe=recipe, model=tiny_folder, out=out))
    return out


def kill(moment: tuple[str, str, int], recipe: Path, model: Path, out: Path, *more: str) -> None:
    words = [*map(str, moment), str(recipe), str(model), str(out), *more]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert out.with_name("out.partial").exists()


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(moment: str, recipe: Path, unbroken: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill(MOMENTS[moment], recipe, tiny_folder, out)
    assert out.exists() == (moment == "the folder has its name")
    records = quantize_checkpoint(QuantizeOptions(recipe=recipe, model=tiny_folder, out=out, resume=True))
    assert len(records) == 17
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert listing(out) == listing(unbroken)
    assert folder_hashes(out) == folder_hashes(unbroken)
    for name in ("calibration.safetensors", "recipe.yaml"):
        assert (out / "s2quant" / name).read_bytes() == (unbroken / "s2quant" / name).read_bytes()


@pytest.fixture
def spoken_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the groups of lines that are spoken, as they are."""
    sizes: list[int] = []
    generate = Engine.generate

    def counted(engine: Engine, requests: Sequence[Request]) -> Iterator[Speech]:
        sizes.append(len(requests))
        yield from generate(engine, requests)

    monkeypatch.setattr(Engine, "generate", counted)
    return sizes


def test_killed_while_it_speaks(speaking: Path, tiny_folder: Path, tmp_path: Path, spoken_groups: list[int]) -> None:
    """Each group of lines that was spoken is kept, for the same run only."""
    (tmp_path / "killed").mkdir()
    recipe = written(speaking, {"max_frames: 96": "max_frames: 16"}, tmp_path)
    out, unbroken, changed = tmp_path / "killed" / "out", tmp_path / "unbroken", tmp_path / "killed" / "changed"
    kill(("spoken", "save_file", 2), recipe, tiny_folder, out, "of several groups")
    shutil.copytree(out.with_name("out.partial"), changed.with_name("changed.partial"))
    options = QuantizeOptions(recipe=recipe, model=tiny_folder, out=out, num_sequences=16, num_slots=2)
    with pytest.raises(UserError, match="holds a stopped run"):
        quantize_checkpoint(options)
    quantize_checkpoint(replace(options, resume=True))
    assert spoken_groups == [4, 4]
    quantize_checkpoint(replace(options, out=unbroken))
    assert spoken_groups == [4] * 6
    assert folder_hashes(out) == folder_hashes(unbroken)
    sets = [folder / "s2quant" / "calibration.safetensors" for folder in (out, unbroken)]
    assert sets[0].read_bytes() == sets[1].read_bytes()
    quantize_checkpoint(replace(options, out=changed, resume=True, num_slots=1))  # other groups, and the same files
    assert spoken_groups[6:] == [4] * 4
    assert [path.name for path in out.parent.iterdir() if path.name.endswith(".partial")] == []


def test_clips_that_all_fail_leave_nothing(speaking: Path, tiny_folder: Path, tmp_path: Path) -> None:
    changed = {"max_frames: ": "max_frames: 1 #", "require_end: false": "require_end: true"}
    recipe = written(speaking, changed, tmp_path)
    options = QuantizeOptions(recipe=recipe, model=tiny_folder, out=tmp_path / "out", num_sequences=8)
    with pytest.raises(UserError, match="all 8 calibration clips failed"):
        quantize_checkpoint(options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rtn.yaml"]


def test_a_run_that_another_has_begun_meanwhile_is_refused(
    recipe: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had found no folder when it began to speak; the other's stages stay as they are."""
    whole, partial = quantized.spoken_set, tmp_path / "out.partial"

    def meanwhile(*arguments: Any, **more: Any) -> CalibrationSet:
        (partial / "stages").mkdir(parents=True)
        (partial / "run.json").write_text("{}", "utf-8")
        (partial / "stages" / ".x.partial-y").touch()
        return whole(*arguments, **more)

    monkeypatch.setattr(quantized, "spoken_set", meanwhile)
    with pytest.raises(UserError, match="holds a stopped run"):
        quantize_checkpoint(QuantizeOptions(recipe=recipe, model=tiny_folder, out=tmp_path / "out"))
    assert (partial / "stages" / ".x.partial-y").exists()


@pytest.mark.parametrize(
    ("error", "has_group", "is_kept"),
    [(DiskError, True, True), (OutOfMemory, True, True), (DiskError, False, False), (UserError, True, False)],
)
def test_what_is_kept_of_speech_that_failed(
    error: type[UserError],
    has_group: bool,
    is_kept: bool,
    recipe: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speech = tmp_path / "out.partial" / "speech"

    def failing(*arguments: Any, **more: Any) -> CalibrationSet:
        speech.mkdir(parents=True)
        if has_group:
            (speech / "00000.safetensors").touch()
        (speech / ".00001.partial-x.safetensors").touch()
        raise error("got", "expected", "todo")

    monkeypatch.setattr(quantized, "spoken_set", failing)
    with pytest.raises(error, match="got"):
        quantize_checkpoint(QuantizeOptions(recipe=recipe, model=tiny_folder, out=tmp_path / "out"))
    assert speech.parent.exists() == is_kept


def test_another_recording_is_another_set(tmp_path: Path, recipe: Path) -> None:
    """What a voice says is known by its contents."""
    source = tmp_path / "lines.jsonl"
    source.write_text('{"text": "One.", "voice": "me.wav"}\n', "utf-8")
    of = load_recipe(written(recipe, {f"source: {REPOSITORY}/recipes/calibration/": "source: ./"}, tmp_path))
    of = replace(of, calibration=replace(of.calibration, source=str(source)))
    lines = read_lines(source)
    with pytest.raises(UserError, match=r"me\.wav: No such file"):
        set_key(of, lines, {})
    (tmp_path / "me.wav").write_bytes(b"1")
    with pytest.raises(UserError, match=r"me\.txt: No such file"):
        set_key(of, lines, {})
    keys = set()
    for sound, text in ((b"1", "One."), (b"2", "One."), (b"2", "Two.")):
        (tmp_path / "me.wav").write_bytes(sound)
        (tmp_path / "me.txt").write_text(text, "utf-8")
        keys.add(set_key(of, lines, {}))
    assert len(keys) == 3


def test_a_run_that_has_finished_is_not_done_again(recipe: Path, unbroken: Path, tiny_folder: Path) -> None:
    before = folder_hashes(unbroken)
    phases: list[str] = []
    options = QuantizeOptions(recipe=recipe, model=tiny_folder, out=unbroken, resume=True)
    assert len(quantize_checkpoint(options, lambda phase, done, total: phases.append(phase))) == 17
    assert "writing" not in phases
    assert folder_hashes(unbroken) == before
    other = QuantizeOptions(recipe=recipe, model=tiny_folder, out=unbroken, resume=True, num_sequences=3)
    with pytest.raises(UserError, match="was made from another model, recipe or calibration"):
        quantize_checkpoint(other)
    with pytest.raises(UserError, match="exists already"):
        quantize_checkpoint(QuantizeOptions(recipe=recipe, model=tiny_folder, out=unbroken))
