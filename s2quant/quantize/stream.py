"""The calibration stream: what flows from stage to stage of a model (`s2quant.quantize.stages`), batch by batch.

Legend: B batch, T positions, F frames, N codebooks, D width, E width of the Fast AR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2quant.checkpoint.config import TransformerConfig
from s2quant.checkpoint.layout import FAST, SLOW
from s2quant.checkpoint.reader import Checkpoint
from s2quant.layers import RMSNorm, without_values
from s2quant.model import FastAR, SlowAR
from s2quant.quantize.copies import to_host
from s2quant.quantize.stages import Stage, State, load_into
from s2quant.recipe import PositionWeights

MAX_KEPT_BYTES = 8_000_000_000  # that batches may take within a stage; 256 sequences of 1024 positions take 7.8
MAX_FAST_FRAMES = 16_384  # frames that calibrate the Fast AR: ten rows each, far more than a Hessian needs


@dataclass(kw_only=True)
class Stream:
    """What flows from stage to stage.

    A batch goes through a stage once: between two steps it rests where it is, if there is room for that, and starts
    from the stage's beginning otherwise. Both give the same bits.

    Args:
        values: [B, T, D] per batch, bfloat16 when the stages are a checkpoint's, wherever they rest; None for a batch
            that another process runs.
        rows: int64 [rows] per batch, the positions of B * T that count; None: all do.
        num_held: The last so many batches are held out: they measure the error and enter no Hessian.
        device: Where batches are run.
        weights: Float [rows] per batch, how much a position counts in a Hessian; None: all alike.
        num_rows: Positions of every batch that are none of padding.
        totals: Those of a weight above 0, and the sum of the weights, of every batch.
        keeps: Whether batches rest within a stage.
    """

    values: list[Tensor | None]
    rows: list[Tensor | None]
    num_held: int
    device: torch.device
    weights: list[Tensor | None]
    num_rows: list[int]
    totals: list[tuple[int, float]]
    keeps: bool

    def __post_init__(self) -> None:
        self._within: dict[int, tuple[int, State]] = {}

    @property
    def num_used(self) -> int:
        """Batches that enter Hessians."""
        return len(self.values) - self.num_held

    def advance(self, stage: Stage) -> None:
        """Replace every batch by the stage's output, in place.

        Args:
            stage: The stage, already quantized.
        """
        for index, value in enumerate(self.values):
            if value is not None:
                output = stage.leave(*self._at(stage, len(stage.steps) - 1, index))
                self.values[index] = _at_rest(output, value.device)
                self._within.pop(index, None)

    def inputs(self, stage: Stage, linear: str, index: int) -> tuple[Tensor, Tensor | None]:
        """Run the stage up to one linear on one batch, which is this process's, and give the inputs of that linear.

        Args:
            stage: The stage. Its steps are visited in order; linears of earlier ones do not change any more.
            linear: Relative name of the linear.
            index: The batch.

        Returns:
            [rows, K], padding dropped, and the rows' weights [rows] or None.
        """
        number, rows = stage.step_of(linear), self.rows[index]
        inputs = stage.steps[number].inputs(*self._at(stage, number, index)).flatten(0, -2)
        return inputs if rows is None else inputs.index_select(0, rows), self.weights[index]

    def _at(self, stage: Stage, number: int, index: int) -> State:
        """Take a batch to a step."""
        value = self.values[index]
        assert value is not None, index
        done, state = self._within.get(index, (-1, (value.to(self.device, non_blocking=True),)))
        assert done <= number, (stage.name, done, number)
        for step in stage.steps[done + 1 : number + 1]:
            state = step.enter(*state)
        if self.keeps:
            self._within[index] = number, state
        return state


def slow_stream(
    checkpoint: Checkpoint,
    batches: Sequence[tuple[Tensor, Tensor]],
    num_held: int,
    device: torch.device,
    weights: PositionWeights | None = None,
    rest: torch.device | None = None,
    owns: Callable[[int], bool] = lambda index: True,
) -> Stream:
    """Embed calibration batches.

    Args:
        checkpoint: The model.
        batches: Tokens int64 [B, 1+N, T] and mask bool [B, T].
        num_held: Batches at the end that are held out.
        device: Where to work.
        weights: How much text and speech count; None: alike.
        rest: Where the stream is kept between stages; None: on the device.
        owns: Tells the batches that this process runs.

    Returns:
        The Slow AR's input.
    """
    with without_values():
        slow = SlowAR(checkpoint.config)
    for name, parameter in ((SLOW, "embeddings"), (FAST, "codebook_embeddings")):
        weight = checkpoint.dense(f"{name}.{parameter}", device, torch.bfloat16)
        setattr(slow.get_submodule(parameter), "weight", nn.Parameter(weight, requires_grad=False))  # noqa: B010
    values = [
        _at_rest(slow.embed(tokens.to(device)), rest or device) if owns(index) else None
        for index, (tokens, _) in enumerate(batches)
    ]
    of_positions = [_position_weights(slow.is_semantic(tokens)[mask], weights, device) for tokens, mask in batches]
    num_rows = [int(mask.sum()) for _, mask in batches]
    return Stream(
        values=values,
        rows=[None if bool(mask.all()) else mask.flatten().nonzero()[:, 0].to(device) for _, mask in batches],
        num_held=num_held,
        device=device,
        weights=of_positions,
        num_rows=num_rows,
        totals=list(map(_total, num_rows, of_positions)),
        keeps=rest is None and _has_room(values, checkpoint.config.slow),
    )


def _at_rest(value: Tensor, rest: torch.device) -> Tensor:
    """Put a batch where it rests; on the host it is page-locked, if it comes from a GPU, so that it is soon back."""
    return to_host(value) if rest.type == "cpu" else value.to(rest)


def _has_room(values: Sequence[Tensor | None], config: TransformerConfig) -> bool:
    """Tell whether there is room for what this process's batches are within a stage."""
    num_positions = sum(value.shape[:-1].numel() for value in values if value is not None)
    width = 2 * config.dim + max(config.intermediate_size, config.n_head * config.head_dim)
    return 2 * num_positions * width <= MAX_KEPT_BYTES


