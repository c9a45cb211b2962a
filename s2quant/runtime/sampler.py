"""The one sampler: upstream's order of filters in float32, with repetition-aware sampling (RAS).

Legend: B slots, V candidates, S uniform numbers of a frame: two per semantic candidate, then one per residual one.

Order, as the reference does it: softmax of the untempered logits, sorted; drop every rank whose cumulative
probability exceeds top_p (the rank that crosses is dropped too) and every rank beyond top_k; rank 0 always
stays; divide the survivors by the temperature; draw argmax(p / -ln u) with one uniform number per candidate in
vocabulary order. The noise belongs to the candidate, not to the rank, so two models with one seed see the same
noise until their first difference. Everything is float32; the reference samples in the model's dtype.

Source: fish-speech 3dd1f85, fish_speech/models/text2semantic/inference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2quant.sampling import Sampling

RAS_WINDOW = 10
RAS_TEMPERATURE = 1.0
RAS_TOP_P = 0.9
AHEAD = 4  # frames of random numbers drawn at a time: another number is other speech on a CUDA device
SMALLEST_UNIFORM = 2.0**-25  # a uniform of exactly 0 would lose its candidate for good


@dataclass(frozen=True, kw_only=True)
class SamplingRows:
    """Sampling parameters of a batch, one row per slot, on the device.

    Args:
        temperature: float32 [B, 1].
        top_p: float32 [B, 1].
        top_k: int64 [B, 1].
        max_top_k: The largest top_k.
        ignore_end: bool [B], True where the end is never drawn; None when nowhere.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    max_top_k: int
    ignore_end: Tensor | None = None

    @classmethod
    def of(
        cls, rows: Sequence[Sampling], device: torch.device, ignore_end: Sequence[bool] | None = None
    ) -> SamplingRows:
        """Stack the parameters of several utterances.

        Args:
            rows: One per slot.
            device: Where the tensors live.
            ignore_end: Where the end is never drawn; None when nowhere.

        Returns:
            The stacked parameters.
        """
        ignored = torch.tensor(ignore_end, device=device) if ignore_end is not None and any(ignore_end) else None
        return cls(
            ignore_end=ignored,
            temperature=torch.tensor([[row.temperature] for row in rows], dtype=torch.float32, device=device),
            top_p=torch.tensor([[row.top_p] for row in rows], dtype=torch.float32, device=device),
            top_k=torch.tensor([[row.top_k] for row in rows], dtype=torch.int64, device=device),
            max_top_k=max(row.top_k for row in rows),
        )

    def ras(self) -> SamplingRows:
        """The parameters of the second draw of repetition-aware sampling: hotter, same top_k."""
        return SamplingRows(
            temperature=torch.full_like(self.temperature, RAS_TEMPERATURE),
            top_p=torch.full_like(self.top_p, RAS_TOP_P),
            top_k=self.top_k,
            max_top_k=self.max_top_k,
        )


