"""`kill -9` where no handler can tidy up: `resume` ends with the same bytes and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from folder_cases import REPOSITORY, listing

from s2quant.errors import UserError
from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint
from s2quant.records import folder_hashes

KILLED = """
import os, signal, sys
from pathlib import Path
from s2quant.calibrate import sequences
from s2quant.export import quantized
from s2quant.quantize import store

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

owner, name = {"quantized": quantized, "sequences": sequences, "store": store}[sys.argv[1]], sys.argv[2]
whole, count = getattr(owner, name), int(sys.argv[3])

def after(*arguments, **more):
    global count
    count -= 1
    return whole(*arguments, **more) if count >= 0 else die()

setattr(owner, name, after)
recipe, model, out = map(Path, sys.argv[4:])
quantized.quantize_checkpoint(quantized.QuantizeOptions(recipe=recipe, model=model, out=out))
"""
MOMENTS = {  # what is called when the process dies, and how many calls go well before
    "before the run has a name": ("store", "write_json", 0),
    "writing the calibration set": ("sequences", "save_file", 0),
    "writing the second block": ("store", "save_file", 1),
    "the folder is written but not verified": ("quantized", "verify_quantized", 0),
    "the folder has its name": ("quantized", "disk_errors", 0),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Round-to-nearest on text alone: what is tested here does not depend on how long the work takes."""
    text = (REPOSITORY / "recipes" / "tiny-w4a16.yaml").read_text("utf-8")
    for old, new in (
        ("method: gptq", "method: rtn"),
        ("desc_act: true", "desc_act: false"),
        ("codes: speak", "codes: none"),
        ("source: calibration", f"source: {REPOSITORY}/recipes/calibration"),
    ):
        assert old in text
        text = text.replace(old, new)
    path = tmp_path_factory.mktemp("recipe") / "rtn.yaml"
    path.write_text(text, "utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(recipe: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    quantize_checkpoint(QuantizeOptions(recipe=recipe, model=tiny_folder, out=out))
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(moment: str, recipe: Path, unbroken: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [*map(str, MOMENTS[moment]), str(recipe), str(tiny_folder), str(out)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out.partial").exists()
    assert out.exists() == (moment == "the folder has its name")
    records = quantize_checkpoint(QuantizeOptions(recipe=recipe, model=tiny_folder, out=out, resume=True))
    assert len(records) == 17
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert listing(out) == listing(unbroken)
    assert folder_hashes(out) == folder_hashes(unbroken)
    for name in ("calibration.safetensors", "recipe.yaml"):
        assert (out / "s2quant" / name).read_bytes() == (unbroken / "s2quant" / name).read_bytes()


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
