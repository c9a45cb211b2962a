"""Damage per token, with the baseline's own speech as input (teacher forcing): the sensitive instrument.

Both arms read the same sequence through the generation path; at every frame each says what it would draw next, and
the two answers are compared: of the Slow AR the distribution over the semantic codes and im_end, as generation
constrains it; of the Fast AR the distribution of every residual code, given the true codes before it. The Fast AR is
asked twice, once with the arm's own hidden vector and once with the baseline's, so that damage of the two parts can
be told apart. Distributions are compared in float32, in nats. Nothing is sampled, filtered or tempered.

Logits are kept in the model's dtype: of a bf16 model that is half the memory, and not one bit is lost. So an arm
that is the baseline has a divergence of exactly 0.

Legend: F frames, P scored positions (F, and one more where speech ends by itself), N codebooks, D width,
C semantic codes and im_end, R entries of a residual codebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from s2quant.checkpoint.config import S2Config
from s2quant.errors import UserError, shorten_list
from s2quant.files import atomic_file
from s2quant.model import DualAR

METRIC_VERSION = 1
FAST_FRAMES = 256  # that the Fast AR scores at a time: at the real size 8 MB of logits per hundred in bf16
Array = npt.NDArray[np.float32]
Part = Literal["slow", "fast"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSequence:
    """One utterance as the baseline spoke it.

    Args:
        id: Names it in messages and files.
        tokens: int64 [1+N, T]: the prompt, the frames, im_end; as `Engine.spoken_sequence` makes it.
        num_frames: F, the frames before the final im_end that were drawn; those of the prompt are not scored.
        ended: Whether the baseline drew im_end itself; else the last position is not scored.
    """

    id: str
    tokens: Tensor
    num_frames: int
    ended: bool

    @property
    def codes(self) -> Tensor:
        """The scored frames: int64 [F, N]."""
        end = self.tokens.shape[1] - 1
        return self.tokens[1:, end - self.num_frames : end].T

    def targets(self) -> Tensor:
        """What was drawn at each scored position, as columns of the constrained logits; -1 is im_end: int64 [P]."""
        return torch.cat([self.codes[:, 0], torch.full((int(self.ended),), -1)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Forced:
    """What a model says about one sequence.

    Args:
        semantic: [P, C], constrained logits in the model's dtype.
        hidden: [F, D], the normed hidden vectors that the Fast AR reads.
        residual: [F, N-1, R], logits of the residual codes.
    """

    semantic: Tensor
    hidden: Tensor
    residual: Tensor

    def to(self, device: torch.device | str) -> Forced:
        """Move to a device.

        Args:
            device: Where to.

        Returns:
            The same values there.
        """
        return Forced(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenDamage:
    """How an arm differs from the baseline on one sequence, position by position; float32, nats.

    Args:
        id: The sequence's.
        num_frames: F.
        ended: Whether the last scored position is im_end.
        kl: [P], KL(baseline || arm) of the semantic distribution.
        agree: [P], 1 where both have the same most likely token.
        delta_nll: [P], by how much less likely the drawn token became.
        confidence: [P], the baseline's highest probability.
        end_baseline: [P], the baseline's probability of im_end.
        end_model: [P], the arm's.
        residual_kl: [F, N-1], KL of each residual code, Fast AR fed with the arm's own hidden vector.
        residual_agree: [F, N-1].
        residual_delta_nll: [F, N-1].
        shared_kl: [F, N-1], KL of each residual code, Fast AR fed with the baseline's hidden vector.
        shared_agree: [F, N-1].
    """

    id: str
    num_frames: int
    ended: bool
    kl: Array
    agree: Array
    delta_nll: Array
    confidence: Array
    end_baseline: Array
    end_model: Array
    residual_kl: Array
    residual_agree: Array
    residual_delta_nll: Array
    shared_kl: Array
    shared_agree: Array

    def save(self, path: Path) -> None:
        """Write as npz; the file appears when it is complete.

        Args:
            path: The file, replaced if it exists.

        Raises:
            UserError: The disk refuses.
        """
        with atomic_file(path, overwrite=True) as partial:
            np.savez(partial, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> TokenDamage:
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The damage.

        Raises:
            UserError: The file is not one of these.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                values: dict[str, Any] = {field.name: stored[field.name] for field in fields(cls)}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{path}: {error}", "a file of token metrics", "remove it: it is made again") from error
        plain = {"id": str(values["id"]), "num_frames": int(values["num_frames"]), "ended": bool(values["ended"])}
        return cls(**(values | plain))


def check_sequences(config: S2Config, sequences: Sequence[TokenSequence], residual_size: int) -> None:
    """Refuse sequences that cannot be scored.

    Args:
        config: The models' configuration.
        sequences: The sequences.
        residual_size: R.

    Raises:
        UserError: One is no spoken sequence of such a model; all are listed.
    """
    faults = []
    for one in sequences:
        rows, length = one.tokens.shape
        start = length - 1 - one.num_frames
        if rows != 1 + config.num_codebooks or one.num_frames < 0 or start < 1:
            faults.append(f"{one.id}: shape {[rows, length]} with {one.num_frames} frames")
            continue
        ids, codes = one.tokens[0, start : length - 1], one.codes
        if int(one.tokens[0, -1]) != config.im_end_id:
            faults.append(f"{one.id}: the last token is {int(one.tokens[0, -1])}, not im_end {config.im_end_id}")
        elif not torch.equal(ids - config.semantic_begin_id, codes[:, 0]):
            faults.append(f"{one.id}: token ids and semantic codes of the last {one.num_frames} frames differ")
        elif bool(((codes[:, 1:] < 0) | (codes[:, 1:] >= residual_size)).any()):
            faults.append(f"{one.id}: a residual code outside 0..{residual_size - 1}")
    if faults:
        raise UserError(
            f"sequences that cannot be scored:\n{shorten_list(faults)}",
            f"[{1 + config.num_codebooks}, T]: a prompt, the frames that were drawn, im_end",
            "speak the suite again with this baseline",
        )


@torch.inference_mode()
def teacher_forced(model: DualAR, sequence: TokenSequence, residual_size: int) -> Forced:
    """Let a model score a sequence.

    Args:
        model: The model.
        sequence: Checked by `check_sequences`.
        residual_size: R: logits of entries that the codec does not have are left out, as when speaking.

    Returns:
        Its answers, on its device.

    Raises:
        UserError: The sequence is too long for the model, or a token is out of range.
    """
    tokens = sequence.tokens[None].to(model.slow.embeddings.weight.device)
    return forced_from_hidden(model, model.slow.forward_hidden(tokens), sequence, residual_size)


@torch.inference_mode()
def forced_from_hidden(model: DualAR, hidden: Tensor, sequence: TokenSequence, residual_size: int) -> Forced:
    """Do what `teacher_forced` does after the Slow AR's last norm.

    Args:
        model: The model.
        hidden: [1, T, D], normed, of the whole sequence.
        sequence: The sequence.
        residual_size: R.

    Returns:
        The model's answers.
    """
    scored = hidden[0, -2 - sequence.num_frames : -1]  # [F + 1, D]: before each frame and before im_end
    frames = scored[:-1]
    return Forced(
        semantic=model.slow.constrained_logits(scored if sequence.ended else frames),
        hidden=frames,
        residual=residual_logits(model, frames, sequence.codes, residual_size),
    )


def residual_logits(model: DualAR, hidden: Tensor, codes: Tensor, residual_size: int) -> Tensor:
    """Score the residual codes of frames, FAST_FRAMES at a time.

    Args:
        model: The model.
        hidden: [F, D], normed.
        codes: int64 [F, N].
        residual_size: R.

    Returns:
        [F, N-1, R].
    """
    dtype = model.fast.embeddings.weight.dtype
    chunks = zip(hidden.to(dtype).split(FAST_FRAMES), codes.to(hidden.device).split(FAST_FRAMES), strict=True)
    return torch.cat([model.fast(some, answers)[:, 1:, :residual_size] for some, answers in chunks])


@torch.inference_mode()
def token_damage(
    reference: Forced, own: Forced, model: DualAR, sequence: TokenSequence, residual_size: int
) -> TokenDamage:
    """Compare an arm with the baseline on one sequence.

    Args:
        reference: `teacher_forced` of the baseline, on any device.
        own: `teacher_forced` of the arm.
        model: The arm.
        sequence: The sequence.
        residual_size: R.

    Returns:
        The damage. Values are NaN where an arm's logits are.

    Raises:
        UserError: The arm's sizes are not the baseline's.
    """
    reference = reference.to(own.semantic.device)
    if reference.semantic.shape != own.semantic.shape or reference.hidden.shape != own.hidden.shape:
        raise UserError(
            f"a model of width {own.hidden.shape[-1]} with {own.semantic.shape[-1]} candidates, the baseline has "
            f"{reference.hidden.shape[-1]} and {reference.semantic.shape[-1]}",
            "two models of the same sizes",
            "compare a quantized model with the checkpoint that it was made of",
        )
    shared = own.residual  # the same input gives the same answer: not computed again
    if own.hidden.dtype != reference.hidden.dtype or not torch.equal(own.hidden, reference.hidden):
        shared = residual_logits(model, reference.hidden, sequence.codes, residual_size)
    return compare_forced(reference, own, shared, sequence)


def compare_forced(reference: Forced, own: Forced, shared: Tensor, sequence: TokenSequence) -> TokenDamage:
    """Compare two models' answers on one sequence.

    Args:
        reference: The baseline's.
        own: The arm's, of the same sizes on the same device.
        shared: [F, N-1, R], the arm's residual logits, Fast AR fed with the baseline's hidden vectors.
        sequence: The sequence.

    Returns:
        The damage. Values are NaN where an arm's logits are.
    """
    targets = sequence.targets().to(own.semantic.device) % own.semantic.shape[-1]  # -1 is the last column
    codes = sequence.codes[:, 1:].to(own.semantic.device)
    semantic = _compare(reference.semantic, own.semantic, targets)
    residual = _compare(reference.residual, own.residual, codes)
    by_shared = _compare(reference.residual, shared, codes)
    probs = reference.semantic.float().softmax(-1)
    found = {
        "kl": semantic["kl"],
        "agree": semantic["agree"],
        "delta_nll": semantic["delta_nll"],
        "confidence": probs.amax(-1),
        "end_baseline": probs[:, -1],
        "end_model": own.semantic.float().softmax(-1)[:, -1],
        "residual_kl": residual["kl"],
        "residual_agree": residual["agree"],
        "residual_delta_nll": residual["delta_nll"],
        "shared_kl": by_shared["kl"],
        "shared_agree": by_shared["agree"],
    }
    arrays = {name: value.float().cpu().numpy() for name, value in found.items()}
    return TokenDamage(id=sequence.id, num_frames=sequence.num_frames, ended=sequence.ended, **arrays)


def _compare(baseline: Tensor, model: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    """Compare logits [..., V] position by position, in float32; targets int64 [...] is what was drawn."""
    log_p, log_q = baseline.float().log_softmax(-1), model.float().log_softmax(-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    drawn = targets[..., None]
    return {
        "kl": kl.clamp(min=0),  # a sum of roundings may fall just below
        "agree": (baseline.argmax(-1) == model.argmax(-1)).where(kl.isfinite(), torch.nan),
        "delta_nll": (log_p.gather(-1, drawn) - log_q.gather(-1, drawn)).squeeze(-1),
    }
