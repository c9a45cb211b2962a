"""How much memory a run takes, and staying within a 12 GB card.

What a run of the 4B model holds on the device, by its sizes (`quantize --plan` prints those of the weights):

- While it speaks the calibration lines: all of the bf16 model, 9.12 GB, and keys and values of each utterance in
  progress: 2 x 36 layers x 8 heads x 128 x 2 bytes = 147 kB a position, 0.15 GB at 1024 positions. Eight utterances
  and the codec (1.6 GB) do not fit into 12 GB; two, with voices encoded on the host, do. The more at a time, the faster
  (`calibration_slots`).
- While it quantizes: one block and the next (0.2 GB each), some copies of the largest Hessian (9728 x 9728 in float32,
  0.38 GB each: up to five while it is summed), a batch of activations, and the calibration stream (256 x 1024 x 2560 x
  2 bytes = 1.3 GB, and 6.4 GB of what its batches are within a block), which can rest on the host; and 1 GB for each
  pair of bits and group_size, in which linears of like sizes are solved by launches that are captured once.

So low memory means: fewer utterances at a time, the codec and the stream on the host, where nothing of it is kept
within a block, launches that are not captured, and a cap on what torch may take, so that a run which needs more stops
instead of being lucky.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from s2quant.calibrate.lines import CalibrationLine
from s2quant.calibrate.sequences import LEAST_GROUPS
from s2quant.checkpoint.reader import Checkpoint
from s2quant.codec.state import FILE_NAME as CODEC_FILE
from s2quant.prompt import split_text
from s2quant.recipe import Calibration
from s2quant.runtime.fast import context_bucket
from s2quant.runtime.memory import limit_memory, release_memory
from s2quant.runtime.speech import Request

LOW_MEMORY_BYTES = 12_000_000_000
LOW_MEMORY_SLOTS = 2
USUAL_SLOTS = 8
MANY_SLOTS = (64, 32, 16)  # a GPU speaks with twice as many in much less than twice the time
SPEECH_SHARE = 0.85  # of a GPU's memory, for weights and caches; the rest: logits, noise, captured launches, libraries
GROWTH = 1.25  # a cache that doubles holds its keys, or its values, twice for a moment
TEXT_POSITIONS, VOICE_POSITIONS = 256, 512  # of a prompt: text and what surrounds it, a voice's recording


def calibration_slots(
    wanted: int | None,
    checkpoint: Checkpoint,
    settings: Calibration,
    lines: Sequence[CalibrationLine],
    device: torch.device,
    num_groups: int = LEAST_GROUPS,
) -> int:
    """Choose how many utterances are in progress at a time while calibration lines are spoken.

    Args:
        wanted: What the user asked for; None: as many as there is room and work for.
        checkpoint: The model.
        settings: The recipe's calibration block.
        lines: Lines that are spoken.
        device: Where they are spoken. The size of its memory counts, not what is free, so that the same device always
            speaks the same way.
        num_groups: Groups of lines that there shall be, for several processes to share; one alone speaks them as well,
            so as to end with the same bytes.

    Returns:
        Their number: on a CPU USUAL_SLOTS unless another is wanted.
    """
    if wanted is not None:
        return wanted
    if device.type != "cuda":
        return USUAL_SLOTS
    total = torch.cuda.get_device_properties(device).total_memory
    return slots_that_fit(total, checkpoint, settings, lines, num_groups)


def slots_that_fit(
    total_bytes: int,
    checkpoint: Checkpoint,
    settings: Calibration,
    lines: Sequence[CalibrationLine],
    num_groups: int = LEAST_GROUPS,
) -> int:
    """Tell how many utterances a GPU has room for, beside the model and its codec, and lines for.

    Args:
        total_bytes: Its memory.
        checkpoint: The model, which speaks in the type it is stored in.
        settings: As `calibration_slots`.
        lines: As `calibration_slots`.
        num_groups: As `calibration_slots`.

    Returns:
        One of MANY_SLOTS, or USUAL_SLOTS if none of them fits: whether those do is seen when they are tried.
    """
    slow, codec = checkpoint.config.slow, checkpoint.folder / CODEC_FILE
    weights = sum(entry.num_bytes for entry in checkpoint.entries.values())
    weights += codec.stat().st_size if codec.exists() else 0
    positions = context_bucket(_most_positions(settings, lines), slow.max_seq_len)
    each = 2 * slow.n_layer * slow.n_local_heads * slow.head_dim * torch.bfloat16.itemsize * positions
    room = SPEECH_SHARE * total_bytes - weights
    most = len(lines) // num_groups
    return next((number for number in MANY_SLOTS if number <= most and GROWTH * number * each <= room), USUAL_SLOTS)


def _most_positions(settings: Calibration, lines: Sequence[CalibrationLine]) -> int:
    """Bound the positions of a line, of which all slots get as many: those before its last batch stay in its prompt."""
    if not settings.require_end:
        return settings.max_positions
    most = 0
    for line in lines:
        request = Request(text=line.text)
        batches = split_text(request.text, request.chunk_bytes, split_sentences=request.split_sentences)
        prompt = TEXT_POSITIONS + (VOICE_POSITIONS if line.voice is not None else 0)
        most = max(most, prompt + len(batches) * settings.max_frames)
    return most


@contextmanager
def device_cap(device: torch.device | None) -> Iterator[None]:
    """Keep torch under LOW_MEMORY_BYTES of a device, context included; beyond, it reports a lack of memory.

    Args:
        device: The device; None or a CPU: nothing is capped.

    Yields:
        Nothing.
    """
    if device is None or device.type != "cuda":
        yield
        return
    limit_memory(device, LOW_MEMORY_BYTES)
    try:
        yield
    finally:
        limit_memory(device, math.inf)


def take_peak_bytes(device: torch.device) -> int | None:
    """Read the peak of the GPU's memory since the last call, and start again.

    Args:
        device: The device.

    Returns:
        Bytes; None on a CPU.
    """
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    release_memory()  # of what was just dropped, cycles too
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def host_peak_bytes() -> int:
    """Read the largest resident set that this process ever had, mapped files included.

    Returns:
        Bytes.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
