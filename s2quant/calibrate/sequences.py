"""Calibration lines -> token sequences, spoken by the model that is to be quantized.

Legend: B batch, T positions, N codebooks, F frames.

With `codes: speak` each line becomes what the model sees when it speaks: the prompt, the frames it drew, im_end.
With `codes: none` it is the prompt alone, so that the two can be compared. A clip that failed (no end of speech
within the limit, or not one frame) is dropped and counted, never patched up. The set is stored as safetensors with
the hash of all that it depends on, and is used again only when that hash is the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s2quant.calibrate.lines import CalibrationLine, lines_sha256
from s2quant.calibrate.spoken import CODE_DTYPE, METADATA_KEY, Spoken, SpokenGroups
from s2quant.errors import UserError
from s2quant.files import atomic_file, read_text, sha256_text
from s2quant.prompt import Voice
from s2quant.recipe import Calibration
from s2quant.runtime.engine import Engine
from s2quant.runtime.speech import Request

FORMAT_VERSION = 1
GROUP_ROUNDS = 4  # lines of a group for each slot, at most: fewer leave slots empty at its end
LEAST_GROUPS = 4  # into which lines are cut, where each group fills the slots: with fewer, processes idle


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Sequences for the teacher-forced pass.

    Args:
        ids: The lines they came from.
        sequences: int64 [1+N, T] each.
        dropped: Clips dropped, by reason.
        key: Hash of all that the set depends on.
    """

    ids: tuple[str, ...]
    sequences: tuple[Tensor, ...]
    dropped: Mapping[str, int]
    key: str

    @property
    def num_positions(self) -> int:
        """Positions in all."""
        return sum(sequence.shape[1] for sequence in self.sequences)

    def num_frames(self, begin_id: int, end_id: int) -> int:
        """Count the audio frames.

        Args:
            begin_id: First semantic token id.
            end_id: Last semantic token id.

        Returns:
            Positions whose token is semantic.
        """
        return sum(int(((s[0] >= begin_id) & (s[0] <= end_id)).sum()) for s in self.sequences)


def text_ids(tokens: Tensor, begin_id: int, end_id: int, im_end_id: int) -> tuple[int, ...]:
    """Read the text of a sequence, whatever was spoken: the same line gives other frames with another seed.

    Args:
        tokens: int64 [1+N, T], a prompt with or without frames after it.
        begin_id: First semantic token id.
        end_id: Last semantic token id.
        im_end_id: Token id that ends speech.

    Returns:
        Token ids of the first row without frames (those of a voice are none of the text either) and without the
        im_end at the end, which a sequence that was cut does not have.
    """
    row = tokens[0]
    ids: list[int] = row[(row < begin_id) | (row > end_id)].tolist()
    return tuple(ids[:-1] if ids and ids[-1] == im_end_id else ids)


def calibration_key(
    lines: Sequence[CalibrationLine],
    settings: Calibration,
    model_sha256: Mapping[str, str],
    voices: Mapping[str, str],
) -> str:
    """Hash all that a calibration set depends on.

    Args:
        lines: The chosen lines, in order.
        settings: The recipe's calibration block.
        model_sha256: Hashes of the model's files.
        voices: From `voice_hashes`.

    Returns:
        64 hexadecimal digits.
    """
    table = asdict(settings)
    for how_it_is_used in ("source", "batch_size", "holdout", "weights"):  # a set does not depend on these
        table.pop(how_it_is_used)
    facts: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "lines": lines_sha256(lines),
        "settings": table,
        "model": dict(sorted(model_sha256.items())),
    }
    if voices:
        facts["voices"] = dict(sorted(voices.items()))
    return sha256_text(json.dumps(facts, sort_keys=True))


