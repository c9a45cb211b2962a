"""Token metrics of whole arms, one model in memory at a time, kept on disk by the hash of all they depend on.

First the baseline scores every sequence, and its answers go to disk; then it is given back and each arm is loaded,
scores the same sequences, and is compared. What is found in the cache is not computed again, and a model that has
nothing left to do is not even loaded. A stopped run goes on where it was. The baseline's answers are large (at the
real size 32 kB per frame in bf16), so they are removed at the end; the damages (0.2 kB per frame) stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from s2quant.errors import UserError
from s2quant.evaluate.tokens import (
    METRIC_VERSION,
    Forced,
    TokenDamage,
    TokenSequence,
    check_sequences,
    teacher_forced,
    token_damage,
)
from s2quant.files import atomic_file, disk_errors, sha256_file, sha256_text
from s2quant.model import DualAR
from s2quant.runtime.linears import Backend
from s2quant.runtime.load import device_name, load_model, parse_device
from s2quant.runtime.memory import release_memory

Progress = Callable[[str, int, int], None]
"""(what is scoring: "baseline" or an arm's name, sequences done, sequences in all) -> None."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model that is loaded when it is needed.

    Args:
        key: Hash of all that its numbers depend on, see `model_key`.
        load: Loads it.
    """

    key: str
    load: Callable[[], DualAR]


def model_key(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    linears: Backend = "auto",
    hashes: Mapping[str, str] | None = None,
) -> str:
    """Hash what a loaded model's numbers depend on: its files, and how and where it runs.

    Args:
        folder: The checkpoint folder.
        device: Where it runs.
        dtype: The model's dtype.
        linears: Backend of the quantized linears.
        hashes: sha256 by file name where they are known already, see `folder_hashes`; files of the real size take a
            while.

    Returns:
        64 hexadecimal digits.
    """
    files = [path for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))) if path.is_file()]
    facts = {
        "files": {path.name: hashes[path.name] if hashes else sha256_file(path) for path in files},
        "device": device_name(device),
        "dtype": str(dtype),
        "linears": linears,
        "torch": torch.__version__,
    }
    return sha256_text(json.dumps(facts, sort_keys=True))


def folder_arm(
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    linears: Backend = "auto",
    hashes: Mapping[str, str] | None = None,
) -> Arm:
    """Make an arm of a checkpoint folder.

    Args:
        folder: The folder.
        device: Where it runs.
        dtype: The model's dtype.
        linears: Backend of the quantized linears.
        hashes: sha256 by file name where they are known already.

    Returns:
        The arm; nothing but hashes has been read yet.

    Raises:
        UserError: The device cannot be used.
    """
    target = parse_device(device)
    key = model_key(folder, target, dtype, linears, hashes)
    return Arm(key=key, load=lambda: load_model(folder, target, dtype, linears))


def floor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Name the precision in which the baseline is measured against itself: what rounding alone does.

    Args:
        dtype: The baseline's.

    Returns:
        float32 for a baseline in bf16 or fp16, bf16 for one in float32.
    """
    return torch.bfloat16 if dtype == torch.float32 else torch.float32


def sequence_key(sequence: TokenSequence, residual_size: int) -> str:
    """Hash what the metrics of a sequence depend on, models apart.

    Args:
        sequence: The sequence.
        residual_size: Entries of a residual codebook.

    Returns:
        64 hexadecimal digits.
    """
    facts = [METRIC_VERSION, list(sequence.tokens.shape), sequence.num_frames, sequence.ended, residual_size]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(sequence.tokens.contiguous().numpy().tobytes())
    return digest.hexdigest()


def measure_arms(
    baseline: Arm,
    arms: Mapping[str, Arm],
    sequences: Sequence[TokenSequence],
    residual_size: int,
    cache: Path,
    progress: Progress = lambda what, done, total: None,
    keep_answers: bool = False,
) -> dict[str, list[TokenDamage]]:
    """Compare arms with the baseline on what the baseline spoke.

    Args:
        baseline: The model that spoke.
        arms: Those to compare, by name.
        sequences: What it spoke.
        residual_size: Entries of a residual codebook that exist in the codec.
        cache: A folder of this function's own; made when absent.
        progress: Called after each sequence that was computed.
        keep_answers: Whether the baseline's answers stay in the cache, for more arms later.

    Returns:
        For each arm, one damage per sequence, in order.

    Raises:
        UserError: A sequence cannot be scored, the models differ in size, or the cache is damaged or full.
    """
    keys = [sequence_key(sequence, residual_size) for sequence in sequences]
    answers = [cache / f"baseline-{_short(key, baseline.key)}.safetensors" for key in keys]
    damages = {
        name: [cache / f"damage-{_short(key, baseline.key, arm.key)}.npz" for key in keys] for name, arm in arms.items()
    }
    missing = {name: [i for i, path in enumerate(paths) if not path.exists()] for name, paths in damages.items()}
    wanted = sorted({i for rows in missing.values() for i in rows if not answers[i].exists()})
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    if wanted:
        model = baseline.load()
        check_sequences(model.config, sequences, residual_size)
        for done, i in enumerate(wanted, 1):
            _save(answers[i], teacher_forced(model, sequences[i], residual_size))
            progress("baseline", done, len(wanted))
        del model
        release_memory()
    for name, rows in missing.items():
        if not rows:
            continue
        model = arms[name].load()
        for done, i in enumerate(rows, 1):
            own = teacher_forced(model, sequences[i], residual_size)
            token_damage(_load(answers[i]), own, model, sequences[i], residual_size).save(damages[name][i])
            progress(name, done, len(rows))
        del model
        release_memory()
    if not keep_answers:
        for path in answers:
            path.unlink(missing_ok=True)
    return {name: [_named(path, one.id) for path, one in zip(damages[name], sequences, strict=True)] for name in arms}


def _short(*keys: str) -> str:
    return sha256_text(" ".join(keys))[:32]


def _named(path: Path, name: str) -> TokenDamage:
    """Read a damage; the cache knows sequences by what they hold, so the name is the caller's."""
    return replace(TokenDamage.load(path), id=name)


def _save(path: Path, forced: Forced) -> None:
    tensors = {field.name: getattr(forced, field.name).cpu().contiguous() for field in fields(forced)}
    with atomic_file(path, overwrite=True) as partial:
        save_file(tensors, partial)


def _load(path: Path) -> Forced:
    try:
        return Forced(**load_file(path))
    except (SafetensorError, OSError, TypeError) as error:
        raise UserError(f"{path}: {error}", "answers of the baseline", "remove it: it is made again") from error
