"""What one replaced linear does to speech, from its block up only.

Legend: B batch (1), T positions, P scored positions, F frames, N codebooks, D width.

Held-out sequences that the bf16 model spoke are teacher-forced, one by one and unpadded, by the very functions of
`s2quant.evaluate.tokens`; what comes out is what that module measures on a whole model. The inputs of one block are
kept: a linear that was replaced there changes nothing before it. A linear of the Fast AR changes only the Fast AR.

The model runs in float32 unless asked otherwise, with the weights of the bf16 checkpoint. In bfloat16 every change,
however small, makes all later roundings fall differently: on a tiny model that alone is worth more than 8 bits are, and
it does not add up over linears, so that a sum of single damages would count it again and again.

The damage is one number: nats per frame, the KL divergence of the semantic code (of 4096 codes and im_end) plus those
of the residual codes. Given the codes before it, each is a factor of the frame's probability, so the sum is the
divergence of the distribution of whole frames, measured along the baseline's own codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s2quant.checkpoint.config import S2Config
from s2quant.evaluate.token_summary import FRAMES_BEFORE_END, mean_or_none, summarise_tokens
from s2quant.evaluate.tokens import (
    Forced,
    TokenDamage,
    TokenSequence,
    check_sequences,
    compare_forced,
    forced_from_hidden,
    residual_logits,
    teacher_forced,
    token_damage,
)
from s2quant.model import DualAR, causal_attention, module_name
from s2quant.model.attention import run_blocks


@dataclass(kw_only=True, eq=False)
class Held:
    """The bf16 model on the held-out sequences, up to one block of the Slow AR.

    Args:
        model: The model.
        sequences: What it spoke.
        residual_size: Entries of a residual codebook that exist in the codec.
        block: Index of the block whose inputs are kept.
        inputs: [1, T, D] per sequence.
        references: Its answers.
    """

    model: DualAR
    sequences: tuple[TokenSequence, ...]
    residual_size: int
    block: int
    inputs: list[Tensor]
    references: tuple[Forced, ...]

    @torch.inference_mode()
    def advance(self) -> None:
        """Go on to the next block, in place; every linear is the bf16 model's again."""
        block = self.model.slow.layers[self.block]
        self.inputs = [block(x, self._table(x), causal_attention) for x in self.inputs]
        self.block += 1

    @torch.inference_mode()
    def measure(self, part: str) -> list[tuple[TokenDamage, float, float]]:
        """Measure the model as it stands, unchanged before the kept block (or only in the Fast AR).

        Args:
            part: "slow" if linears of the kept block or after it were replaced, "fast" if the Slow AR is whole, "both".

        Returns:
            Per sequence: the damage, the squared error of the final hidden state, and the reference's square.
        """
        found = []
        for sequence, x, reference in zip(self.sequences, self.inputs, self.references, strict=True):
            if part == "fast":
                residual = residual_logits(self.model, reference.hidden, sequence.codes, self.residual_size)
                own = Forced(semantic=reference.semantic, hidden=reference.hidden, residual=residual)
                shared = residual  # fed with the baseline's own hidden vector
            else:
                own = forced_from_hidden(self.model, self._hidden(x), sequence, self.residual_size)
                shared = reference.residual  # that of the baseline's Fast AR
                if part == "both":
                    shared = residual_logits(self.model, reference.hidden, sequence.codes, self.residual_size)
            found.append((compare_forced(reference, own, shared, sequence), *_hidden_error(reference, own)))
        return found

    def _hidden(self, x: Tensor) -> Tensor:
        layers = self.model.slow.layers[self.block :]
        assert isinstance(layers, nn.ModuleList)
        out: Tensor = self.model.slow.norm(run_blocks(layers, x, self._table(x), [causal_attention] * len(layers)))
        return out

    def _table(self, x: Tensor) -> Tensor:
        return self.model.slow.rotary.table(x.shape[1], x.device)


@torch.inference_mode()
def hold(model: DualAR, sequences: Sequence[TokenSequence], residual_size: int) -> Held:
    """Begin at the first block.

    Args:
        model: The bf16 model.
        sequences: What it spoke.
        residual_size: Entries of a residual codebook that exist in the codec.

    Returns:
        The model's answers and the inputs of its first block.

    Raises:
        UserError: A sequence cannot be scored.
    """
    check_sequences(model.config, sequences, residual_size)
    device = model.slow.embeddings.weight.device
    inputs = [model.slow.embed(one.tokens[None].to(device)) for one in sequences]
    held = Held(
        model=model,
        sequences=tuple(sequences),
        residual_size=residual_size,
        block=0,
        inputs=inputs,
        references=(),
    )
    answers = [
        forced_from_hidden(model, held._hidden(x), one, residual_size)
        for x, one in zip(inputs, held.sequences, strict=True)
    ]
    held.references = tuple(answers)
    return held


def measure_model(held: Held, model: DualAR) -> dict[str, Any]:
    """Measure another whole model: a quantized one, or the same in another precision (what rounding alone does).

    Args:
        held: The bf16 model's answers.
        model: The other.

    Returns:
        As `summarise`.

    Raises:
        UserError: The model is of another size.
    """
    found = []
    for sequence, reference in zip(held.sequences, held.references, strict=True):
        own = teacher_forced(model, sequence, held.residual_size)
        damage = token_damage(reference, own, model, sequence, held.residual_size)
        found.append((damage, *_hidden_error(reference, own)))
    return summarise(found)