def make_sequences(
    engine: Engine,
    lines: Sequence[CalibrationLine],
    settings: Calibration,
    key: str,
    voices_folder: Path,
    progress: Callable[[int], None] = lambda done: None,
    owns: Callable[[int], bool] = lambda group: True,
    gather: Callable[[Callable[[], dict[int, Spoken]]], dict[int, Spoken]] = lambda speak: speak(),
    groups: SpokenGroups | None = None,
) -> CalibrationSet:
    """Turn lines into token sequences.

    Args:
        engine: Speaks with the model to be quantized; needs no codec unless a line names a voice.
        lines: The chosen lines.
        settings: The recipe's calibration block.
        key: Hash from `calibration_key`.
        voices_folder: Where reference recordings named by lines are.
        progress: Called with the number of lines done.
        owns: Tells the groups of lines (see `line_groups`) that this process speaks. A group is spoken by itself, so
            that it comes out alike whoever speaks it, and whoever speaks the others.
        gather: Lets every process speak, and adds what the others spoke.
        groups: Keeps groups that are spoken, and has those that a stopped run spoke; None keeps none.

    Returns:
        The set, in the order of the lines.

    Raises:
        UserError: A line cannot be spoken, a voice is missing, every clip failed, or the disk refuses.
    """
    requests = _requests(engine, lines, settings, voices_folder)

    def speak() -> dict[int, Spoken]:
        done: dict[int, Spoken] = {}
        for number, group in enumerate(line_groups([line.text for line in lines], engine.num_slots)):
            if not owns(number):
                continue
            found = groups.load(number, group) if groups else None
            if found is None:
                found = {}
                for speech in engine.generate([requests[index] for index in group]):
                    found[group[speech.index]] = Spoken(
                        codes=speech.codes, batch_frames=speech.batch_frames, stop_reason=speech.stop_reason
                    )
                    progress(len(done) + len(found))
                if groups is not None:
                    groups.save(number, found)
            done |= found
            progress(len(done))
        return done

    spoken = gather(speak) if settings.codes == "speak" else {}
    ids, sequences, dropped = [], [], Counter[str]()
    for index, (line, request) in enumerate(zip(lines, requests, strict=True)):
        codes: Sequence[Tensor] = ()
        if settings.codes == "speak":
            speech = spoken[index]
            fault = _failure(speech, settings)
            if fault is not None:
                dropped[fault] += 1
                continue
            codes = speech.codes.split(speech.batch_frames, dim=1)
        ids.append(line.id)
        sequence = engine.spoken_sequence(request, codes)
        if codes and sequence.shape[1] < settings.max_positions:  # what comes next does not fit, or not wholly
            following = engine.next_prompt(request, codes)
            sequence = sequence if following is None else following
        sequences.append(sequence[:, : settings.max_positions])
    if not sequences:
        raise UserError(
            f"all {len(lines)} calibration clips failed: {dict(dropped)}",
            "a model that ends its sentences",
            "raise calibration.max_frames, or set calibration.require_end: false for a model of random weights",
        )
    return CalibrationSet(ids=tuple(ids), sequences=tuple(sequences), dropped=dict(dropped), key=key)


def line_groups(texts: Sequence[str], num_slots: int) -> list[list[int]]:
    """Cut lines into groups, those of like length together, so that a group's slots are empty at about the same time.

    Args:
        texts: Of the lines.
        num_slots: Lines spoken at a time.

    Returns:
        The lines' numbers by group, the longest texts first: LEAST_GROUPS groups or more where that many fill the
        slots, of GROUP_ROUNDS lines for each slot at most; the last group may have less.
    """
    order = sorted(range(len(texts)), key=lambda index: (-len(texts[index].encode()), index))
    size = num_slots * min(GROUP_ROUNDS, len(texts) // (num_slots * LEAST_GROUPS) or GROUP_ROUNDS)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _requests(
    engine: Engine, lines: Sequence[CalibrationLine], settings: Calibration, voices_folder: Path
) -> list[Request]:
    voices: dict[str, Voice] = {}
    requests = []
    for number, line in enumerate(lines):
        if line.voice is not None and line.voice not in voices:
            path = voices_folder / line.voice
            voices[line.voice] = engine.voice(path, read_text(path.with_suffix(".txt")).strip())
        requests.append(
            Request(
                text=line.text,
                voices=() if line.voice is None else (voices[line.voice],),
                seed=settings.seed + number,
                sampling=settings.sampling,
                max_frames=settings.max_frames,
                # frames beyond the sequence are only of use to see whether the speech ends
                max_positions=None if settings.require_end else settings.max_positions,
            )
        )
    return requests


