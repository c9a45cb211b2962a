"""The model as stages that go on a device one by one; what flows through them is in `s2quant.quantize.stream`.

Legend: B batch, T positions, F frames, N codebooks, D width, E width of the Fast AR.

A stage is one transformer block, or the Fast AR's head. Its linears are visited in the order in which the input
of each depends on the ones before it: wqkv; wo; w1 and w3, which share an input; w2. The Slow AR comes first; its
normed output at the position before each frame starts the Fast AR, which is walked only if a recipe touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from s2quant.checkpoint.config import TransformerConfig
from s2quant.checkpoint.layout import FAST, SLOW
from s2quant.checkpoint.reader import Checkpoint
from s2quant.layers import RMSNorm, without_values
from s2quant.model import Attend, Block, Rotary, causal_attention, softmax_attention
from s2quant.quantize.copies import one_ahead

State = tuple[Tensor, ...]
"""What a batch is between two steps of a stage: [B, T, D] at its beginning."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Linears of a stage that share their input, and how a batch comes there.

    Args:
        linears: Relative names.
        enter: Takes a batch from the step before, whose linears it uses, to this one.
        inputs: Gives [..., K], the input of the linears, of a batch that is at this step.
    """

    linears: tuple[str, ...]
    enter: Callable[..., State]
    inputs: Callable[..., Tensor]


@dataclass(kw_only=True)
class Stage:
    """A part of the model that runs on its own, step by step.

    Args:
        name: Prefix of its modules on disk.
        module: Its weights, on the device.
        steps: In the order in which their inputs depend on one another.
        leave: Takes a batch from the last step to the end, [B, T, D] or what the stage gives.
    """

    name: str
    module: nn.Module
    steps: tuple[Step, ...]
    leave: Callable[..., Tensor]

    @property
    def subsets(self) -> tuple[tuple[str, ...], ...]:
        """Linears by step."""
        return tuple(step.linears for step in self.steps)

    def step_of(self, linear: str) -> int:
        """Find the step of a linear.

        Args:
            linear: Its relative name.

        Returns:
            The number of the step.
        """
        return next(number for number, step in enumerate(self.steps) if linear in step.linears)


def stage_of(module: str) -> str:
    """Name the stage that a linear is in.

    Args:
        module: Its name on disk.

    Returns:
        The stage's name.
    """
    parts = module.split(".")
    return ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else FAST


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


def slow_stages(checkpoint: Checkpoint, device: torch.device, length: int, last: str | None = None) -> Iterator[Stage]:
    """Go through the Slow AR's blocks, loading each when it is asked for.

    Args:
        checkpoint: The model.
        device: Where to work.
        length: The most positions of a sequence.
        last: The stage after which no other is asked for; None: all may be.

    Yields:
        One stage per block.
    """
    table = Rotary(checkpoint.config.slow).table(length, device)
    yield from _block_stages(checkpoint, SLOW, checkpoint.config.slow, device, table, causal_attention, last)


def fast_stages(checkpoint: Checkpoint, device: torch.device, last: str | None = None) -> Iterator[Stage]:
    """Go through the Fast AR's blocks and its head.

    Args:
        checkpoint: The model.
        device: Where to work.
        last: The stage after which no other is asked for; None: all may be.

    Yields:
        One stage per block, then the head.
    """
    config = checkpoint.config.fast
    table = Rotary(config).table(checkpoint.config.num_codebooks, device)
    yield from _block_stages(checkpoint, FAST, config, device, table, softmax_attention, last)
    with without_values():
        head = Head(config)
    for name in ("norm", "output"):
        load_into(head, checkpoint, f"{FAST}.{name}", device)
    step = Step(linears=("output",), enter=lambda x: (x,), inputs=head.norm)
    yield Stage(name=FAST, module=head, steps=(step,), leave=head)


def _block_stages(
    checkpoint: Checkpoint,
    prefix: str,
    config: TransformerConfig,
    device: torch.device,
    table: Tensor,
    attend: Attend,
    last: str | None,
) -> Iterator[Stage]:
    names = [f"{prefix}.layers.{index}" for index in range(config.n_layer)]
    if last in names:
        del names[names.index(last) + 1 :]  # or the next one would be loaded ahead
    blocks = one_ahead([partial(_load_block, checkpoint, name, config) for name in names], device)
    for name in names:
        yield _block_stage(name, cast(Block, next(blocks)), table, attend)


def _load_block(checkpoint: Checkpoint, name: str, config: TransformerConfig) -> Block:
    with without_values():
        block = Block(config)
    for module in checkpoint.iter_modules(f"{name}."):
        load_into(block, checkpoint, module.name, torch.device("cpu"), child=module.name.removeprefix(f"{name}."))
    return block


def _block_stage(name: str, block: Block, table: Tensor, attend: Attend) -> Stage:
    """Take a block apart, as `Block.forward` puts it together."""
    attention, feed_forward = block.attention, block.feed_forward

    def norm(x: Tensor) -> State:
        return x, block.attention_norm(x)

    def mix(x: Tensor, y: Tensor) -> State:
        return x, attention.mixed(y, table[: x.shape[1]], attend)

    def add(x: Tensor, y: Tensor) -> State:
        x = x + attention.wo(y)
        return x, block.ffn_norm(x)

    def gate(x: Tensor, y: Tensor) -> State:
        return x, feed_forward.gated(y)

    def second(_: Tensor, y: Tensor) -> Tensor:
        return y

    steps = (
        Step(linears=("attention.wqkv",), enter=norm, inputs=second),
        Step(linears=("attention.wo",), enter=mix, inputs=second),
        Step(linears=("feed_forward.w1", "feed_forward.w3"), enter=add, inputs=second),
        Step(linears=("feed_forward.w2",), enter=gate, inputs=second),
    )
    return Stage(name=name, module=block, steps=steps, leave=lambda x, y: x + feed_forward.w2(y))


def load_into(
    owner: nn.Module, checkpoint: Checkpoint, name: str, device: torch.device, child: str = "", itself: bool = False
) -> nn.Module:
    """Fill one submodule from the checkpoint, in bfloat16.

    Args:
        owner: What it is in.
        checkpoint: The model.
        name: The submodule's, on disk.
        device: Where to put its weights.
        child: Its name within the owner; by default the last part of the one on disk.
        itself: Whether it is the owner.

    Returns:
        The owner.
    """
    target = owner if itself else owner.get_submodule(child or name.rpartition(".")[2])
    for parameter in ("weight", "bias") if f"{name}.bias" in checkpoint.modules else ("weight",):
        weight = checkpoint.dense(f"{name}.bias" if parameter == "bias" else name, device, torch.bfloat16)
        setattr(target, parameter, nn.Parameter(weight, requires_grad=False))
    return owner