def filtered_probs(logits: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """Filter and temper logits.

    Args:
        logits: [B, V], any floating dtype; -inf for candidates that are not allowed.
        rows: Parameters of the B slots.

    Returns:
        Probabilities float32 [B, R] of the best R = min(max top_k, V) candidates, 0 where filtered out, and
        their indices int64 [B, R].
    """
    wide = logits.float()
    best, index = wide.topk(min(rows.max_top_k, wide.shape[-1]), dim=-1)
    plain = (best - wide.logsumexp(-1, keepdim=True)).exp()
    rank = torch.arange(best.shape[-1], device=best.device)
    dropped = ((plain.cumsum(-1) > rows.top_p) | (rank >= rows.top_k)) & (rank > 0)
    tempered = best.masked_fill(dropped, float("-inf")) / rows.temperature.clamp(min=1e-5)
    return tempered.softmax(-1), index


def draw(logits: Tensor, rows: SamplingRows, uniform: Tensor) -> Tensor:
    """Draw one candidate per slot.

    Args:
        logits: [B, V].
        rows: Parameters of the B slots.
        uniform: float32 [B, V] in [0, 1), one per candidate in vocabulary order.

    Returns:
        int64 [B]: indices into V.
    """
    probs, index = filtered_probs(logits, rows)
    exponential = -uniform.gather(-1, index).clamp(min=SMALLEST_UNIFORM).log()
    best = (probs / exponential).argmax(-1, keepdim=True)
    return index.gather(-1, best).squeeze(-1)


def draw_semantic(
    logits: Tensor, rows: SamplingRows, uniform: Tensor, window: Tensor | None, num_semantic: int
) -> Tensor:
    """Draw one semantic code or the end, with one swap when the draw repeats a recent code.

    Two draws are made; when the first is a semantic code that stands in the window, the second, hotter one is
    taken as it is.

    Args:
        logits: [B, num_semantic + 1]; the last column is the end of speech.
        rows: Parameters of the B slots.
        uniform: float32 [B, 2, num_semantic + 1].
        window: int64 [B, RAS_WINDOW], recent draws (-1 where there is none), or None for a first token.
        num_semantic: Number of semantic codes.

    Returns:
        int64 [B]: 0..num_semantic-1 is a code, num_semantic is the end.
    """
    if rows.ignore_end is not None:
        logits = logits.clone()
        logits[:, num_semantic].masked_fill_(rows.ignore_end, float("-inf"))
    normal = draw(logits, rows, uniform[:, 0])
    if window is None:
        return normal
    hot = draw(logits, rows.ras(), uniform[:, 1])
    repeats = (window == normal[:, None]).any(-1) & (normal < num_semantic)
    return torch.where(repeats, hot, normal)


class Noise:
    """One utterance's random numbers, drawn in blocks of AHEAD frames, whoever decodes.

    A block is one call of the generator. On a CPU its numbers are those of a call per frame; on a CUDA device they are
    not, so both decoders draw blocks of the same shape.

    Args:
        generator: The utterance's random state; used by nothing else.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._rest: list[Tensor] = []

    def fill(self, block: Tensor) -> None:
        """Draw the next AHEAD frames, in place.

        Args:
            block: float32 [AHEAD, S], contiguous, on the generator's device.
        """
        assert block.shape[0] == AHEAD and block.is_contiguous(), (block.shape, block.stride())
        block.uniform_(generator=self.generator)

    def frame(self, size: int) -> Tensor:
        """Take the next frame, from the rest of a block where there is one.

        Args:
            size: S, the same at every call.

        Returns:
            float32 [S] in [0, 1), not to be written.
        """
        if not self._rest:
            block = torch.empty(AHEAD, size, device=self.generator.device)
            self.fill(block)
            self._rest = list(block)
        assert self._rest[0].shape == (size,), (self._rest[0].shape, size)
        return self._rest.pop(0)


def noise_size(num_semantic: int, num_residual: int, residual_size: int) -> int:
    """Count the uniform numbers of one frame.

    Args:
        num_semantic: Number of semantic codes.
        num_residual: Number of residual codebooks.
        residual_size: Entries of a residual codebook.

    Returns:
        S.
    """
    return 2 * (num_semantic + 1) + num_residual * residual_size


def split_noise(noise: Tensor, num_semantic: int, residual_size: int) -> tuple[Tensor, Tensor]:
    """Tell the numbers of a frame's draws apart.

    Args:
        noise: float32 [..., S].
        num_semantic: Number of semantic codes.
        residual_size: Entries of a residual codebook.

    Returns:
        Views: float32 [..., 2, num_semantic + 1] and float32 [..., num_residual, residual_size].
    """
    slow = 2 * (num_semantic + 1)
    return (
        noise[..., :slow].unflatten(-1, (2, num_semantic + 1)),
        noise[..., slow:].unflatten(-1, (-1, residual_size)),
    )


def frame_uniforms(
    noises: Sequence[Noise], num_semantic: int, num_residual: int, residual_size: int
) -> tuple[Tensor, Tensor]:
    """Take the uniform numbers of one frame, from each utterance's own.

    Args:
        noises: One per slot, all on one device.
        num_semantic: Number of semantic codes.
        num_residual: Number of residual codebooks.
        residual_size: Entries of a residual codebook.

    Returns:
        float32 [B, 2, num_semantic + 1] and float32 [B, num_residual, residual_size].
    """
    size = noise_size(num_semantic, num_residual, residual_size)
    return split_noise(torch.stack([noise.frame(size) for noise in noises]), num_semantic, residual_size)
