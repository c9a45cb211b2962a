"""A voice: what a reference recording says and the codes of how it sounds.

Legend: F frames, N codebooks. Refused: no transcript, codes that are not whole numbers, not [N, F], empty, or out
of range; never repaired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2quant.errors import UserError, shorten_list
from s2quant.prompt.text import TextPolicy, check_text
from s2quant.prompt.tokenizer import Tokenizer

# Rows of each codebook in the model's tables. The codec of S2 Pro uses 1024 of them in the residual codebooks, but
# the reference lets the model sample any, and feeds them back.
CODEBOOK_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class Voice:
    """One reference recording.

    Args:
        text: Its transcript; may carry its own `<|speaker:N|>`.
        codes: int64 [N, F], as the codec encodes it.
    """

    text: str
    codes: Tensor


def code_faults(
    codes: Tensor, num_codebooks: int, num_semantic: int, codebook_size: int = CODEBOOK_SIZE, min_frames: int = 1
) -> list[str]:
    """Say what is wrong with a piece of speech.

    Args:
        codes: Integers [N, F].
        num_codebooks: N.
        num_semantic: Codes of row 0.
        codebook_size: Codes of the other rows: rows of the model's tables, or fewer where the codec is known.
        min_frames: The fewest frames.

    Returns:
        One sentence per fault.
    """
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        return [f"codes are {codes.dtype}, not integers"]
    if codes.ndim != 2 or codes.shape[0] != num_codebooks:
        return [f"codes have the shape {list(codes.shape)}, not [{num_codebooks}, frames]"]
    if codes.shape[1] < min_frames:
        return [f"codes have {codes.shape[1]} frames, not {min_frames} or more"]
    faults = []
    for row, values in enumerate(codes if codes.shape[1] else ()):
        low, high, limit = int(values.min()), int(values.max()), codebook_size if row else num_semantic
        if low < 0 or high >= limit:
            faults.append(f"codebook {row} holds codes from {low} to {high}, outside 0 to {limit - 1}")
    return faults


def check_voices(
    voices: Sequence[Voice],
    tokenizer: Tokenizer,
    num_codebooks: int = 10,
    codebook_size: int = CODEBOOK_SIZE,
    policy: TextPolicy = "refuse",
) -> None:
    """Refuse voices that the model cannot take.

    Args:
        voices: The references.
        tokenizer: The checkpoint's tokenizer; says how many semantic codes there are.
        num_codebooks: N.
        codebook_size: Rows of a residual codebook in the model's tables, from the configuration.
        policy: What to do with control tokens in a transcript, as in `check_text`.

    Raises:
        UserError: A transcript or codes cannot be used; all voices' faults are listed.
    """
    faults = []
    for i, voice in enumerate(voices):
        try:
            check_text(voice.text, policy, tokenizer)
        except UserError as error:
            faults.append(f"voice {i}, transcript: {error.got}")
        faults += [
            f"voice {i}: {fault}"
            for fault in code_faults(voice.codes, num_codebooks, tokenizer.num_semantic, codebook_size)
        ]
    if faults:
        raise UserError(
            f"unusable voices:\n{shorten_list(faults)}",
            f"for each a transcript in plain text and codes [{num_codebooks}, frames] of this codec",
            "encode the recording with this checkpoint's codec and write down what it says",
        )
