"""Calibration sequences: what the model saw when it spoke, dropped clips, storage, batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from s2quant.calibrate import sequences
from s2quant.calibrate.lines import CalibrationLine
from s2quant.calibrate.sequences import (
    CalibrationSet,
    calibration_key,
    line_groups,
    load_set,
    make_batches,
    make_sequences,
    save_set,
)
from s2quant.calibrate.spoken import Spoken, SpokenGroups
from s2quant.errors import UserError
from s2quant.prompt import build_prompt
from s2quant.quantize.exchange import Exchange
from s2quant.recipe import Calibration
from s2quant.runtime.engine import Engine
from s2quant.runtime.loading import load_engine
from s2quant.runtime.speech import Request

LINES = [
    CalibrationLine(id="a", text="Hello there."),
    CalibrationLine(id="b", text="[whisper] Come closer, please."),
    CalibrationLine(id="c", text="<|speaker:0|>One.\n<|speaker:1|>Two, three."),
]
SETTINGS = Calibration(source="x.jsonl", max_frames=300, max_positions=1000)


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return load_engine(tiny_folder, dtype=torch.float32, num_slots=2)


@pytest.fixture(scope="module")
def spoken(engine: Engine) -> CalibrationSet:
    return make_sequences(engine, LINES, replace(SETTINGS, require_end=False), "key", Path())


def test_a_sequence_is_prompt_frames_and_end(engine: Engine, spoken: CalibrationSet) -> None:
    config = engine.config
    assert spoken.ids == ("a", "b", "c")
    for number, line in enumerate(LINES):
        prompt = build_prompt(engine.tokenizer, line.text)
        speech = engine.speak(Request(text=line.text, seed=number, max_frames=300))
        sequence, length, frames = spoken.sequences[number], prompt.shape[1], speech.codes.shape[1]
        assert sequence.shape == (11, length + frames + 1)
        assert torch.equal(sequence[:, :length], prompt)
        assert torch.equal(sequence[1:, length:-1], speech.codes)
        assert torch.equal(sequence[0, length:-1], speech.codes[0] + config.semantic_begin_id)
        assert sequence[0, -1] == config.im_end_id
        assert not sequence[1:, -1].any()
    assert spoken.num_frames(config.semantic_begin_id, config.semantic_end_id) == sum(
        len(s[0]) - build_prompt(engine.tokenizer, line.text).shape[1] - 1
        for s, line in zip(spoken.sequences, LINES, strict=True)
    )


def test_the_model_predicts_its_own_frames(engine: Engine, spoken: CalibrationSet) -> None:
    """Teacher-forced through the generation path, every drawn code is among the candidates it was drawn from."""
    sequence = spoken.sequences[0]
    prompt_length = build_prompt(engine.tokenizer, LINES[0].text).shape[1]
    hidden = engine.model.slow.forward_hidden(sequence[None])
    logits = engine.model.slow.constrained_logits(hidden)[0, prompt_length - 1 : -2]
    best = logits.topk(30).indices
    assert bool((best == sequence[1, prompt_length:-1, None]).any(-1).all())


def test_text_only(engine: Engine) -> None:
    made = make_sequences(engine, LINES, replace(SETTINGS, codes="none"), "key", Path())
    for sequence, line in zip(made.sequences, LINES, strict=True):
        assert torch.equal(sequence, build_prompt(engine.tokenizer, line.text))


def test_failed_clips_are_dropped_and_counted(engine: Engine) -> None:
    lengths = [engine.speak(Request(text=x.text, seed=i, max_frames=300)).codes.shape[1] for i, x in enumerate(LINES)]
    limit = sorted(lengths)[1]
    made = make_sequences(engine, LINES, replace(SETTINGS, max_frames=limit), "key", Path())
    failed = sum(length >= limit for length in lengths)
    assert failed > 0
    assert made.dropped == {"no end of speech": failed}
    assert len(made.sequences) == len(LINES) - failed
    with pytest.raises(UserError, match="all 3 calibration clips failed"):
        make_sequences(engine, LINES, replace(SETTINGS, max_frames=1), "key", Path())


def test_cut_to_max_positions(engine: Engine) -> None:
    made = make_sequences(engine, LINES, replace(SETTINGS, max_positions=20, require_end=False), "key", Path())
    assert [sequence.shape[1] for sequence in made.sequences] == [20, 20, 20]


def test_a_missing_voice_is_a_clear_error(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "me.txt").write_text("What I say.", "utf-8")
    with pytest.raises(UserError, match=r"me\.wav"):
        make_sequences(engine, [replace(LINES[0], voice="me.wav")], SETTINGS, "key", tmp_path)


def test_storage_round_trip_and_same_bytes(spoken: CalibrationSet, tmp_path: Path) -> None:
    save_set(spoken, tmp_path / "a.safetensors")
    save_set(spoken, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = load_set(tmp_path / "a.safetensors", 10)
    assert (again.ids, again.key, again.dropped) == (spoken.ids, spoken.key, spoken.dropped)
    assert all(torch.equal(x, y) for x, y in zip(again.sequences, spoken.sequences, strict=True))
    with pytest.raises(UserError, match=r"\[8, T\]"):
        load_set(tmp_path / "a.safetensors", 7)
    (tmp_path / "c.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="calibration set"):
        load_set(tmp_path / "c.safetensors", 10)


def test_the_key_depends_on_what_matters() -> None:
    key = calibration_key(LINES, SETTINGS, {"x": "1"}, {})
    assert key == calibration_key(LINES, replace(SETTINGS, batch_size=3, source="elsewhere"), {"x": "1"}, {})
    changed = [
        calibration_key(LINES[:2], SETTINGS, {"x": "1"}, {}),
        calibration_key(LINES, replace(SETTINGS, seed=1), {"x": "1"}, {}),
        calibration_key(LINES, replace(SETTINGS, codes="none"), {"x": "1"}, {}),
        calibration_key(LINES, SETTINGS, {"x": "2"}, {}),
        calibration_key(LINES, SETTINGS, {"x": "1"}, {"me.wav": "3"}),
        calibration_key(LINES, SETTINGS, {"x": "1"}, {"me.wav": "4"}),
    ]
    assert len({key, *changed}) == 7


def test_batches_pad_on_the_right_and_lose_nothing(spoken: CalibrationSet) -> None:
    batches = make_batches(spoken.sequences, 2, pad_id=7)
    assert [len(tokens) for tokens, _ in batches] == [2, 1]
    found = []
    for tokens, mask in batches:
        assert tokens.shape[0] == mask.shape[0]
        assert bool((tokens[:, 0][~mask] == 7).all())
        for row in range(len(tokens)):
            length = int(mask[row].sum())
            assert bool(mask[row, :length].all())
            found.append(tokens[row, :, :length])
    want = sorted(spoken.sequences, key=lambda s: s.shape[1])
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_lines_of_like_length_are_spoken_together_and_by_all_processes() -> None:
    texts = ["x" * (7 * number % 64) for number in range(64)]  # 0 to 63 bytes, in no order
    groups = line_groups(texts, 8)
    assert sorted(index for group in groups for index in group) == list(range(64))
    assert [len(group) for group in groups] == [16, 16, 16, 16]  # two lines for each slot, so that four can share
    lengths = [[len(texts[index]) for index in group] for group in groups]
    assert all(min(longer) > max(shorter) for longer, shorter in pairwise(lengths))
    assert len(line_groups(texts, 2)) == 8 and len(line_groups(texts, 64)) == 1
    assert [len(group) for group in line_groups(texts[:41], 9)] == [9, 9, 9, 9, 5]
    assert [len(group) for group in line_groups(texts[:41], 16)] == [41]  # three would leave slots empty
    owners = [[Exchange(rank=rank, world=2).owns_by_size(index) for index in range(4)] for rank in range(2)]
    assert owners == [[True, False, False, True], [False, True, True, False]]


def test_a_set_does_not_depend_on_who_speaks_which_group(
    engine: Engine, spoken: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "LEAST_GROUPS", 1)  # so that three lines are two groups
    parts: list[dict[int, Spoken]] = []

    def of(rank: int, gather: Callable[[Callable[[], dict[int, Spoken]]], dict[int, Spoken]]) -> CalibrationSet:
        owns = Exchange(rank=rank, world=2).owns_by_size
        settings = replace(SETTINGS, require_end=False)
        return make_sequences(engine, LINES, settings, "key", Path(), owns=owns, gather=gather)

    def kept(speak: Callable[[], dict[int, Spoken]]) -> dict[int, Spoken]:
        parts.append(speak())
        return {index: speech for part in parts for index, speech in part.items()}

    with pytest.raises(KeyError):  # the first one has spoken its own share only
        of(0, kept)
    both = of(1, kept)
    assert [len(part) for part in parts] == [2, 1]
    assert all(torch.equal(a, b) for a, b in zip(both.sequences, spoken.sequences, strict=True))


def test_groups_are_kept_under_their_key(tmp_path: Path) -> None:
    groups = SpokenGroups(folder=tmp_path / "speech", key="one")
    whole = {
        3: Spoken(codes=torch.arange(20).reshape(10, 2), batch_frames=(1, 1), stop_reason="end"),
        1: Spoken(codes=torch.zeros(10, 0, dtype=torch.int64), batch_frames=(0,), stop_reason="limit"),
    }
    assert groups.load(7, whole) is None
    groups.save(7, whole)
    found = groups.load(7, [1, 3])
    assert found is not None and list(found) == [1, 3]
    for line, one in found.items():
        assert torch.equal(one.codes, whole[line].codes) and one.codes.dtype == torch.int64
        assert (one.batch_frames, one.stop_reason) == (whole[line].batch_frames, whole[line].stop_reason)
    assert groups.load(7, [1, 2]) is None
    assert replace(groups, key="another").load(7, whole) is None
    file = groups.folder / "00007.safetensors"
    tensors = {"1": torch.zeros(10, 0, dtype=torch.int32), "3": torch.zeros(10, 2, dtype=torch.int32)}
    of_one = {"batch_frames": [0], "stop_reason": "limit"}
    damaged: list[Any] = [
        {"key": "one", "lines": {"1": of_one, "3": of_one | {"batch_frames": [3]}}},  # other frames than there are
        {"key": "one", "lines": {"1": of_one, "3": {}}},
        {"key": "one", "lines": {"1": of_one}},
        {"key": "one"},
        [],
    ]
    for metadata in ({}, {"s2quant": "{"}, *({"s2quant": json.dumps(facts)} for facts in damaged)):
        save_file(tensors, file, metadata=metadata)
        assert groups.load(7, whole) is None, metadata
    groups.save(7, whole)
    assert groups.load(7, whole) is not None
    file.write_bytes(file.read_bytes()[:-1])
    assert groups.load(7, whole) is None


def test_sequences_of_several_batches_are_filled_with_what_comes_next(engine: Engine) -> None:
    """Speech stops where a sequence is full; what the model would have seen there is the next batch's text."""
    text = "\n".join(f"<|speaker:0|>{'word ' * 30}{number}." for number in range(3))  # batches of 300 bytes
    line, frames = CalibrationLine(id="a", text=text), 20
    settings = replace(SETTINGS, require_end=False, max_frames=frames)
    whole = make_sequences(engine, [line], replace(settings, max_positions=10_000), "key", Path()).sequences[0]
    batches = engine.prepare(Request(text=text))
    assert len(batches) == 3
    ends = (whole[0] == engine.config.im_end_id).nonzero()[:, 0].tolist()
    for most in range(ends[2], ends[-1], 7):  # in text, in frames, between batches
        cut = make_sequences(engine, [line], replace(settings, max_positions=most), "key", Path()).sequences[0]
        assert torch.equal(cut, whole[:, :most]), most