def _position_weights(speech: Tensor, weights: PositionWeights | None, device: torch.device) -> Tensor | None:
    """Give each position of bool [rows] its weight; None when they do not differ, so that nothing is rounded."""
    if weights is None or weights.text == weights.speech:
        return None
    return torch.where(speech, weights.speech, weights.text).to(device, torch.float32)


def _total(num_rows: int, weights: Tensor | None) -> tuple[int, float]:
    """Count the rows of a weight above 0, and add up the weights."""
    if weights is None:
        return num_rows, float(num_rows)
    return int((weights > 0).sum()), float(weights.double().sum())


def fast_stream(
    checkpoint: Checkpoint,
    slow: Stream,
    batches: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    rest: torch.device | None = None,
) -> Stream:
    """Gather the Fast AR's input: one row per frame, its ten positions.

    Args:
        checkpoint: The model.
        slow: The stream after the Slow AR's last block.
        batches: The tokens that it was made of.
        device: Where to work.
        rest: Where the stream is kept between stages; None: on the device.

    Returns:
        Values [F, N, E] per batch (F may be 0), evenly thinned to about MAX_FAST_FRAMES in all.
    """
    config = checkpoint.config
    norm = load_into(RMSNorm(config.slow.dim, config.slow.norm_eps), checkpoint, f"{SLOW}.norm", device, itself=True)
    with without_values():
        fast = FastAR(config)
    for name in ("embeddings", "project_in"):
        if f"{FAST}.{name}" in checkpoint.modules:
            load_into(fast.get_submodule(name), checkpoint, f"{FAST}.{name}", device, itself=True)
    frames = [_frames(config.semantic_begin_id, config.semantic_end_id, *batch) for batch in batches]
    keep = min(1.0, MAX_FAST_FRAMES / max(1, sum(len(f) for f in frames)))
    values: list[Tensor | None] = []
    num_rows = []
    for value, found, (tokens, _) in zip(slow.values, frames, batches, strict=True):
        count = max(1, int(len(found) * keep)) if len(found) else 0
        num_rows.append(count * config.num_codebooks)
        if value is None:
            values.append(None)
            continue
        chosen = found[torch.linspace(0, len(found) - 1, count).long()]
        sequence, position = chosen.unbind(-1)
        hidden = norm(value[sequence.to(value.device), (position - 1).to(value.device)].to(device))
        codes = tokens[sequence, 1:-1, position].to(device)  # the last code is never read
        inputs = torch.cat([fast.embed_hidden(hidden)[:, None], fast.embed_code(codes)], dim=1)
        values.append(_at_rest(inputs, rest or device))
    nothing: list[Tensor | None] = [None] * len(values)
    return Stream(
        values=values,
        rows=nothing,
        num_held=slow.num_held,
        device=device,
        weights=list(nothing),
        num_rows=num_rows,
        totals=list(map(_total, num_rows, nothing)),
        keeps=rest is None and _has_room(values, config.fast),
    )


def _frames(begin: int, end: int, tokens: Tensor, mask: Tensor) -> Tensor:
    """Find the frames with a position before them: int64 [F, 2], sequence and position."""
    wanted = (tokens[:, 0] >= begin) & (tokens[:, 0] <= end) & mask
    return wanted[:, 1:].nonzero() + torch.tensor([0, 1])
