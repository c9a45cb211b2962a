"""How linears are cut up: by rule, and by the table that was measured."""

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
    from s2quant.runtime.kernels.weights import Shape
    from tools.speed.linears import table

    weight = weight_of("w4", 6144, 2560, False)
    row = {"key": list(shapes.key_of(weight, 1)), "shape": [8, 1, 2, 1]}
    text = table([row], "a device")
    scope: dict = {}
    exec(compile(text, "tuned.py", "exec"), scope)
    assert scope["TABLE"] == {("w4", 6144, 2560, False, 1): (8, 1, 2, 1)} and "a device" in scope["__doc__"]
    best = Shape(warps=8, tiles=1, depth=2, columns=1)
    monkeypatch.setitem(shapes.TUNED, shapes.key_of(weight, 1), best)
    assert shapes.shape_for(weight, 1) == best != shapes.rule(weight, 1)


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
