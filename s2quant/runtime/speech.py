"""What the engine is asked for and what it gives back, as plain data.

Legend: N codebooks, F frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from s2quant.prompt import Voice
from s2quant.sampling import Sampling

DEFAULT_MAX_FRAMES = 1024
StopReason = Literal["end", "limit", "full"]
DecoderKind = Literal["auto", "plain", "fast"]
DECODERS = ("auto", "plain", "fast")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Something to be spoken.

    Args:
        text: The text, with inline [tags] and `<|speaker:i|>` marks.
        voices: Reference voices, one per speaker.
        seed: Seed of this utterance's own random state.
        sampling: Temperature, top_p, top_k.
        max_frames: Most frames per batch of text.
        max_positions: Positions of the conversation, prompt and frames, beyond which nothing is spoken, but for the
            first frame; None: as many as the model has.
        chunk_bytes: Most UTF-8 bytes of speaker turns spoken in one batch.
        split_sentences: Whether a long text without speaker marks is cut between sentences (not what upstream does).
        ignore_end: Never draw im_end: speak max_frames frames. For timing, where all arms must make the same number.
        text_policy: "refuse" control tokens in the text, or "escape" them.
    """

    text: str
    voices: tuple[Voice, ...] = ()
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    max_frames: int = DEFAULT_MAX_FRAMES
    max_positions: int | None = None
    chunk_bytes: int = 300
    split_sentences: bool = False
    ignore_end: bool = False
    text_policy: Literal["refuse", "escape"] = "refuse"


@dataclass(frozen=True, kw_only=True)
class Speech:
    """What was spoken for one request.

    Args:
        index: The request's place in the list.
        codes: int64 [N, F], on the CPU; im_end is not in it.
        stop_reason: "end": every batch ended by itself; "limit": at least one hit its limit of frames; "full": what
            was spoken filled the positions that there are, and the batches after it were not spoken.
        batch_frames: Frames of each batch that was spoken.
        num_prompt_tokens: Positions prefilled, over all batches.
        seconds: Wall-clock time from taking the slot to the end, shared with other slots.
    """

    index: int
    codes: Tensor
    stop_reason: StopReason
    batch_frames: tuple[int, ...]
    num_prompt_tokens: int
    seconds: float


def decoder_for(decoder: DecoderKind, device: torch.device) -> Literal["plain", "fast"]:
    """Choose how frames are made.

    Args:
        decoder: What is asked for.
        device: Where the model is.

    Returns:
        "fast" or "plain"; for "auto" the one that is faster there.
    """
    if decoder != "auto":
        return decoder
    return "fast" if device.type == "cuda" else "plain"
