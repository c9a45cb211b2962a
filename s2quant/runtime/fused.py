"""A frame of the fast decoder out of few, large kernels; what `FastDecoder` runs where `fused_obstacle` has none.

Legend: B rows, N codebooks, D width, H query heads, h head width.

Per layer five launches: wqkv; attention; wo, which adds to the hidden vector and prepares the next norm; w1 and w3,
gated; w2, which does as wo does. A norm is no launch: its weight is multiplied in where the vector is made, the root
mean square where it is used. Act order is none either: who makes a vector writes it in the order of the linear that
reads it. The hidden vector stays in float32 and is never rounded; everything that is multiplied is bf16.

With B rows the first pass of the Fast AR has 2 B: the hidden vectors, then the semantic codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.model import Block, DualAR
from s2quant.runtime.cache import KVCache
from s2quant.runtime.triton_linear import PairedFeedForward, TritonLinear, triton_obstacle

if TYPE_CHECKING:
    from s2quant.runtime.fast import FrameState
    from s2quant.runtime.kernels.attention import Layer, Scratch
    from s2quant.runtime.kernels.launch import How
    from s2quant.runtime.kernels.linear import Shape, Then, Weight

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
class _Linear:
    """A weight, and where its inputs stand."""

    weight: Weight
    place: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """One block's weights."""

    qkv: _Linear
    out: _Linear
    pair: _Linear
    down: _Linear
    attention_norm: Tensor
    ffn_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qk_eps: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stack:
    """One transformer."""

    layers: list[_Layer]
    head: _Linear
    norm: Tensor
    eps: float
    hidden: Tensor
    qkv: Tensor


def _linear(module: nn.Module) -> _Linear:
    from s2quant.runtime.kernels.linear import Weight

    if isinstance(module, TritonLinear):
        return _Linear(weight=Weight.of(module.packed), place=module.packed.place)
    assert isinstance(module, nn.Linear), module
    return _dense(module.weight.detach())


