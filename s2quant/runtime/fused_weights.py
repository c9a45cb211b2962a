"""The kernels' view of a model's weights, and what a model must be like to have one.

Legend: D width, N outputs, K inputs, H query heads, h head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.model import Block, DualAR
from s2quant.runtime.triton_linear import PairedFeedForward, TritonLinear, triton_obstacle

if TYPE_CHECKING:
    from s2quant.runtime.kernels.weights import Weight

DENSE_INPUTS, DENSE_OUTPUTS = 64, 16  # bf16 weights have multiples of these


def fused_obstacle(model: DualAR, residual_size: int) -> str | None:
    """Say why a model cannot be decoded by the fused frame.

    Args:
        model: The model, on its device.
        residual_size: Entries of a residual codebook.

    Returns:
        The reason, or None when it can.
    """
    weight = model.slow.embeddings.weight
    reason = triton_obstacle(weight.device)
    if reason:
        return reason
    if weight.dtype != torch.bfloat16:
        return f"a model in {weight.dtype}, not bfloat16"
    if not isinstance(model.fast.project_in, nn.Identity):
        return "a Fast AR of another width"
    if residual_size % DENSE_OUTPUTS:
        return f"residual codebooks of {residual_size} entries, not a multiple of {DENSE_OUTPUTS}"
    for config in (model.config.slow, model.config.fast):
        width = config.head_dim
        if width & (width - 1) or not 16 <= width <= 256:
            return f"a head width of {width}, not a power of two from 16 to 256"
        if config.n_head // config.n_local_heads > 16:
            return f"{config.n_head // config.n_local_heads} query heads that share keys, more than 16"
    for name, module in model.named_modules():
        reason = _linear_obstacle(module) or _gate_obstacle(module)
        if reason:
            return f"{name}: {reason}"
    return None


def frame_obstacle(model: DualAR, residual_size: int, fused: bool | None = None) -> str | None:
    """Say why frames are not made by our own kernels.

    Args:
        model: The model, on its device.
        residual_size: Entries of a residual codebook.
        fused: Whether they shall be; None: where they can on a GPU.

    Returns:
        The reason, or None when they are.
    """
    if fused is False:
        return "not wanted"
    reason = fused_obstacle(model, residual_size)
    if reason is None and fused is None and model.slow.embeddings.weight.device.type != "cuda":
        return "a CPU, where Triton only interprets"
    return reason


def _linear_obstacle(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        if module.bias is not None:
            return "a linear with a bias"
        if module.in_features % DENSE_INPUTS or module.out_features % DENSE_OUTPUTS:
            return (
                f"{module.in_features} inputs and {module.out_features} outputs, not multiples of "
                f"{DENSE_INPUTS} and {DENSE_OUTPUTS}"
            )
        return None
    backend = getattr(module, "backend", "triton")
    return None if backend == "triton" else f"a quantized linear of the backend {backend!r}"


def _gate_obstacle(module: nn.Module) -> str | None:
    if not hasattr(module, "w1"):
        return None
    first, second = module.w1, module.w3
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return None
    if isinstance(first, TritonLinear) and isinstance(second, TritonLinear):
        if (first.bits, first.group_size) != (second.bits, second.group_size):
            return "w1 and w3 of different bits or group sizes"
        orders = [linear.order for linear in (first, second)]
        if all(order is None for order in orders):
            return None
        if any(order is None for order in orders) or not torch.equal(orders[0], orders[1]):  # type: ignore[arg-type]
            return "w1 and w3 of different act orders"
        return None
    return "w1 and w3 of different kinds"


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """Where outputs are written, so that the next linear finds its inputs.

    Args:
        place: int32 [N], of each output; None: in order.
        many_place: The same where many rows are multiplied.
    """

    place: Tensor | None
    many_place: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedLinear:
    """A weight, and where its inputs stand.

    Args:
        weight: What the kernel reads.
        place: int32 [K], where each input stands in act order; None: in order.
        many_place: The same where many rows are multiplied.
    """

    weight: Weight
    place: Tensor | None
    many_place: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        from s2quant.runtime.kernels.layout import arranged_place

        weight = self.weight
        place = arranged_place(self.place, weight.kind, weight.in_features, weight.first.device)
        object.__setattr__(self, "many_place", place)


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedLayer:
    """One block's weights.

    Args:
        qkv: wqkv.
        out: wo.
        pair: w1 and w3, gated.
        gated: Where their outputs are written.
        down: w2.
        attention_norm: [D].
        ffn_norm: [D].
        q_norm: [h], or None.
        k_norm: [h], or None.
        qk_eps: Of both.
    """

    qkv: PlacedLinear
    out: PlacedLinear
    pair: PlacedLinear
    gated: Places
    down: PlacedLinear
    attention_norm: Tensor
    ffn_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qk_eps: float


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedStack:
    """One transformer.

    Args:
        layers: Its blocks.
        head: The linear behind the last norm.
        norm: [D], weight of the last norm.
        eps: Of the norms.
        hidden: float32 [rows, D], the hidden vectors, written in place.
        qkv: float32 [rows, (H + 2 KV heads) h], what attention reads where the product is whole.
    """

    layers: list[FusedLayer]
    head: PlacedLinear
    norm: Tensor
    eps: float
    hidden: Tensor
    qkv: Tensor


def _linear(module: nn.Module) -> PlacedLinear:
    from s2quant.runtime.kernels.weights import Weight

    if isinstance(module, TritonLinear):
        return PlacedLinear(weight=Weight.of(module.packed), place=module.packed.place)
    assert isinstance(module, nn.Linear), module
    return dense_linear(module.weight.detach())


def dense_linear(weight: Tensor, second: Tensor | None = None, out_features: int | None = None) -> PlacedLinear:
    """Give bf16 weights to the kernel.

    Args:
        weight: bf16 [N, K].
        second: bf16 [N, K], of a gated pair; None: there is none.
        out_features: Rows that count, where some only fill a tile.

    Returns:
        The linear, its inputs in order.
    """
    from s2quant.runtime.kernels.weights import Weight

    rows = len(weight) if out_features is None else out_features
    return PlacedLinear(
        weight=Weight(
            kind="bf16",
            first=weight.contiguous(),
            second=None if second is None else second.contiguous(),
            out_features=rows if second is None else 2 * rows,
            in_features=weight.shape[1],
            gated=second is not None,
        ),
        place=None,
    )


def residual_head(output: nn.Module, residual_size: int) -> PlacedLinear:
    """Give the rows of the Fast AR's head that the codec has entries for.

    Args:
        output: The head.
        residual_size: Entries of a residual codebook.

    Returns:
        The linear.
    """
    from s2quant.runtime.kernels.layout import first_outputs
    from s2quant.runtime.kernels.weights import Weight

    if isinstance(output, TritonLinear):
        packed = first_outputs(output.packed, residual_size)
        return PlacedLinear(weight=Weight.of(packed), place=packed.place)
    assert isinstance(output, nn.Linear), output
    return dense_linear(output.weight.detach()[:residual_size])


def _pair(block: Block, down: PlacedLinear) -> tuple[PlacedLinear, Places]:
    """Give w1 and w3 as one gated weight; packed ones are replaced by their pair in the model too.

    A packed pair has its outputs in the order in which w2 reads many rows: each written to a place of its own, two
    bytes at a time, they took a third of the product's time (docs/frame.md).
    """
    from s2quant.runtime.kernels.layout import arranged, pair, with_outputs
    from s2quant.runtime.kernels.weights import Weight

    gate: nn.Module = block.feed_forward
    if not isinstance(gate, PairedFeedForward):
        first, second = block.feed_forward.w1, block.feed_forward.w3
        if isinstance(first, nn.Linear):
            linear = dense_linear(first.weight.detach(), second.weight.detach())
            return linear, Places(place=down.place, many_place=down.many_place)
        assert isinstance(first, TritonLinear) and isinstance(second, TritonLinear)
        packed, place = pair(first.packed, second.packed), None
        if down.many_place is not None:
            place = down.many_place.long()
            packed = with_outputs(packed, torch.argsort(place))
        gate = PairedFeedForward(TritonLinear(packed), block.feed_forward.w2, place)
        block.feed_forward = gate
    packed = gate.pair.packed
    few: Tensor | None = None
    if gate.place is not None:
        few = arranged(torch.arange(down.weight.in_features, device=packed.words.device), down.weight.kind).int()
    pair_of = PlacedLinear(weight=Weight.of(packed, gated=True), place=packed.place)
    return pair_of, Places(place=few, many_place=None)


def fused_layer(block: Block) -> FusedLayer:
    """Give a block to the kernels; packed w1 and w3 are replaced by their pair in the model too.

    Args:
        block: The block.

    Returns:
        Its weights.
    """
    attention = block.attention
    norms = [None if norm is None else norm.weight.detach() for norm in (attention.q_norm, attention.k_norm)]
    eps = 0.0 if attention.q_norm is None or attention.q_norm.eps is None else attention.q_norm.eps
    down = _linear(block.feed_forward.w2)
    pair, gated = _pair(block, down)
    return FusedLayer(
        qkv=_linear(attention.wqkv),
        out=_linear(attention.wo),
        pair=pair,
        gated=gated,
        down=down,
        attention_norm=block.attention_norm.weight.detach(),
        ffn_norm=block.ffn_norm.weight.detach(),
        q_norm=norms[0],
        k_norm=norms[1],
        qk_eps=eps,
    )


def slow_stack(model: DualAR, rows: int) -> FusedStack:
    """Gather the Slow AR: its head has the rows of the semantic codes and of im_end, no others.

    Args:
        model: The model.
        rows: Of the vectors between its kernels.

    Returns:
        The stack.
    """
    slow, config, ids = model.slow, model.config.slow, model.config
    weight = slow.embeddings.weight
    begin, end, im_end = ids.semantic_begin_id, ids.semantic_end_id, ids.im_end_id
    head = torch.cat([weight[begin : end + 1], weight[im_end : im_end + 1]])
    count = len(head)
    head = F.pad(head, (0, 0, 0, -count % DENSE_OUTPUTS)).contiguous()  # 4097 rows, padded to whole tiles
    return FusedStack(
        layers=[fused_layer(block) for block in slow.layers if isinstance(block, Block)],
        head=dense_linear(head, out_features=count),
        norm=slow.norm.weight.detach(),
        eps=config.norm_eps,
        hidden=torch.zeros(rows, config.dim, device=weight.device),
        qkv=torch.zeros(rows, config.qkv_dim, device=weight.device),
    )


def fast_stack(model: DualAR, residual_size: int, rows: int) -> FusedStack:
    """Gather the Fast AR.

    Args:
        model: The model.
        residual_size: Entries of a residual codebook.
        rows: Of the vectors between its kernels.

    Returns:
        The stack.
    """
    fast, config = model.fast, model.config.fast
    device = model.slow.embeddings.weight.device
    return FusedStack(
        layers=[fused_layer(block) for block in fast.layers if isinstance(block, Block)],
        head=residual_head(fast.output, residual_size),
        norm=fast.norm.weight.detach(),
        eps=config.norm_eps,
        hidden=torch.zeros(rows, config.dim, device=device),
        qkv=torch.zeros(rows, config.qkv_dim, device=device),
    )
