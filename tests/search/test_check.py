"""Which held-out lines a folder was calibrated on: told by their text, not by the frames that were drawn for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folder_cases import REPOSITORY
from torch import Tensor

from s2quant.calibrate.lines import CalibrationLine, select_lines
from s2quant.calibrate.sequences import CalibrationSet, make_sequences
from s2quant.evaluate.tokens import TokenSequence
from s2quant.export.calibration import calibration_lines, num_held_out
from s2quant.recipe import Calibration, load_recipe
from s2quant.runtime.engine import Engine
from s2quant.runtime.loading import load_engine
from s2quant.search.check import count_seen
from s2quant.search.damage import held_sequences
from s2quant.search.sensitivity import NUM_HELD, NUM_SEQUENCES

LINES = [CalibrationLine(id=f"row-{n}", text=f"This is line {n}.") for n in range(24)]
SETTINGS = Calibration(source="x.jsonl", max_frames=8, require_end=False)


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return load_engine(tiny_folder, num_slots=8)


def speak(engine: Engine, lines: list[CalibrationLine], settings: Calibration = SETTINGS) -> CalibrationSet:
    return make_sequences(engine, lines, settings, "key", Path())


def hold_out(
    engine: Engine, made: CalibrationSet, number: int, settings: Calibration = SETTINGS
) -> list[TokenSequence]:
    held, dropped = held_sequences(
        made.ids[-number:], made.sequences[-number:], engine.config, 1024, False, settings.max_frames
    )
    assert not dropped
    return held


def test_a_few_lines_and_then_many_of_one_recipe(engine: Engine) -> None:
    """Drawn and spoken as `sensitivity` and `quantize` do: the same texts, other frames."""
    few, many = (speak(engine, select_lines(LINES, number, 0)) for number in (5, 20))
    held = hold_out(engine, few, 5)
    spoken = [tokens.tolist() for tokens in many.sequences]
    assert sum(one.tokens.tolist() in spoken for one in held) < sum(one.id in many.ids for one in held)
    assert count_seen(held, many.ids, many.sequences, engine.config) == sum(one.id in many.ids for one in held)
    others = [index for index, name in enumerate(many.ids) if name not in few.ids]
    assert len(others) >= 15
    sequences = [many.sequences[index] for index in others]
    assert count_seen(held, [many.ids[index] for index in others], sequences, engine.config) == 0


def test_the_documented_commands_calibrate_on_every_held_out_line() -> None:
    """As docs/search.md says: 40 lines are measured with, 8 of them held out; `quantize` takes 256."""
    recipe = load_recipe(REPOSITORY / "recipes" / "s2-pro-w4a16.yaml")
    few, many = (calibration_lines(recipe, None, number) for number in (NUM_SEQUENCES, None))
    assert (len(few), len(many)) == (40, 256)
    used = many[: len(many) - num_held_out(len(many), recipe.calibration.holdout)]
    assert all(line in used for line in few[-NUM_HELD:])
    assert all(used.index(line) != few.index(line) for line in few[-NUM_HELD:])  # so that it has another seed


def test_a_line_is_its_text_and_not_its_id(engine: Engine) -> None:
    held = hold_out(engine, speak(engine, LINES[:3]), 3)
    renamed = speak(engine, [replace(line, id=f"x{line.id}") for line in LINES[1:4]])
    assert count_seen(held, renamed.ids, renamed.sequences, engine.config) == 2
    elsewhere = speak(engine, [replace(line, text=f"Quite another text, {line.id}.") for line in LINES[:3]])
    assert elsewhere.ids == tuple(one.id for one in held)
    assert count_seen(held, elsewhere.ids, elsewhere.sequences, engine.config) == 0
    prompts = speak(engine, LINES[2:4], replace(SETTINGS, codes="none"))
    assert count_seen(held, prompts.ids, prompts.sequences, engine.config) == 1


def test_a_line_of_several_batches_is_the_same_wherever_it_is_cut(engine: Engine) -> None:
    text = "\n".join(f"<|speaker:0|>{'word ' * 30}{number}." for number in range(3))  # batches of 300 bytes
    line = CalibrationLine(id="a", text=text)
    whole = speak(engine, [line], replace(SETTINGS, max_positions=10_000)).sequences[0]
    frames = (whole[1:] != 0).any(0).nonzero()[:, 0].tolist()

    def seen(cut: Tensor) -> int:
        held, _ = held_sequences(["a"], [cut], engine.config, 1024, False, SETTINGS.max_frames)
        assert len(held) == 1
        return count_seen(held, ["a"], [whole], engine.config)

    assert torch.equal(whole[:, -1:], whole.new_tensor([[engine.config.im_end_id]] + [[0]] * 10))
    assert [seen(whole[:, : position + 1]) for position in frames] == [1] * len(frames)
