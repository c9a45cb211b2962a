"""The model as stages that fit on a device one at a time, and the calibration stream that flows through them.

Legend: B batch, T positions, F frames, N codebooks, D width, E width of the Fast AR.

A stage is one transformer block, or the Fast AR's head. Its linears are visited in the order in which the input
of each depends on the ones before it: wqkv; wo; w1 and w3, which share an input; w2. The Slow AR comes first; its
normed output at the position before each frame starts the Fast AR, which is walked only if a recipe touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2quant.checkpoint.config import TransformerConfig
from s2quant.checkpoint.layout import FAST, SLOW
from s2quant.checkpoint.reader import Checkpoint
from s2quant.layers import RMSNorm
from s2quant.model import Attend, Block, FastAR, Rotary, SlowAR, causal_attention, softmax_attention
from s2quant.recipe import PositionWeights

BLOCK_SUBSETS = (("attention.wqkv",), ("attention.wo",), ("feed_forward.w1", "feed_forward.w3"), ("feed_forward.w2",))
HEAD_SUBSETS = (("output",),)
MAX_FAST_FRAMES = 16_384  # frames that calibrate the Fast AR: ten rows each, far more than a Hessian needs


@dataclass(kw_only=True)
class Stage:
    """A part of the model that runs on its own.

    Args:
        name: Prefix of its modules on disk.
        module: Its weights, on the device.
        run: Applies it to [B, T, D] of the stream.
        subsets: Linears, relative names; those of one subset share their input.
    """

    name: str
    module: nn.Module
    run: Callable[[Tensor], Tensor]
    subsets: tuple[tuple[str, ...], ...]


class Head(nn.Module):
    """The Fast AR's last norm and output, as one module with the names on disk.

    Args:
        config: Sizes of the Fast AR.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Score codes.

        Args:
            x: [F, N, E].

        Returns:
            [F, N, V].
        """
        out: Tensor = self.output(self.norm(x))
        return out


@dataclass(kw_only=True)
class Stream:
    """What flows from stage to stage.

    Args:
        values: [B, T, D] per batch, bfloat16 when the stages are a checkpoint's, wherever they rest; None for a batch
            that another process runs.
        masks: bool [B, T] per batch, True where a position counts; None: all do.
        num_held: The last so many batches are held out: they measure the error and enter no Hessian.
        device: Where batches are run.
        weights: Float [B, T] per batch, how much a position counts in a Hessian; None: all alike.
    """

    values: list[Tensor | None]
    masks: list[Tensor | None]
    num_held: int
    device: torch.device
    weights: list[Tensor | None]

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
                self.values[index] = stage.run(value.to(self.device)).to(value.device)

    def inputs(self, stage: Stage, linear: str, index: int) -> tuple[Tensor, Tensor | None]:
        """Run the stage up to one linear on one batch, which is this process's, and give the inputs of that linear.

        Args:
            stage: The stage.
            linear: Relative name of the linear.
            index: The batch.

        Returns:
            [rows, K], padding dropped, and the rows' weights [rows] or None.
        """
        value, mask, weights = self.values[index], self.masks[index], self.weights[index]
        assert value is not None, index
        inputs = capture_input(stage, linear, value.to(self.device))
        if mask is None:
            return inputs.flatten(0, -2), None if weights is None else weights.flatten()
        return inputs[mask], None if weights is None else weights[mask]


class _Captured(Exception):
    """Carries a linear's input out of a forward pass that need not go on."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def capture_input(stage: Stage, linear: str, x: Tensor) -> Tensor:
    """Run a stage until one of its linears is called.

    Args:
        stage: The stage.
        linear: Relative name of the linear.
        x: The stage's input.

    Returns:
        [..., K]: that linear's input.
    """

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Captured(args[0])

    handle = stage.module.get_submodule(linear).register_forward_pre_hook(hook)
    try:
        stage.run(x)
    except _Captured as captured:
        return captured.value
    finally:
        handle.remove()
    raise AssertionError(f"{stage.name}.{linear} was never called")


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
        owns: Tells the batches that this process runs; it always runs those held out.

    Returns:
        The Slow AR's input.
    """
    with torch.device("meta"):
        slow = SlowAR(checkpoint.config)
    for name, parameter in ((SLOW, "embeddings"), (FAST, "codebook_embeddings")):
        weight = checkpoint.dense(f"{name}.{parameter}", device, torch.bfloat16)
        setattr(slow.get_submodule(parameter), "weight", nn.Parameter(weight, requires_grad=False))  # noqa: B010
    wanted = [owns(index) or index >= len(batches) - num_held for index in range(len(batches))]
    return Stream(
        values=[
            slow.embed(tokens.to(device)).to(rest or device) if is_wanted else None
            for is_wanted, (tokens, _) in zip(wanted, batches, strict=True)
        ],
        masks=[mask.to(device) for _, mask in batches],
        num_held=num_held,
        device=device,
        weights=[_position_weights(slow.is_semantic(tokens), weights, device) for tokens, _ in batches],
    )


def _position_weights(speech: Tensor, weights: PositionWeights | None, device: torch.device) -> Tensor | None:
    """Give each position of bool [B, T] its weight; None when they do not differ, so that nothing is rounded."""
    if weights is None or weights.text == weights.speech:
        return None
    return torch.where(speech, weights.speech, weights.text).to(device, torch.float32)


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
    norm = _load(RMSNorm(config.slow.dim, config.slow.norm_eps), checkpoint, f"{SLOW}.norm", device, itself=True)
    with torch.device("meta"):
        fast = FastAR(config)
    for name in ("embeddings", "project_in"):
        if f"{FAST}.{name}" in checkpoint.modules:
            _load(fast.get_submodule(name), checkpoint, f"{FAST}.{name}", device, itself=True)
    frames = [_frames(config.semantic_begin_id, config.semantic_end_id, *batch) for batch in batches]
    keep = min(1.0, MAX_FAST_FRAMES / max(1, sum(len(f) for f in frames)))
    values: list[Tensor | None] = []
    for value, found, (tokens, _) in zip(slow.values, frames, batches, strict=True):
        if value is None:
            values.append(None)
            continue
        count = max(1, int(len(found) * keep)) if len(found) else 0
        chosen = found[torch.linspace(0, len(found) - 1, count).long()]
        sequence, position = chosen.unbind(-1)
        hidden = norm(value[sequence.to(value.device), (position - 1).to(value.device)].to(device))
        codes = tokens[sequence, 1:-1, position].to(device)  # the last code is never read
        inputs = torch.cat([fast.embed_hidden(hidden)[:, None], fast.embed_code(codes)], dim=1)
        values.append(inputs.to(rest or device))
    nothing: list[Tensor | None] = [None] * len(values)
    return Stream(values=values, masks=nothing, num_held=slow.num_held, device=device, weights=list(nothing))


def _frames(begin: int, end: int, tokens: Tensor, mask: Tensor) -> Tensor:
    """Find the frames with a position before them: int64 [F, 2], sequence and position."""
    wanted = (tokens[:, 0] >= begin) & (tokens[:, 0] <= end) & mask
    return wanted[:, 1:].nonzero() + torch.tensor([0, 1])


def slow_stages(checkpoint: Checkpoint, device: torch.device, length: int) -> Iterator[Stage]:
    """Go through the Slow AR's blocks, loading each when it is asked for.

    Args:
        checkpoint: The model.
        device: Where to work.
        length: The most positions of a sequence.

    Yields:
        One stage per block.
    """
    table = Rotary(checkpoint.config.slow).table(length, device)
    yield from _block_stages(checkpoint, SLOW, checkpoint.config.slow, device, table, causal_attention)


def fast_stages(checkpoint: Checkpoint, device: torch.device) -> Iterator[Stage]:
    """Go through the Fast AR's blocks and its head.

    Args:
        checkpoint: The model.
        device: Where to work.

    Yields:
        One stage per block, then the head.
    """
    config = checkpoint.config.fast
    table = Rotary(config).table(checkpoint.config.num_codebooks, device)
    yield from _block_stages(checkpoint, FAST, config, device, table, softmax_attention)
    with torch.device("meta"):
        head = Head(config)
    for name in ("norm", "output"):
        _load(head, checkpoint, f"{FAST}.{name}", device)
    yield Stage(name=FAST, module=head, run=head, subsets=HEAD_SUBSETS)


def _block_stages(
    checkpoint: Checkpoint, prefix: str, config: TransformerConfig, device: torch.device, table: Tensor, attend: Attend
) -> Iterator[Stage]:
    for index in range(config.n_layer):
        name = f"{prefix}.layers.{index}"
        with torch.device("meta"):
            block = Block(config)
        for module in checkpoint.iter_modules(f"{name}."):
            _load(block, checkpoint, module.name, device, child=module.name.removeprefix(f"{name}."))

        def run(x: Tensor, block: Block = block) -> Tensor:
            return block(x, table[: x.shape[1]], attend)

        yield Stage(name=name, module=block, run=run, subsets=BLOCK_SUBSETS)
        del block, run  # so that this block is gone before the next one is loaded


def _load(
    owner: nn.Module, checkpoint: Checkpoint, name: str, device: torch.device, child: str = "", itself: bool = False
) -> nn.Module:
    """Fill one submodule (by default the one of the name's last part) from the checkpoint, in bfloat16."""
    target = owner if itself else owner.get_submodule(child or name.rpartition(".")[2])
    for parameter in ("weight", "bias") if f"{name}.bias" in checkpoint.modules else ("weight",):
        weight = checkpoint.dense(f"{name}.bias" if parameter == "bias" else name, device, torch.bfloat16)
        setattr(target, parameter, nn.Parameter(weight, requires_grad=False))
    return owner