def _failure(speech: Spoken, settings: Calibration) -> str | None:
    if min(speech.batch_frames) == 0:
        return "no frame"
    if settings.require_end and speech.stop_reason != "end":
        return "no end of speech"
    return None


def save_set(calibration: CalibrationSet, path: Path) -> None:
    """Store a set, replacing an older one only when the new one is complete.

    Args:
        calibration: The set.
        path: A .safetensors file.

    Raises:
        UserError: The disk refuses.
    """
    tensors = {f"{n:05d}/{i}": s.to(CODE_DTYPE) for n, (i, s) in enumerate(_pairs(calibration))}
    facts = {"format_version": FORMAT_VERSION, "key": calibration.key, "dropped": dict(calibration.dropped)}
    with atomic_file(path, overwrite=True) as partial:  # one key: safetensors writes several in any order
        save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(facts, sort_keys=True)})


def _pairs(calibration: CalibrationSet) -> Iterator[tuple[str, Tensor]]:
    return zip(calibration.ids, calibration.sequences, strict=True)


def load_set(path: Path, num_codebooks: int) -> CalibrationSet:
    """Read a stored set.

    Args:
        path: The file.
        num_codebooks: N of the model it is for.

    Returns:
        The set.

    Raises:
        UserError: The file is unreadable, no calibration set, or of a model with other codebooks.
    """
    todo = "remove the file, or leave out --calibration to make a new set"
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, Any] = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: {error}", "a calibration set of s2quant", todo) from error
    if metadata.get("format_version") != FORMAT_VERSION or "key" not in metadata or not tensors:
        raise UserError(f"{path}: format_version {metadata.get('format_version')}", f"{FORMAT_VERSION}", todo)
    odd = [n for n, t in tensors.items() if t.ndim != 2 or t.shape[0] != 1 + num_codebooks or t.shape[1] == 0]
    if odd:
        raise UserError(f"{path}: {odd[0]} has shape {list(tensors[odd[0]].shape)}", f"[{1 + num_codebooks}, T]", todo)
    return CalibrationSet(
        ids=tuple(name.partition("/")[2] for name in tensors),
        sequences=tuple(tensor.to(torch.int64) for tensor in tensors.values()),
        dropped=metadata.get("dropped", {}),
        key=metadata["key"],
    )


def make_batches(sequences: Sequence[Tensor], batch_size: int, pad_id: int) -> list[tuple[Tensor, Tensor]]:
    """Pad sequences on the right, those of like length together.

    Args:
        sequences: int64 [1+N, T] each.
        batch_size: Sequences per batch.
        pad_id: Token id of the padding.

    Returns:
        Pairs of tokens int64 [B, 1+N, T] and mask bool [B, T], True at real positions.
    """
    order = sorted(range(len(sequences)), key=lambda index: (sequences[index].shape[1], index))
    batches = []
    for start in range(0, len(order), batch_size):
        chosen = [sequences[index] for index in order[start : start + batch_size]]
        longest = max(sequence.shape[1] for sequence in chosen)
        tokens = torch.zeros(len(chosen), chosen[0].shape[0], longest, dtype=torch.int64)
        tokens[:, 0] = pad_id
        mask = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for row, sequence in enumerate(chosen):
            tokens[row, :, : sequence.shape[1]] = sequence
            mask[row, : sequence.shape[1]] = True
        batches.append((tokens, mask))
    return batches
