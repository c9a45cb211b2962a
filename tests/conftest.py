"""Session fixtures: one tiny random checkpoint and its W4A16 folder, made once and only read.

A test that changes a folder makes its own with `folder_cases.link_copy`; under pytest-xdist every worker makes its own
session folders. That no test has changed them is checked at the end.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start: threads that wait for a busy core spin on theirs

import pytest
import torch

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent
if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_cases  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU or the real weights where there are none."""
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "checkpoint": None if os.environ.get("S2_PRO_DIR") else "needs S2_PRO_DIR, the folder of the real weights",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Let garbage be looked for among what tests make, not among the modules that all of them have imported."""
    gc.collect()
    gc.freeze()


def _unchanged(folder: Path) -> Iterator[Path]:
    from s2quant.records import folder_hashes

    before = folder_hashes(folder)
    yield folder
    assert folder_hashes(folder) == before, f"a test has changed {folder}"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random checkpoint of the tiny size, seed 0; read only."""
    from s2quant.export.random import tiny_config, write_random

    folder = tmp_path_factory.mktemp("tiny") / "bf16"
    write_random(tiny_config(), folder, seed=0)
    yield from _unchanged(folder)


@pytest.fixture(scope="session")
def tiny_quantized(tiny_folder: Path) -> Iterator[Path]:
    """Its W4A16 folder by recipes/tiny-w4a16.yaml, through the whole of `quantize_checkpoint`; read only."""
    from s2quant.export.quantized import QuantizeOptions, quantize_checkpoint

    folder = tiny_folder.parent / "w4a16"
    recipe = REPOSITORY / "recipes" / "tiny-w4a16.yaml"
    quantize_checkpoint(QuantizeOptions(recipe=recipe, model=tiny_folder, out=folder))
    yield from _unchanged(folder)
