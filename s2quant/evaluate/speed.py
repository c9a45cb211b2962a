"""How fast checkpoints speak, side by side: arms take turns and speak the same number of frames.

Every arm speaks `num_frames` (`Request.ignore_end`): one that stops early must not look fast. The first round of each
batch size is warm-up, reported and left out; the device is waited for at both ends of every stretch. Times are medians
over the repeats. Voices are not encoded here, so there is no figure for that stage.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from s2quant.errors import UserError
from s2quant.runtime.engine import Engine, load_engine
from s2quant.runtime.linears import Backend
from s2quant.runtime.load import device_name, parse_device
from s2quant.runtime.speech import Request


def measure_speed(
    folders: Mapping[str, Path],
    *,
    text: str,
    num_frames: int,
    repeats: int = 3,
    batch_sizes: Sequence[int] = (1,),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    linears: Backend = "auto",
) -> dict[str, Any]:
    """Time checkpoints under the same conditions; all are in memory together.

    Args:
        folders: Name of the arm -> checkpoint folder.
        text: What every utterance says.
        num_frames: Frames per utterance, 2 or more.
        repeats: Timed rounds per batch size.
        batch_sizes: Utterances at a time.
        device: Where to run.
        dtype: The models' dtype.
        linears: Backend of the quantized linears.

    Returns:
        device, num_frames, repeats, warmup_s, and `rows`, one per batch size and arm: concurrency, arm, ms_per_frame
        (time of prefill and frames over the frames of one utterance), rtf (with the codec, over the sound of one
        utterance), first_audio_s (of one stream; None in other rows), frames_per_s, audio_s_per_s,
        peak_device_bytes (of the arm that runs, with all arms' weights; None on a CPU), stages_s (ar, codec).

    Raises:
        UserError: A number is out of range, or a folder, the text or the device cannot be used.
    """
    if num_frames < 2 or repeats < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise UserError(
            f"{num_frames} frames, {repeats} repeats, batch sizes {list(batch_sizes)}",
            "2 frames or more, and positive numbers",
            "correct them",
        )
    target, slots = parse_device(device), max(batch_sizes)
    engines = {name: load_engine(folder, target, dtype, linears, slots) for name, folder in folders.items()}
    rows, warmup_s = [], 0.0
    for size in batch_sizes:
        requests = [Request(text=text, seed=seed, max_frames=num_frames, ignore_end=True) for seed in range(size)]
        rounds: dict[str, list[dict[str, float | None]]] = {name: [] for name in engines}
        for turn in range(1 + repeats):  # turn 0 is the warm-up
            for name in list(engines)[:: 1 if turn % 2 else -1]:
                found = _round(engines[name], requests)
                if turn:
                    rounds[name].append(found)
                else:
                    warmup_s += sum(found[stage] or 0.0 for stage in ("ar", "codec"))
        rows += [_row(name, size, num_frames, engines[name], rounds[name]) for name in engines]
    return {
        "device": device_name(target),
        "num_frames": num_frames,
        "repeats": repeats,
        "warmup_s": warmup_s,
        "rows": rows,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _round(engine: Engine, requests: Sequence[Request]) -> dict[str, float | None]:
    """Speak and decode all requests once; of one request also stream it."""
    device = engine.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = _now(device)
    speeches = list(engine.generate(requests))
    spoken = _now(device)
    for speech in speeches:
        engine.decode(speech.codes)
    found: dict[str, float | None] = {"ar": spoken - started, "codec": _now(device) - spoken, "first": None}
    found["bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if len(requests) == 1:
        started = _now(device)
        next(chunk for chunk, _ in engine.stream_request(requests[0]) if len(chunk))
        found["first"] = _now(device) - started
    return found


def _row(
    name: str, size: int, num_frames: int, engine: Engine, rounds: Sequence[Mapping[str, float | None]]
) -> dict[str, Any]:
    def median(key: str) -> float | None:
        values = [one[key] for one in rounds]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    assert engine.codec is not None
    ar, codec = median("ar") or 0.0, median("codec") or 0.0
    audio_s = engine.decode(torch.zeros(engine.config.num_codebooks, num_frames, dtype=torch.int64)).shape[0]
    seconds = audio_s / engine.codec.sample_rate
    return {
        "arm": name,
        "concurrency": size,
        "ms_per_frame": 1000 * ar / num_frames,
        "rtf": (ar + codec) / seconds,
        "first_audio_s": median("first"),
        "frames_per_s": size * num_frames / ar,
        "audio_s_per_s": size * seconds / (ar + codec),
        "peak_device_bytes": median("bytes"),
        "stages_s": {"ar": ar, "codec": codec},
    }
