"""How linears are cut up: by rule, and by the table that was measured."""

from dataclasses import replace

import pytest
import torch

from s2quant.runtime.kernels.ptx import STEP

triton = pytest.importorskip("triton")

SIZES = [(6144, 2560, False), (2560, 4096, False), (19456, 2560, True), (2560, 9728, False), (1024, 2560, False)]


def weight_of(kind, out_features, in_features, gated):
    from s2quant.runtime.kernels.weights import Weight

    return Weight(
        kind=kind, first=torch.empty(0), second=None, out_features=out_features, in_features=in_features, gated=gated
    )


@pytest.mark.parametrize("kind", sorted(STEP))
@pytest.mark.parametrize("columns", [1, 2, 4, 8])
def test_every_size_is_cut_up(kind, columns):
    from s2quant.runtime.kernels.shapes import candidates, rule

    for size in SIZES:
        weight = weight_of(kind, *size)
        found = candidates(weight, columns)
        assert found[0] == rule(weight, columns) and len(set(found)) == len(found) > 1
        for shape in found:
            assert weight.num_tiles % shape.tiles == 0 and shape.columns <= columns
            assert 1 <= shape.depth <= -(-weight.in_features // STEP[kind] // shape.warps)
        assert rule(weight, columns).warps <= 8


def test_two_programs_of_the_longest_linear_share_an_sm():
    from s2quant.runtime.kernels.linear import SHARED_REGISTERS
    from s2quant.runtime.kernels.shapes import rule

    for kind in STEP:
        threads = 32 * rule(weight_of(kind, 2560, 9728, False), 1).warps
        assert 2 * threads * SHARED_REGISTERS <= 65536


def test_what_was_measured_comes_before_the_rule(monkeypatch):
    from s2quant.runtime.kernels import shapes
    from s2quant.runtime.kernels.weights import Block, Shape
    from tools.speed.linears import table

    weight = weight_of("w4", 6144, 2560, False)
    best, block = Shape(warps=8, tiles=1, depth=2, columns=1), Block(tiles=8, splits=3, stages=4, warps=4)
    text = table({shapes.key_of(weight, 1): best}, {shapes.key_of(weight, 64): block}, "a device")
    scope: dict = {}
    exec(compile(text, "tuned.py", "exec"), scope)
    assert scope["TABLE"] == {("w4", 6144, 2560, False, 1): (8, 1, 2, 1)} and "a device" in scope["__doc__"]
    assert scope["MANY"] == {("w4", 6144, 2560, False, 64): (8, 3, 4, 4)}
    monkeypatch.setitem(shapes.TUNED_MANY, shapes.key_of(weight, 64), block)
    assert shapes.block_for(weight, 64) == block != shapes.block_rule(weight)
    monkeypatch.setitem(shapes.TUNED, shapes.key_of(weight, 1), best)
    assert shapes.shape_for(weight, 1) == best != shapes.rule(weight, 1)


@pytest.mark.parametrize("kind", sorted(STEP))
def test_every_size_is_cut_up_for_many_rows(kind):
    from s2quant.runtime.kernels.shapes import TUNED_MANY, block_candidates, block_rule
    from s2quant.runtime.kernels.weights import TURN

    for size in SIZES:
        weight = weight_of(kind, *size)
        found = block_candidates(weight)
        assert found[0] == block_rule(weight) and len(set(found)) == len(found) > 1
        mine = [block for key, block in TUNED_MANY.items() if key[:4] == (kind, *size)]
        for block in [*found, *mine]:
            turns = -(-weight.in_features // TURN[kind] // block.splits)
            assert (block.splits - 1) * turns < weight.in_features // TURN[kind]  # none is left without a turn
            assert block.splits == 1 or not weight.gated
            assert block.tiles in (8, 16) and block.warps in (4, 8) and block.stages >= 2


def is_sound(key, shape):
    kind, out_features, in_features, gated, columns = key
    weight = weight_of(kind, out_features, in_features, gated)
    return weight.num_tiles % shape.tiles == 0 and 1 <= shape.columns <= columns and shape.depth >= 1


def test_the_committed_table_is_sound():
    from s2quant.runtime.kernels.shapes import TUNED
    from s2quant.runtime.kernels.weights import Shape

    key = ("w4", 6144, 2560, False, 1)  # the table may be empty: this is what a row is held to
    assert is_sound(key, Shape(warps=8, tiles=1, depth=2, columns=1))
    assert not is_sound(key, Shape(warps=8, tiles=5, depth=2, columns=1))
    assert not is_sound(key, Shape(warps=8, tiles=1, depth=2, columns=2))
    assert all(is_sound(*row) for row in TUNED.items())


@pytest.mark.parametrize("kind", sorted(STEP))
def test_what_a_program_holds_fits_beside_its_sums(kind):
    """The real size holds x; what is too wide reads it step by step, in place of a failure of ptxas."""
    from s2quant.runtime.kernels.linear import MOST_DECLARED, body_of
    from s2quant.runtime.kernels.ptx_sums import sum_bytes
    from s2quant.runtime.kernels.shapes import candidates, shape_for

    held = set()
    for in_features in range(2560, 40960, 1280):
        weight = weight_of(kind, 19456, in_features, True)
        for shape in (shape_for(weight, 1), *candidates(weight, 1), *candidates(weight, 4)):
            body = body_of(weight, shape, 1, live_rows=True, holding=True)
            assert body.held_bytes + sum_bytes(body, shape.warps) <= MOST_DECLARED
            wanted = replace(body, holding=shape.warps)
            fits = wanted.held_bytes + sum_bytes(wanted, shape.warps) <= MOST_DECLARED
            assert body.holding == (shape.warps if fits else 0)
            held.add((in_features, body.holding > 0))
    assert (2560, False) not in held and (39680, True) not in held


@pytest.mark.parametrize("batch", [1, 64])
def test_attention_is_launched_with_the_warps_and_blocks_that_are_asked_for(batch, monkeypatch):
    from s2quant.runtime.kernels import attention as module
    from s2quant.runtime.kernels.attended import Layer, Scratch
    from s2quant.runtime.kernels.launch import How

    launched = []
    monkeypatch.setattr(module, "start", lambda kernel, grid: lambda *values, **options: launched.append(options))
    cached = torch.empty(batch, 8, 512, 128, dtype=torch.bfloat16)
    layer = Layer(
        keys=cached, values=cached, q_norm=None, k_norm=None, eps=1e-6, table=torch.empty(512, 64, 2), place=None
    )
    scratch = Scratch.make(batch, 32, 8, 128, 8, torch.device("cpu"))
    for how in (How(), How(attention_warps=4, attention_stages=3)):
        module.attention(
            layer, torch.empty(batch, 48 * 128), torch.zeros(batch, dtype=torch.int64),
            torch.empty(batch, 4096, dtype=torch.bfloat16), scratch, batch=batch, first_row=0, context=512, how=how,
        )  # fmt: skip
    stages = (1, 1) if batch == 1 else (2, 3)  # few rows: a program has the one block that is asked for ahead
    found = [(options["num_warps"], options["num_stages"]) for options in launched]
    assert found == [(2, stages[0]), (4, stages[1])]
