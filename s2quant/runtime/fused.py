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
from torch import Tensor

from s2quant.model import DualAR
from s2quant.runtime.cache import KVCache
from s2quant.runtime.fused_weights import FusedStack, PlacedLinear, Places, fast_stack, slow_stack

if TYPE_CHECKING:
    from s2quant.runtime.fast import FrameState
    from s2quant.runtime.kernels.attended import Layer, Scratch
    from s2quant.runtime.kernels.choice import Plan
    from s2quant.runtime.kernels.launch import How
    from s2quant.runtime.kernels.weights import Then

PROMPT_CONTEXT = 4096  # positions that `FusedFrame.read` looks at, at most


class FusedFrame:
    """The kernels' view of a model, and the vectors between them.

    Args:
        model: A model that `fused_obstacle` does not refuse; packed w1 and w3 are replaced by their pair, in place,
            which computes the same.
        num_slots: B at most.
        residual_size: Entries of a residual codebook.
        max_context: Positions at most.
        how: How kernels are launched; None: as measured to be fastest.
        prompt_rows: Positions of a prompt that `read` takes at most.
    """

    def __init__(
        self,
        model: DualAR,
        num_slots: int,
        residual_size: int,
        max_context: int,
        how: How | None = None,
        prompt_rows: int = 0,
    ) -> None:
        from s2quant.runtime.kernels.attended import Scratch
        from s2quant.runtime.kernels.attention import num_splits
        from s2quant.runtime.kernels.choice import padded_rows
        from s2quant.runtime.kernels.launch import measured

        self.model, self.config = model, model.config
        self._how_of = measured if how is None else lambda batch: how
        self.how = self._how_of(1)  # of the frame at hand
        self.residual_size = residual_size
        config, device = model.config.slow, model.slow.embeddings.weight.device
        self.device = device
        self.num_semantic = model.config.semantic_end_id - model.config.semantic_begin_id + 1
        rows = max(2 * padded_rows(2 * num_slots), padded_rows(prompt_rows))
        with torch.inference_mode(False), torch.no_grad():
            self.slow, self.fast = slow_stack(model, rows), fast_stack(model, residual_size, rows)
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
            self.parts = torch.empty(self._most_parts(max(2 * num_slots, prompt_rows)), device=device)
            self.fast_positions = torch.arange(model.config.num_codebooks, device=device)
            self.scratch = [
                Scratch.make(num_slots, part.n_head, part.n_local_heads, part.head_dim, num_splits(most), device)
                for part, most in zip(both, (max_context, model.config.num_codebooks), strict=True)
            ]
            self.prompt_rows, heads = prompt_rows, (config.n_head, config.n_local_heads, config.head_dim)
            self.prompt_context = min(max_context, PROMPT_CONTEXT)
            room = max((rows * self._prompt_splits(rows) for rows in range(1, prompt_rows + 1)), default=0)
            self.prompt_scratch = Scratch.make(prompt_rows, *heads, -(-room // max(1, prompt_rows)), device)

    def run(self, state: FrameState, caches: tuple[KVCache, KVCache], table: Tensor, batch: int, context: int) -> None:
        """Feed each of the first slots its column and draw the next one, in place.

        Args:
            state: The slots' state.
            caches: Of the Slow AR and of the Fast AR.
            table: bf16 [P, h/2, 2], the Slow AR's rotary rows, `context` of them or more.
            batch: B.
            context: Positions looked at; a row that is further on stays inside.
        """
        self.how = self._how_of(batch)
        fast_table = self.model.fast.rotary.table(self.config.num_codebooks, self.device)
        self._embed(state.columns, batch)
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

    def read(
        self, columns: Tensor, positions: Tensor, slots: Tensor, cache: KVCache, table: Tensor, context: int
    ) -> None:
        """Bring keys and values of a piece, of one prompt or of several, into their slots.

        Args:
            columns: int64 [T, 1+N], T at most `prompt_rows`; padding at the end.
            positions: int64 [T], rising within a slot; those behind the cache's end are padding.
            slots: int64 [T], whose they are; each holds the positions before.
            cache: Of the Slow AR.
            table: [P, h/2, 2], the Slow AR's rotary rows, for every position of the cache.
            context: Positions looked at; more than every position that is no padding, at most `prompt_context`.
        """
        from s2quant.runtime.kernels.pieces import keep
        from s2quant.runtime.kernels.weights import Then

        rows, squares = len(columns), self.begun[: len(columns)]
        assert rows <= self.prompt_rows and context <= self.prompt_context, (rows, context)
        self.how = self._how_of(1)
        scratch = self.prompt_scratch.cut(rows, self._prompt_splits(rows))
        self._embed(columns, rows)
        for number, layer in enumerate(self.slow.layers):
            attended = self._attention_layer(self.slow, number, cache, table, rows)
            if number == len(self.slow.layers) - 1:  # what comes after its keys and values, nobody reads
                then = Then(epilogue="store", out=self.slow.qkv, squares_in=squares, eps=self.slow.eps)
                self._multiply(layer.qkv, self.x, rows, then)
                keep(attended, self.slow.qkv, positions, slots, self.how)
            else:
                where = [(attended, positions, 0)]
                squares = self._block(0, number, rows, squares, where, (rows, context), scratch, slots)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _prompt_splits(self, rows: int) -> int:
        """Count the splits of the longest context for so many rows of a prompt."""
        from s2quant.runtime.kernels.attention import PIECE_ROWS, least_stretch, num_splits

        least = least_stretch(min(rows, PIECE_ROWS) * self.config.slow.n_local_heads, self._how_of(1))
        return num_splits(self.prompt_context, least)

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

    def _place(self, places: PlacedLinear | Places, rows: int) -> Tensor | None:
        """Say where a linear wants its inputs, or where outputs are written."""
        from s2quant.runtime.kernels.choice import is_many

        return places.many_place if is_many(rows, self.how) else places.place

    def _attention_layer(self, stack: FusedStack, number: int, cache: KVCache, table: Tensor, rows: int) -> Layer:
        from s2quant.runtime.kernels.attended import Layer

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

    def _multiply(self, linear: PlacedLinear, x: Tensor, rows: int, then: Then, finished: bool = True) -> None:
        from s2quant.runtime.kernels import choice

        plan = self._plan(linear, rows)
        choice.multiply(linear.weight, x, rows, then, plan, self.how, parts=self.parts, finished=finished)

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
        slots: Tensor | None = None,
    ) -> Tensor:
        """Run one block; float32 [rows, S], the partial sums of squares of the result."""
        from s2quant.runtime.kernels.attended import Parts
        from s2quant.runtime.kernels.attention import attention
        from s2quant.runtime.kernels.pieces import keep
        from s2quant.runtime.kernels.weights import Then

        stack = (self.slow, self.fast)[which]
        layer, last = stack.layers[number], number == len(stack.layers) - 1
        heads, middle = self.heads[which], self.middle[which]
        then = Then(epilogue="store", out=stack.qkv, squares_in=squares, eps=stack.eps)
        adds, qkv = slots is None and self.how.attention_adds, layer.qkv
        parts = Parts.of(self._plan(qkv, rows), rows, then, qkv.weight.in_features) if adds else None
        self._multiply(qkv, self.x, rows, then, parts is None)
        for attended, positions, first_row in where:
            if slots is not None:
                keep(attended, stack.qkv, positions, slots, self.how)
            attention(
                attended,
                stack.qkv if parts is None else self.parts,
                positions,
                heads,
                scratch,
                batch=sizes[0],
                first_row=first_row,
                context=sizes[1],
                how=self.how,
                slots=slots,
                parts=parts,
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
        place = self._place(layer.gated, rows)
        then = Then(epilogue="gate", out=middle, place=place, squares_in=between, eps=stack.eps)
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

    def _embed(self, columns: Tensor, batch: int) -> None:
        from s2quant.runtime.kernels import launch, steps

        slow, config = self.model.slow, self.config
        first = self.slow.layers[0]
        place = self._place(first.qkv, batch)
        launch.start(steps.embed_kernel, (batch,))(
            columns,
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
        from s2quant.runtime.kernels import launch, steps

        config, first = self.config, self.fast.layers[0]
        place = self._place(first.qkv, 2 * batch)
        launch.start(steps.semantic_kernel, (batch, 2))(
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
        from s2quant.runtime.kernels import launch, steps

        config, first = self.config, self.fast.layers[0]
        place = self._place(first.qkv, batch)
        launch.start(steps.residual_kernel, (batch,))(
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


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
