"""The generated inner loops, run instruction by instruction on a machine made for it, against plain PyTorch."""

from dataclasses import replace

import numpy as np
import pytest
import runtime_cases as cases
import torch
from layout_cases import matrix_of
from ptx_machine import LANES, Warp

from s2quant.runtime.kernels.layout import first_outputs, layout_obstacle, pack, pair
from s2quant.runtime.kernels.ptx import STEP, Body, ask, multiply, num_registers
from s2quant.runtime.kernels.ptx_sums import exchange, num_values, reduce


def bytes_of(tensor):
    return tensor.contiguous().view(torch.uint8).flatten().numpy()


def product(body, first, second, x, tile, steps_of, rows_apart, num_rows=8):
    """Add up what the warps of a program make of a tile: float32 [16 tiles, 8 columns]."""
    parts = [bytes_of(first), bytes_of(second), bytes_of(x)]
    starts = [0, len(parts[0]), len(parts[0]) + len(parts[1])]
    memory = np.concatenate(parts)
    lane = np.arange(LANES, dtype=np.uint64)
    g, t = lane // np.uint64(4), lane % np.uint64(4)
    total = np.zeros((16 * body.tiles, 8 * body.columns), dtype=np.float64)
    all_steps = body.in_features // STEP[body.kind]
    shared = np.full(body.held_bytes // 4, np.nan, np.float32)
    for start in range(0, all_steps, steps_of):
        if body.kind != "bf16":
            at = tile * all_steps + start
            weight = starts[0] + at * {"w4": 1024, "w8": 2048}[body.kind] + lane * np.uint64(16)
            other = starts[1] + (at * 8 + g) * np.uint64(4 * (128 // body.group_size))
        else:
            offset = (tile * (8 if body.gated else 16) + g) * np.uint64(2 * body.in_features) + t * np.uint64(16)
            weight = starts[0] + offset + np.uint64(128 * start)
            other = (starts[1] if body.gated else rows_apart) + offset + np.uint64(128 * start)
        inputs = starts[2] + (g * np.uint64(body.in_features) + t * np.uint64(8)) * np.uint64(2)
        inputs = inputs + np.uint64(2 * STEP[body.kind] * start)
        steps = np.full(LANES, min(steps_of, all_steps - start), dtype=np.uint32)
        if body.holding:
            inputs = starts[2] + np.uint64(2 * STEP[body.kind] * start) + np.uint64(16) * lane
        warp, count = Warp(memory, shared), num_registers(body)
        asked = warp.run(ask(body)[0], {count: weight, count + 1: other, count + 2: steps})
        sums = body.num_outputs
        given = {sums + number: asked[number] for number in range(count)}
        given |= {sums + count: weight, sums + count + 1: other, sums + count + 2: inputs, sums + count + 3: steps}
        given[sums + count + 4] = (np.int32(num_rows) - g.astype(np.int32)).view(np.uint32)
        if body.holding:
            given[sums + count + 4] = (lane + np.uint64(LANES * start // steps_of)).astype(np.uint32)
        result = warp.run(multiply(body)[0], given)
        for number in range(sums):
            r, c, part = number // (4 * body.columns), number // 4 % body.columns, number % 4
            rows = 16 * r + lane.astype(int) // 4 + 8 * (part // 2)
            columns = 8 * c + 2 * (lane.astype(int) % 4) + part % 2
            np.add.at(total, (rows, columns), result[number].astype(np.float64))
    return torch.from_numpy(total)


def wanted_steps(in_features, kind, warps):
    return -(-in_features // STEP[kind] // warps)


def x_of(columns, in_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8 * columns, in_features, generator=generator).bfloat16()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(
    ("in_features", "warps", "depth", "tiles", "columns"),
    [(256, 1, 2, 1, 1), (384, 1, 2, 1, 1), (640, 2, 2, 1, 2), (512, 2, 1, 2, 1), (256, 1, 2, 2, 4), (640, 1, 5, 1, 1)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_weights(bits, group_size, in_features, warps, depth, tiles, columns, dtype):
    weight = cases.quantized_weight(16 * (tiles + 1), in_features, group_size, bits=bits, seed=in_features)
    packed = pack(weight)
    steps = wanted_steps(in_features, packed.kind, warps)
    body = Body(
        kind=packed.kind, in_features=in_features, tiles=tiles, columns=columns, depth=depth, num_steps=steps,
        exact=in_features // 128 % warps == 0 and steps % depth == 0, group_size=group_size,
        bf16_scales=dtype == torch.bfloat16,
    )  # fmt: skip
    scales = packed.scales.to(dtype)
    x = x_of(columns, in_features)
    ours = product(body, packed.words, scales, x, 1, steps, 0)
    matrix = matrix_of(type(packed)(**{**vars(packed), "scales": scales}))[16:]
    exact = matrix.double() @ x.double().T
    assert (ours - exact).abs().max() < 2e-5 * exact.abs().max()


@pytest.mark.parametrize(
    ("in_features", "warps", "depth", "tiles", "columns", "gated"),
    [(128, 1, 2, 1, 1, False), (320, 2, 2, 1, 1, True), (256, 2, 1, 2, 2, False), (192, 1, 2, 2, 4, True)],
)
def test_bf16_weights(in_features, warps, depth, tiles, columns, gated):
    generator = torch.Generator().manual_seed(in_features)
    rows = 16 * (tiles + 1)
    first, second = (torch.randn(rows, in_features, generator=generator).bfloat16() for _ in range(2))
    steps = wanted_steps(in_features, "bf16", warps)
    body = Body(
        kind="bf16", in_features=in_features, tiles=tiles, columns=columns, depth=depth, num_steps=steps,
        exact=in_features // 64 % warps == 0 and steps % depth == 0, gated=gated,
    )  # fmt: skip
    x = x_of(columns, in_features)
    ours = product(body, first, second, x, 1, steps, 16 * in_features)
    if gated:
        both = torch.stack([first.unflatten(0, (-1, 8)), second.unflatten(0, (-1, 8))], dim=1)
        exact = both[1 : 1 + tiles].flatten(0, 2).double() @ x.double().T
    else:
        exact = first[16:].double() @ x.double().T
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("kind", "gated"), [("w4", False), ("w8", False), ("bf16", False), ("bf16", True)])
@pytest.mark.parametrize(
    ("in_features", "warps", "depth"), [(256, 1, 2), (640, 2, 2), (1280, 2, 5), (512, 2, 1), (1408, 3, 2), (128, 1, 1)]
)
def test_a_row_held_in_shared_memory_is_the_same_row(kind, gated, in_features, warps, depth):
    steps = wanted_steps(in_features, kind, warps)
    body = Body(
        kind=kind, in_features=in_features, depth=depth, num_steps=steps, live_rows=True, gated=gated,
        exact=in_features // STEP[kind] % warps == 0 and steps % min(depth, steps) == 0,
    )  # fmt: skip
    if kind == "bf16":
        generator = torch.Generator().manual_seed(in_features)
        first, second = (torch.randn(32, in_features, generator=generator).bfloat16() for _ in range(2))
    else:
        packed = pack(cases.quantized_weight(32, in_features, 32, bits=4 if kind == "w4" else 8, seed=in_features))
        first, second = packed.words, packed.scales
    x = x_of(1, in_features)
    x[1:] = float("nan")  # only the first row may be read
    given = (first, second, x, 1, steps, 16 * in_features, 1)
    read, held = (product(replace(body, holding=number), *given) for number in (0, warps))
    assert torch.equal(read, held) and read[:, 0].abs().min() > 0 and (read[:, 1:] == 0).all()
    assert replace(body, holding=warps).held_bytes % 16 == 0


@pytest.mark.parametrize(
    ("warps", "tiles", "columns"), [(8, 1, 1), (4, 1, 2), (16, 2, 2), (2, 1, 1), (1, 2, 1), (8, 2, 4)]
)
def test_warps_are_added_up(warps, tiles, columns):
    body = Body(kind="w4", in_features=256, tiles=tiles, columns=columns)
    pairs, values, threads = tiles * columns, num_values(warps), 32 * warps
    sums = torch.randn(warps, 4 * pairs, LANES, generator=torch.Generator().manual_seed(warps))
    lane, exact = torch.arange(LANES), torch.zeros(pairs, 8, 16)
    for place in range(pairs):
        for j in range(4):
            exact[place, 2 * (lane % 4) + j % 2, lane // 4 + 8 * (j // 2)] = sums[:, 4 * place + j].sum(0)
    shared, machines, running = np.full(16384 // 4, np.nan, np.float32), [], []
    for warp in range(warps):
        given = {pairs * values + n: sums[warp, n].numpy() for n in range(4 * pairs)}
        given[pairs * values + 4 * pairs] = (np.arange(LANES) + LANES * warp).astype(np.uint32)
        machines.append(Warp(np.zeros(4, np.uint8), shared))
        running.append(machines[-1].phases(reduce(body, warps)[0], given))
    met = [[next(phases, None) for phases in running] for _ in range(1 + 2 * pairs)]
    assert all(len(set(places)) == 1 for places in met) and met[-1][0] is None
    for number in range(pairs * values):
        found = np.concatenate([machine.results()[number] for machine in machines])
        n = (number % values * threads + np.arange(threads)) % 128
        torch.testing.assert_close(torch.from_numpy(found), exact[number // values].flatten()[n])
    assert (met[1][0] is None) == (pairs * warps * 608 <= 16384)


def test_lanes_exchange():
    x = np.arange(LANES, dtype=np.float32)
    assert (Warp(None).run(exchange((8,), add=False), {1: x})[0] == (np.arange(LANES) ^ 8)).all()
    sums = Warp(None).run(exchange((1, 2, 4, 8)), {1: x})[0]
    assert (sums == np.repeat([x[:16].sum(), x[16:].sum()], 16)).all()


def test_weights_are_asked_for_before_the_kernel_before_is_waited_for():
    for kind in STEP:
        body = Body(kind=kind, in_features=640, num_steps=5, depth=5)
        lines = ask(body)[0].splitlines()
        loads = [number for number, line in enumerate(lines) if line.startswith("ld.")]
        assert len(loads) == {"w4": 15, "w8": 25, "bf16": 20}[kind]
        assert max(loads) < lines.index("griddepcontrol.wait;")
        assert not any(".nc" in line for line in lines)  # ptxas moves those behind the wait
        assert any(line.startswith("ld.global.v4") for line in multiply(body)[0].splitlines())  # x


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(48, 256, 32), (40, 384, 128), (64, 128, 64)])
def test_the_layout_holds_the_weight(bits, out_features, in_features, group_size):
    weight = cases.quantized_weight(out_features, in_features, group_size, bits=bits, seed=3)
    if bits == 8:
        weight.codes[:2, :256] = torch.arange(in_features).to(torch.uint8)[:256]  # every code there is
    packed = pack(weight)
    assert torch.equal(matrix_of(packed), weight.dequantize()[:, packed.order])
    inverse = torch.empty_like(packed.order)
    inverse[packed.order] = torch.arange(in_features)
    assert torch.equal(packed.place.long(), inverse)


def test_natural_order_needs_no_gather():
    packed = pack(cases.quantized_weight(16, 128, shuffled=False))
    assert packed.order is None and packed.place is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("out_features", [8, 24, 32])
def test_a_pair_holds_eight_outputs_of_each(bits, out_features):
    first, second = (cases.quantized_weight(out_features, 256, bits=bits, seed=seed) for seed in (1, 2))
    second = type(second)(**{**vars(second), "g_idx": first.g_idx})
    both = [pack(weight) for weight in (first, second)]
    found = matrix_of(pair(*both)).unflatten(0, (-1, 2, 8))
    for part, one in zip(found.unbind(1), both, strict=True):
        assert torch.equal(part.flatten(0, 1), matrix_of(one))


@pytest.mark.parametrize("kind", ["w4", "w8", "bf16"])
@pytest.mark.parametrize(("in_features", "warps", "depth"), [(256, 1, 2), (640, 2, 2)])
@pytest.mark.parametrize("rows", [1, 3])
def test_only_rows_that_exist_are_read(kind, in_features, warps, depth, rows):
    weight = cases.quantized_weight(16, in_features, bits=8 if kind == "w8" else 4)
    packed, steps = pack(weight), wanted_steps(in_features, kind, warps)
    matrix = matrix_of(packed).bfloat16()
    first, second = (matrix, matrix[8:]) if kind == "bf16" else (packed.words, packed.scales)
    body = Body(
        kind=kind, in_features=in_features, depth=min(depth, steps), num_steps=steps, live_rows=True,
        exact=in_features // STEP[kind] % warps == 0 and steps % depth == 0,
    )  # fmt: skip
    x = x_of(1, in_features)
    x[rows:] = float("nan")
    ours = product(body, first, second, x, 0, steps, 16 * in_features, rows)
    exact = (matrix if kind == "bf16" else matrix_of(packed)).double() @ x[:rows].double().T
    assert (ours[:, :rows] - exact).abs().max() < 2e-5 * exact.abs().max()
    assert not ours[:, rows:].any()


@pytest.mark.parametrize("code", [0, 1, 127, 128, 129, 254, 255])
def test_eight_bits_are_exact(code):
    weight = cases.quantized_weight(16, 128, 128, bits=8)
    weight.codes.fill_(code)
    weight.scales.fill_(1)
    packed = pack(weight)
    body = Body(kind="w8", in_features=128, num_steps=1, depth=1, group_size=128)
    x = torch.zeros(8, 128, dtype=torch.bfloat16)
    x[:, 37] = 1
    assert (product(body, packed.words, packed.scales, x, 0, 1, 0) == code - 128).all()


def test_the_first_outputs_alone():
    packed = pack(cases.quantized_weight(64, 256, bits=8, seed=5))
    assert torch.equal(matrix_of(first_outputs(packed, 32)), matrix_of(packed)[:32])


def test_what_the_layout_cannot_hold_is_named():
    for weight, reason in (
        (cases.quantized_weight(16, 192), "192 inputs, not a multiple of 128"),
        (cases.quantized_weight(16, 256, bits=2), "2 bits, not 4 or 8"),
        (cases.quantized_weight(16, 256, group_size=256), "group size 256, not 32, 64 or 128"),
        (cases.quantized_weight(12, 256), "12 outputs, not a multiple of 8"),
    ):
        assert layout_obstacle(weight) == reason
    assert layout_obstacle(cases.quantized_weight(16, 256)) is None