def _hidden_error(reference: Forced, own: Forced) -> tuple[float, float]:
    """Sum the squares of the error and of the reference, over the frames: ||h - h0||^2 and ||h0||^2."""
    before, after = reference.hidden.double(), own.hidden.double()
    return float((after - before).square().sum()), float(before.square().sum())


@contextmanager
def replaced(model: DualAR, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Give linears other weights, in place, and undo it at the end.

    Args:
        model: The model.
        weights: Dense [M, K] by module name on disk, of the linear's dtype and device.

    Yields:
        Nothing.
    """
    linears = {name: model.get_submodule(module_name(name)) for name in weights}
    before = {name: linear.weight for name, linear in linears.items()}
    try:
        for name, weight in weights.items():
            setattr(linears[name], "weight", nn.Parameter(weight, requires_grad=False))  # noqa: B010
        yield
    finally:
        for name, parameter in before.items():
            setattr(linears[name], "weight", parameter)  # noqa: B010


def summarise(found: Sequence[tuple[TokenDamage, float, float]]) -> dict[str, Any]:
    """Pool the damage over all held-out sequences.

    Args:
        found: From `Held.measure`.

    Returns:
        kl (nats per frame: semantic and residual), kl_semantic, kl_residual, kl_codebooks, kl_standard_error (of kl,
        between sequences), top1_agreement (of the semantic code), end_delta and end_before_delta (change of the
        probability of im_end at the true end, and in the FRAMES_BEFORE_END frames before it), end_drift and
        end_before_drift (the mean size of that change; None where no sequence ends by itself), hidden_error (relative
        error of the Slow AR's final hidden state). None where a value is not finite.
    """
    damages = [damage for damage, _, _ in found]
    summary = summarise_tokens(damages)
    assert summary is not None
    books = [book["kl_mean"] for book in summary["codebooks"]]
    end = summary["im_end"]
    square = sum(below for _, _, below in found)
    error = (sum(above for _, above, _ in found) / square) ** 0.5 if square else None
    return {
        "kl": _sum(books),
        "kl_semantic": books[0],
        "kl_residual": _sum(books[1:]),
        "kl_codebooks": books,
        "kl_standard_error": _standard_error(damages),
        "top1_agreement": summary["codebooks"][0]["top1_agreement"],
        "end_delta": _difference(end["model_at_end"], end["baseline_at_end"]),
        "end_before_delta": _difference(end["model_before"], end["baseline_before"]),
        "end_drift": _drift(damages, slice(-1, None)),
        "end_before_drift": _drift(damages, slice(-1 - FRAMES_BEFORE_END, -1)),
        "hidden_error": error if error is not None and np.isfinite(error) else None,
        "num_not_finite": summary["num_not_finite"],
    }


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(sum(known)) if len(known) == len(values) else None


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _drift(damages: Sequence[TokenDamage], where: slice) -> float | None:
    """Average the size of the change of P(im_end) over some of the last positions of sequences that end."""
    changes = [(one.end_model - one.end_baseline)[where] for one in damages if one.ended]
    return mean_or_none(np.abs(np.concatenate(changes))) if changes else None


def _standard_error(damages: Sequence[TokenDamage]) -> float | None:
    """Estimate the standard error of kl from how it differs between sequences, weighted by their frames."""
    each = np.array(
        [one.kl.mean(dtype=np.float64) + one.residual_kl.sum(1, dtype=np.float64).mean() for one in damages]
    )
    if len(each) < 2 or not np.isfinite(each).all():
        return None
    weights = np.array([one.num_frames for one in damages]) / sum(one.num_frames for one in damages)
    mean = float((weights * each).sum())
    scale = len(each) / (len(each) - 1)
    return float(np.sqrt(scale * (weights**2 * (each - mean) ** 2).sum()))


def held_sequences(
    ids: Sequence[str], sequences: Sequence[Tensor], config: S2Config, residual_size: int, require_end: bool,
    max_frames: int,
) -> tuple[list[TokenSequence], dict[str, int]]:  # fmt: skip
    """Turn calibration sequences into ones that can be scored.

    Args:
        ids: Their lines.
        sequences: int64 [1+N, T] each, perhaps cut before their im_end.
        config: The model's configuration.
        residual_size: Entries of a residual codebook that exist in the codec.
        require_end: Whether every sequence that is not cut ended by itself.
        max_frames: Most frames that were spoken: a sequence with as many is taken for one that did not end.

    Returns:
        Those with frames at their end, and how many others there are, by reason.
    """
    made: list[TokenSequence] = []
    dropped: dict[str, int] = {}
    for name, whole in zip(ids, sequences, strict=True):
        is_cut = int(whole[0, -1]) != config.im_end_id
        end = torch.zeros(len(whole), 1, dtype=torch.int64)
        end[0] = config.im_end_id
        tokens = torch.cat([whole, end], dim=1) if is_cut else whole
        ids_row = tokens[0, :-1]
        text = ((ids_row < config.semantic_begin_id) | (ids_row > config.semantic_end_id)).nonzero()
        num_frames = tokens.shape[1] - 2 - int(text[-1]) if len(text) else 0
        codes = tokens[2:, tokens.shape[1] - 1 - num_frames : -1]
        reason = None
        if num_frames < 1:
            reason = "no frames at its end"
        elif bool((codes >= residual_size).any()):
            reason = "a code that the codec does not have"
        if reason is not None:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        ended = not is_cut and (require_end or num_frames < max_frames)
        made.append(TokenSequence(id=name, tokens=tokens, num_frames=num_frames, ended=ended))
    return made, dropped
