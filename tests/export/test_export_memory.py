"""How many calibration lines are spoken at a time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from s2quant.checkpoint.config import S2Config
from s2quant.export.memory import LOW_MEMORY_SLOTS, USUAL_SLOTS, calibration_slots, slots_that_fit
from s2quant.export.random import CONFIGS
from s2quant.recipe import Calibration

GB = 10**9
SETTINGS = Calibration(source="lines.jsonl", max_positions=1024, max_frames=768)
WEIGHTS, CODEC, EACH = 9_120_000_000, 1_870_000_000, 2 * 36 * 8 * 128 * 2 * 1024  # s2-pro.md: bytes of the 4B model


def checkpoint(folder: Path) -> Any:
    """Stand in for a checkpoint of the real size: what is read of it, and a codec without a byte on the disk."""
    with (folder / "codec.pth").open("wb") as file:
        file.truncate(CODEC)
    entries = {"a": SimpleNamespace(num_bytes=WEIGHTS // 2), "b": SimpleNamespace(num_bytes=WEIGHTS // 2)}
    return SimpleNamespace(config=S2Config.from_json(CONFIGS["s2-pro"]()), folder=folder, entries=entries)


@pytest.mark.parametrize(
    ("total", "lines", "expected"),
    [
        (12 * GB, 256, USUAL_SLOTS),  # not even these fit; `--low-memory` is for it
        (16 * GB, 256, USUAL_SLOTS),
        (24 * GB, 256, 32),
        (32 * GB, 256, 64),
        (141 * GB, 4096, 64),
        (141 * GB, 255, 32),  # 64 would leave fewer than four groups
        (141 * GB, 40, USUAL_SLOTS),
    ],
)
def test_slots_of_cards(tmp_path: Path, total: int, lines: int, expected: int) -> None:
    assert slots_that_fit(total, checkpoint(tmp_path), SETTINGS, lines) == expected


def test_slots_fit_to_the_byte(tmp_path: Path) -> None:
    """A quarter of the memory is left to other things; the formula's own bytes decide."""
    needed = WEIGHTS + CODEC + 64 * EACH
    total = -(-needed * 4 // 3)
    assert slots_that_fit(total, checkpoint(tmp_path), SETTINGS, 256) == 64
    assert slots_that_fit(total - 4, checkpoint(tmp_path), SETTINGS, 256) == 32


def test_longer_utterances_take_more(tmp_path: Path) -> None:
    """Frames beyond the sequence are kept, too: 2,100 positions are 4,096 of a cache."""
    long = Calibration(source="lines.jsonl", max_positions=1024, max_frames=2100)
    assert slots_that_fit(32 * GB, checkpoint(tmp_path), long, 256) == 16


def test_what_is_asked_for_is_taken(tmp_path: Path) -> None:
    def slots(wanted: int | None, low_memory: bool) -> int:
        return calibration_slots(wanted, low_memory, checkpoint(tmp_path), SETTINGS, 256, torch.device("cpu"))

    assert slots(5, False) == 5
    assert slots(None, False) == USUAL_SLOTS
    assert slots(None, True) == slots(64, True) == LOW_MEMORY_SLOTS
    assert slots(1, True) == 1
