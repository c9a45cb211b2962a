"""A frame of the fast decoder out of few, large kernels; what `FastDecoder` runs where `fused_obstacle` has none.

Legend: B rows, N codebooks, D width, H query heads, h head width.

Per layer five launches: wqkv; attention; wo, which adds to the hidden vector and prepares the next norm; w1 and w3,
gated; w2, which does as wo does. A norm is no launch: its weight is multiplied in where the vector is made, the root
mean square where it is used. Act order is none either: who makes a vector writes it in the order of the linear that
reads it. The hidden vector stays in float32 and is never rounded; everything that is multiplied is bf16.

With B rows the first pass of the Fast AR has 2 B: the hidden vectors, then the semantic codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.model import Block, DualAR
from s2quant.runtime.cache import KVCache
from s2quant.runtime.fused_weights import (
    DENSE_OUTPUTS,
    FusedStack,
    PlacedLinear,
    dense_linear,
    fused_layer,
    residual_head,
)

if TYPE_CHECKING:
    from s2quant.runtime.fast import FrameState
    from s2quant.runtime.kernels.attention import Layer, Scratch
    from s2quant.runtime.kernels.choice import Plan
    from s2quant.runtime.kernels.launch import How
    from s2quant.runtime.kernels.weights import Then


class FusedFrame:
    """The kernels' view of a model, and the vectors between them.

    Args:
        model: A model that `fused_obstacle` does not refuse; packed w1 and w3 are replaced by their pair, in place,
            which computes the same.
        num_slots: B at most.
        residual_size: Entries of a residual codebook.
        max_context: Positions at most.
        how: How kernels are launched; None: as measured to be fastest.
    """

    def __init__(
        self, model: DualAR, num_slots: int, residual_size: int, max_context: int, how: How | None = None
    ) -> None:
        from s2quant.runtime.kernels.attention import Scratch, num_splits
        from s2quant.runtime.kernels.choice import padded_rows
        from s2quant.runtime.kernels.launch import MEASURED, MEASURED_DENSE
        from s2quant.runtime.triton_linear import TritonLinear

        is_dense = not any(isinstance(module, TritonLinear) for module in model.modules())
        self.model, self.config = model, model.config
        self.how = how or (MEASURED_DENSE if is_dense else MEASURED)
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
            self.slow = FusedStack(
                layers=[fused_layer(block) for block in _blocks(slow.layers)],
                head=dense_linear(head, out_features=self.num_semantic + 1),
                norm=slow.norm.weight.detach(),
                eps=config.norm_eps,
                hidden=torch.zeros(rows, config.dim, device=device),
                qkv=torch.zeros(rows, config.qkv_dim, device=device),
            )
            self.fast = FusedStack(
                layers=[fused_layer(block) for block in _blocks(fast.layers)],
                head=residual_head(fast.output, residual_size),
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
            self.parts = torch.empty(self._most_parts(2 * num_slots), device=device)
            self.fast_positions = torch.arange(model.config.num_codebooks, device=device)
            self.scratch = [
                Scratch.make(num_slots, part.n_head, part.n_local_heads, part.head_dim, num_splits(most), device)
                for part, most in zip(both, (max_context, model.config.num_codebooks), strict=True)
            ]

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
            layer = self._attention_layer(self.slow, number, caches[0], table, batch)
            squares = self._block(
                0, number, batch, squares, [(layer, state.positions, 0)], (batch, context), self.scratch[0]
            )
        self._head(self.slow, self.x, batch, squares, self.logits)
        self._semantic(state, batch, squares)
        for code in range(1, self.config.num_codebooks):
            rows = 2 * batch if code == 1 else batch
            squares = self.begun[:rows]
            for number in range(len(self.fast.layers)):
                layer = self._attention_layer(self.fast, number, caches[1], fast_table, rows)
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

    def _squares(self, which: int, rows: int, linear: PlacedLinear) -> Tensor:
        """Give room for the sums of squares that a linear leaves, one per program and row."""
        from s2quant.runtime.kernels.choice import num_sums

        parts = num_sums(linear.weight, self._plan(linear, rows))
        return self.squares[which][: rows * parts].view(rows, parts)

    def _most_parts(self, rows: int) -> int:
        """Count the numbers that linears of up to so many rows leave to be added up."""
        from s2quant.runtime.kernels.choice import num_parts

        linears = [self.slow.head, self.fast.head]
        for layer in (*self.slow.layers, *self.fast.layers):
            linears += [layer.qkv, layer.out, layer.pair, layer.down]
        sizes = {min(rows, 32), rows}  # what is cut up in another way
        return max(num_parts(linear.weight, self._plan(linear, size), size) for linear in linears for size in sizes)

    def _place(self, linear: PlacedLinear, rows: int) -> Tensor | None:
        """Say where a linear wants its inputs."""
        from s2quant.runtime.kernels.choice import is_many

        return linear.many_place if is_many(rows, self.how) else linear.place

    def _attention_layer(self, stack: FusedStack, number: int, cache: KVCache, table: Tensor, rows: int) -> Layer:
        from s2quant.runtime.kernels.attention import Layer

        layer = stack.layers[number]
        return Layer(
            keys=cache.keys[number],
            values=cache.values[number],
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=layer.qk_eps,
            table=table,
            place=self._place(layer.out, rows),
        )

    def _multiply(self, linear: PlacedLinear, x: Tensor, rows: int, then: Then) -> None:
        from s2quant.runtime.kernels import choice

        choice.multiply(linear.weight, x, rows, then, self._plan(linear, rows), self.how, parts=self.parts)

    def _plan(self, linear: PlacedLinear, rows: int) -> Plan:
        from s2quant.runtime.kernels.choice import plan_for

        return plan_for(linear.weight, rows, self.how)

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
        from s2quant.runtime.kernels.weights import Then

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
            place=self._place(layer.pair, rows),
            hidden=stack.hidden,
            norm=layer.ffn_norm,
            squares_out=between,
        )
        self._multiply(layer.out, heads, rows, then)
        then = Then(
            epilogue="gate",
            out=middle,
            place=self._place(layer.down, rows),
            squares_in=between,
            eps=stack.eps,
        )
        self._multiply(layer.pair, self.gate_x, rows, then)
        after = self._squares(0, rows, layer.down)
        then = Then(
            epilogue="residual",
            out=self.x,
            place=self._place(stack.head, sizes[0]) if last else self._place(stack.layers[number + 1].qkv, rows),
            hidden=stack.hidden,
            norm=stack.norm if last else stack.layers[number + 1].attention_norm,
            squares_out=after,
        )
        self._multiply(layer.down, middle, rows, then)
        return after

    def _head(self, stack: FusedStack, x: Tensor, rows: int, squares: Tensor, out: Tensor) -> None:
        from s2quant.runtime.kernels.weights import Then

        self._multiply(stack.head, x, rows, Then(epilogue="store", out=out, squares_in=squares, eps=stack.eps))

    def _embed(self, state: FrameState, batch: int) -> None:
        from s2quant.runtime.kernels import steps

        slow, config = self.model.slow, self.config
        first = self.slow.layers[0]
        place = self._place(first.qkv, batch)
        steps.embed_kernel[(batch,)](
            state.columns,
            slow.embeddings.weight,
            slow.codebook_embeddings.weight,
            first.attention_norm,
            self.x if place is None else place,
            self.slow.hidden,
            self.x,
            self.begun,
            config.semantic_begin_id,
            config.semantic_end_id,
            config.codebook_size,
            float(config.num_codebooks + 1) ** 0.5,
            **steps.vector_arguments(config.slow.dim, place),
            BLOCK=_power_of_two(config.slow.dim),
            CODEBOOKS=config.num_codebooks,
            **steps.options(False, 8),
        )

    def _semantic(self, state: FrameState, batch: int, squares: Tensor) -> None:
        from s2quant.runtime.kernels import steps

        config, first = self.config, self.fast.layers[0]
        place = self._place(first.qkv, 2 * batch)
        steps.semantic_kernel[(batch, 2)](
            self.logits,
            state.noise,
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
            self.x if place is None else place,
            self.fast.hidden,
            self.x,
            self.begun,
            squares.shape[1],
            batch,
            config.semantic_begin_id,
            config.im_end_id,
            C=self.num_semantic + 1,
            KEPT=state.noise.shape[1],
            NOISE=state.noise.shape[2],
            COLUMN=1 + config.num_codebooks,
            **steps.draw_arguments(self.num_semantic, self.how, steps.SEMANTIC_WARPS),
            **steps.swap_arguments(),
            **steps.vector_arguments(config.fast.dim, place),
            D_BLOCK=_power_of_two(config.fast.dim),
            MAX_SQUARES=_power_of_two(squares.shape[1]),
            **steps.options(self.how.early, steps.SEMANTIC_WARPS),
        )

    def _residual(self, state: FrameState, batch: int, code: int) -> None:
        from s2quant.runtime.kernels import steps

        config, first = self.config, self.fast.layers[0]
        place = self._place(first.qkv, batch)
        steps.residual_kernel[(batch,)](
            self.fast_logits,
            state.noise,
            state.temperature,
            state.top_p,
            state.top_k,
            state.first,
            state.draws,
            state.positions,
            state.columns,
            self.model.fast.embeddings.weight,
            first.attention_norm,
            self.x if place is None else place,
            self.fast.hidden,
            self.x,
            self.begun,
            code,
            R=self.residual_size,
            KEPT=state.noise.shape[1],
            NOISE=state.noise.shape[2],
            BEFORE=2 * (self.num_semantic + 1),
            CODEBOOKS=config.num_codebooks,
            **steps.draw_arguments(self.residual_size, self.how, steps.RESIDUAL_WARPS),
            LAST=code == config.num_codebooks - 1,
            **steps.vector_arguments(config.fast.dim, place),
            D_BLOCK=_power_of_two(config.fast.dim),
            **steps.options(self.how.early, steps.RESIDUAL_WARPS),
        )


def _blocks(layers: nn.ModuleList) -> list[Block]:
    return [block for block in layers if isinstance(block, Block)]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