def _dense(weight: Tensor, second: Tensor | None = None, out_features: int | None = None) -> _Linear:
    from s2quant.runtime.kernels.linear import Weight

    rows = len(weight) if out_features is None else out_features
    return _Linear(
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


def _residual_head(output: nn.Module, residual_size: int) -> _Linear:
    """Give the rows of the Fast AR's head that the codec has entries for."""
    from s2quant.runtime.kernels.layout import first_outputs
    from s2quant.runtime.kernels.linear import Weight

    if isinstance(output, TritonLinear):
        packed = first_outputs(output.packed, residual_size)
        return _Linear(weight=Weight.of(packed), place=packed.place)
    assert isinstance(output, nn.Linear), output
    return _dense(output.weight.detach()[:residual_size])


def _pair(block: Block) -> _Linear:
    """Give w1 and w3 as one gated weight; packed ones are replaced by their pair in the model too."""
    from s2quant.runtime.kernels.layout import pair
    from s2quant.runtime.kernels.linear import Weight

    gate: nn.Module = block.feed_forward
    if not isinstance(gate, PairedFeedForward):
        first, second = block.feed_forward.w1, block.feed_forward.w3
        if isinstance(first, nn.Linear):
            return _dense(first.weight.detach(), second.weight.detach())
        assert isinstance(first, TritonLinear) and isinstance(second, TritonLinear)
        gate = PairedFeedForward(TritonLinear(pair(first.packed, second.packed)), block.feed_forward.w2)
        block.feed_forward = gate
    packed = gate.pair.packed
    return _Linear(weight=Weight.of(packed, gated=True), place=packed.place)


def _layer(block: Block) -> _Layer:
    attention = block.attention
    norms = [None if norm is None else norm.weight.detach() for norm in (attention.q_norm, attention.k_norm)]
    eps = 0.0 if attention.q_norm is None or attention.q_norm.eps is None else attention.q_norm.eps
    return _Layer(
        qkv=_linear(attention.wqkv),
        out=_linear(attention.wo),
        pair=_pair(block),
        down=_linear(block.feed_forward.w2),
        attention_norm=block.attention_norm.weight.detach(),
        ffn_norm=block.ffn_norm.weight.detach(),
        q_norm=norms[0],
        k_norm=norms[1],
        qk_eps=eps,
    )


class FusedFrame:
    """The kernels' view of a model, and the vectors between them.

    Args:
        model: A model that `fused_obstacle` does not refuse; packed w1 and w3 are replaced by their pair, in place,
            which computes the same.
        num_slots: B at most.
        residual_size: Entries of a residual codebook.
        max_context: Positions at most.
        how: How kernels are launched; None: early, and with all that makes them faster.
    """

    def __init__(
        self, model: DualAR, num_slots: int, residual_size: int, max_context: int, how: How | None = None
    ) -> None:
        from s2quant.runtime.kernels.attention import Scratch, num_splits
        from s2quant.runtime.kernels.launch import EARLY
        from s2quant.runtime.kernels.linear import padded_rows

        self.model, self.config, self.how = model, model.config, EARLY if how is None else how
        self.residual_size = residual_size
        slow, fast = model.slow, model.fast
        config, device = model.config.slow, slow.embeddings.weight.device
        self.device = device
        begin, end, im_end = (
            model.config.semantic_begin_id,
            model.config.semantic_end_id,
            model.config.im_end_id,
        )
        self.num_semantic = end - begin + 1
        rows = 2 * padded_rows(2 * num_slots)
        with torch.inference_mode(False), torch.no_grad():
            head = torch.cat([slow.embeddings.weight[begin : end + 1], slow.embeddings.weight[im_end : im_end + 1]])
            head = F.pad(head, (0, 0, 0, -len(head) % DENSE_OUTPUTS)).contiguous()  # 4097 rows, padded to whole tiles
            self.slow = _Stack(
                layers=[_layer(block) for block in _blocks(slow.layers)],
                head=_dense(head, out_features=self.num_semantic + 1),
                norm=slow.norm.weight.detach(),
                eps=config.norm_eps,
                hidden=torch.zeros(rows, config.dim, device=device),
                qkv=torch.zeros(rows, config.qkv_dim, device=device),
            )
            self.fast = _Stack(
                layers=[_layer(block) for block in _blocks(fast.layers)],
                head=_residual_head(fast.output, residual_size),
                norm=fast.norm.weight.detach(),
                eps=model.config.fast.norm_eps,
                hidden=torch.zeros(rows, model.config.fast.dim, device=device),
                qkv=torch.zeros(rows, model.config.fast.qkv_dim, device=device),
            )
            both = (model.config.slow, model.config.fast)

            def vectors(width: int) -> Tensor:
                return torch.zeros(rows, width, dtype=torch.bfloat16, device=device)

            self.x = vectors(config.dim)  # of wqkv and the heads
            self.gate_x = vectors(config.dim)
            self.heads = [vectors(part.n_head * part.head_dim) for part in both]
            self.middle = [vectors(part.intermediate_size) for part in both]
            self.logits = torch.zeros(rows, self.num_semantic + 1, device=device)
            self.fast_logits = torch.zeros(rows, residual_size, device=device)
            tiles = max(layer.out.weight.num_tiles for layer in (*self.slow.layers, *self.fast.layers))
            self.squares = [torch.zeros(rows * tiles, device=device) for _ in range(2)]
            self.begun = torch.zeros(rows, 1, device=device)  # the same of vectors that were looked up
            self.fast_positions = torch.arange(model.config.num_codebooks, device=device)
            self.scratch = [
                Scratch.make(num_slots, part.n_head, part.n_local_heads, part.head_dim, num_splits(most), device)
                for part, most in zip(both, (max_context, model.config.num_codebooks), strict=True)
            ]

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Name all weights, for reports.

        Yields:
            Name and weight.
        """
        for name, stack in (("slow", self.slow), ("fast", self.fast)):
            for number, layer in enumerate(stack.layers):
                for part in ("qkv", "out", "pair", "down"):
                    yield f"{name}.{number}.{part}", getattr(layer, part).weight
            yield f"{name}.head", stack.head.weight

    def run(self, state: FrameState, caches: tuple[KVCache, KVCache], table: Tensor, batch: int, context: int) -> None:
        """Feed each of the first slots its column and draw the next one, in place.

        Args:
            state: The slots' state.
            caches: Of the Slow AR and of the Fast AR.
            table: bf16 [P, h/2, 2], the Slow AR's rotary rows, `context` of them or more.
            batch: B.
            context: Positions looked at; a row that is further on stays inside.
        """
        fast_table = self.model.fast.rotary.table(self.config.num_codebooks, self.device)
        self._embed(state, batch)
        squares = self.begun[:batch]
        for number in range(len(self.slow.layers)):
            layer = self._attention_layer(self.slow, number, caches[0], table)
            squares = self._block(
                0, number, batch, squares, [(layer, state.positions, 0)], (batch, context), self.scratch[0]
            )
        self._head(self.slow, self.x, batch, squares, self.logits)
        self._semantic(state, batch, squares)
        for code in range(1, self.config.num_codebooks):
            rows = 2 * batch if code == 1 else batch
            squares = self.begun[:rows]
            for number in range(len(self.fast.layers)):
                layer = self._attention_layer(self.fast, number, caches[1], fast_table)
                where = [(layer, self.fast_positions[code : code + 1], rows - batch)]
                if code == 1:
                    where.insert(0, (layer, self.fast_positions[:1], 0))
                squares = self._block(
                    1, number, rows, squares, where, (batch, self.config.num_codebooks), self.scratch[1]
                )
            skipped = rows - batch
            self._head(self.fast, self.x[skipped:], batch, squares[skipped:], self.fast_logits)
            self._residual(state, batch, code)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _squares(self, which: int, rows: int, linear: _Linear) -> Tensor:
        """Give room for the sums of squares that a linear leaves, one per program and row."""
        parts = linear.weight.num_tiles // self._shape(linear, rows).tiles
        return self.squares[which][: rows * parts].view(rows, parts)

    def _attention_layer(self, stack: _Stack, number: int, cache: KVCache, table: Tensor) -> Layer:
        from s2quant.runtime.kernels.attention import Layer

        layer = stack.layers[number]
        return Layer(
            keys=cache.keys[number],
            values=cache.values[number],
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=layer.qk_eps,
            table=table,
            place=layer.out.place,
        )

    def _multiply(self, linear: _Linear, x: Tensor, rows: int, then: Then) -> None:
        from s2quant.runtime.kernels import linear as kernels

        kernels.linear(linear.weight, x, rows, then, self._shape(linear, rows), self.how)

    def _shape(self, linear: _Linear, rows: int) -> Shape:
        from s2quant.runtime.kernels.linear import columns_for
        from s2quant.runtime.kernels.shapes import shape_for

        return shape_for(linear.weight, columns_for(rows), self.how.narrow)

    def _block(
        self,
        which: int,
        number: int,
        rows: int,
        squares: Tensor,
        where: list[tuple[Layer, Tensor, int]],
        sizes: tuple[int, int],
        scratch: Scratch,
    ) -> Tensor:
        """Run one block; float32 [rows, S], the partial sums of squares of the result."""
        from s2quant.runtime.kernels.attention import attention
        from s2quant.runtime.kernels.linear import Then

        stack = (self.slow, self.fast)[which]
        layer, last = stack.layers[number], number == len(stack.layers) - 1
        heads, middle = self.heads[which], self.middle[which]
        then = Then(epilogue="store", out=stack.qkv, squares_in=squares, eps=stack.eps)
        self._multiply(layer.qkv, self.x, rows, then)
        for attended, positions, first_row in where:
            attention(
                attended,
                stack.qkv,
                positions,
                heads,
                scratch,
                batch=sizes[0],
                first_row=first_row,
                context=sizes[1],
                how=self.how,
            )
        between = self._squares(1, rows, layer.out)
        then = Then(
            epilogue="residual",
            out=self.gate_x,
            place=layer.pair.place,
            hidden=stack.hidden,
            norm=layer.ffn_norm,
            squares_out=between,
        )
        self._multiply(layer.out, heads, rows, then)
        then = Then(
            epilogue="gate",
            out=middle,
            place=layer.down.place,
            squares_in=between,
            eps=stack.eps,
        )
        self._multiply(layer.pair, self.gate_x, rows, then)
        after = self._squares(0, rows, layer.down)
        then = Then(
            epilogue="residual",
            out=self.x,
            place=stack.head.place if last else stack.layers[number + 1].qkv.place,
            hidden=stack.hidden,
            norm=stack.norm if last else stack.layers[number + 1].attention_norm,
            squares_out=after,
        )
        self._multiply(layer.down, middle, rows, then)
        return after

    def _head(self, stack: _Stack, x: Tensor, rows: int, squares: Tensor, out: Tensor) -> None:
        from s2quant.runtime.kernels.linear import Then

        self._multiply(stack.head, x, rows, Then(epilogue="store", out=out, squares_in=squares, eps=stack.eps))

    def _embed(self, state: FrameState, batch: int) -> None:
        from s2quant.runtime.kernels import steps

        slow, config = self.model.slow, self.config
        first = self.slow.layers[0]
        steps.embed_kernel[(batch,)](
            state.columns,
            slow.embeddings.weight,
            slow.codebook_embeddings.weight,
            first.attention_norm,
            self.x if first.qkv.place is None else first.qkv.place,
            self.slow.hidden,
            self.x,
            self.begun,
            config.semantic_begin_id,
            config.semantic_end_id,
            config.codebook_size,
            float(config.num_codebooks + 1) ** 0.5,
            **steps.vector_arguments(config.slow.dim, first.qkv.place),
            BLOCK=_power_of_two(config.slow.dim),
            CODEBOOKS=config.num_codebooks,
            **steps.options(False, 8),
        )

    def _semantic(self, state: FrameState, batch: int, squares: Tensor) -> None:
        from s2quant.runtime.kernels import steps

        config, first = self.config, self.fast.layers[0]
        steps.semantic_kernel[(batch,)](
            self.logits,
            state.uniform,
            state.temperature,
            state.top_p,
            state.top_k,
            state.ignore_end,
            state.windows,
            state.first,
            state.draws,
            state.columns,
            self.slow.hidden,
            squares,
            self.slow.norm,
            self.slow.eps,
            self.model.fast.embeddings.weight,
            first.attention_norm,
            self.x if first.qkv.place is None else first.qkv.place,
            self.fast.hidden,
            self.x,
            self.begun,
            squares.shape[1],
            batch,
            config.semantic_begin_id,
            config.im_end_id,
            C=self.num_semantic + 1,
            BLOCK=_power_of_two(self.num_semantic + 1),
            KEPT=state.uniform.shape[1],
            COLUMN=1 + config.num_codebooks,
            **steps.draw_arguments(),
            **steps.vector_arguments(config.fast.dim, first.qkv.place),
            D_BLOCK=_power_of_two(config.fast.dim),
            MAX_SQUARES=_power_of_two(squares.shape[1]),
            **steps.options(self.how.early, 8),
        )

    def _residual(self, state: FrameState, batch: int, code: int) -> None:
        from s2quant.runtime.kernels import steps

        config, first = self.config, self.fast.layers[0]
        steps.residual_kernel[(batch,)](
            self.fast_logits,
            state.uniform_fast,
            state.temperature,
            state.top_p,
            state.top_k,
            state.first,
            state.draws,
            state.positions,
            state.columns,
            self.model.fast.embeddings.weight,
            first.attention_norm,
            self.x if first.qkv.place is None else first.qkv.place,
            self.fast.hidden,
            self.x,
            self.begun,
            code,
            R=self.residual_size,
            BLOCK=_power_of_two(self.residual_size),
            KEPT=state.uniform.shape[1],
            CODEBOOKS=config.num_codebooks,
            SMALLEST=steps.draw_arguments()["SMALLEST"],
            LAST=code == config.num_codebooks - 1,
            **steps.vector_arguments(config.fast.dim, first.qkv.place),
            D_BLOCK=_power_of_two(config.fast.dim),
            **steps.options(self.how.early, 4),
        )


def _blocks(layers: nn.ModuleList) -> list[Block]:
    return [block for block in layers if isinstance(block, Block)]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
