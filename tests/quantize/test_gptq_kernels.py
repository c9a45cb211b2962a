"""What GPTQ runs on a GPU, bit for bit against gptqmodel's own steps: in Triton's interpreter, or on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from s2quant.checkpoint.reader import open_checkpoint
from s2quant.errors import UserError
from s2quant.quantize import gptq as adapter
from s2quant.quantize import rows as rows_module
from s2quant.quantize import solver
from s2quant.quantize.factor import block_inverses, upper_factor
from s2quant.quantize.gptq import gptq_quantize
from s2quant.quantize.hessian import Hessian
from s2quant.quantize.loop import quantize_stages
from s2quant.quantize.outputs import output_squares
from s2quant.quantize.plan import make_plan
from s2quant.quantize.store import StageStore
from s2quant.recipe import LinearSettings, load_recipe

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INSIDE else "cpu"
WITH_TRITON = pytest.mark.skipif(
    not (INSIDE or HAS_GPU) or importlib.util.find_spec("triton") is None, reason="needs a GPU, or the interpreter"
)
pytestmark = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")


@pytest.mark.skipif(INSIDE, reason="this is the process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.fixture(autouse=True)
def wide_programs(monkeypatch):
    """Let a program of the interpreter, whose time is by operations, work on more rows than one of a GPU."""
    if INSIDE:
        from s2quant.quantize import kernels

        monkeypatch.setattr(kernels, "ROWS", 32)


def weights_of(rows, columns, seed=0):
    """Random weights with what a grid has to cope with: one-sided groups, empty ones, one alone that is large."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    weight[2] = 0
    weight[3, 5] = 3.0
    weight[4] = -0.0
    return weight


def matrix_of(columns, seed=0):
    x = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(seed + 1))
    x *= torch.arange(1, columns + 1).pow(-0.5)
    return x.T @ x / len(x)


def exact_factor(matrix):
    """The upper Cholesky factor of the inverse, of the matrix damped by 0.01, in float64."""
    damped = matrix.double() + 0.01 * torch.eye(len(matrix))
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


def gptq_of(rows, columns, bits, group_size):
    """Make gptqmodel's object, as the adapter does, and give it where its quantizer stands."""
    gptq_class, config_class = adapter._import_gptqmodel()
    config = config_class(bits=bits, group_size=group_size, desc_act=False, act_group_aware=False, sym=True)
    linear = torch.nn.Linear(columns, rows, bias=False)
    gptq = gptq_class(linear, config)
    gptq.quantizer.configure(perchannel=True)
    return gptq


def block_of(weight, factor, start, count, group_size, bits):
    """Run the kernel on the device; give scales, codes, differences, losses and the number of one-sided groups."""
    from s2quant.quantize import kernels

    rows, columns = weight.shape
    scales = torch.full((columns // group_size, rows), 5.0, device=DEVICE)
    codes = torch.full((rows, columns), 99, dtype=torch.uint8, device=DEVICE)
    differences, losses = torch.full((rows, 128), 7.0, device=DEVICE), torch.ones(rows, device=DEVICE)
    number, inside = torch.zeros((), dtype=torch.int64, device=DEVICE), slice(start, start + count)
    updated, inverse = torch.full((rows, 128), 9.0), torch.full((128, 128), 11.0)
    updated[:, :count], inverse[:count, :count] = weight[:, inside], factor[inside, inside]
    first = weight + 1  # what the weights were before the blocks before this one changed them
    kernels.quantize_block(
        first.to(DEVICE), updated.to(DEVICE), inverse.to(DEVICE), scales, codes, differences, losses, number,
        start, count, group_size, (1 << bits) - 1,
    )  # fmt: skip
    return scales.cpu(), codes.cpu(), differences.cpu(), losses.cpu(), int(number)


@WITH_TRITON
@pytest.mark.parametrize(
    ("bits", "group_size", "start", "count"),
    [(4, 32, 0, 128), (8, 16, 128, 64), (2, 32, 64, 96), (4, 128, 128, 128), (3, 64, 0, 128)],
)
def test_a_block_is_gptqmodels_loop(bits, group_size, start, count):
    """gptqmodel's own quantizer, column by column on the CPU, its scales mended."""
    rows, columns = 37, 256
    weight = weights_of(rows, columns)
    gptq, watch = gptq_of(rows, columns, bits, group_size), adapter._Watch()
    adapter._mend_one_sided(gptq.quantizer, watch)
    factor = exact_factor(matrix_of(columns)).float()
    work, wanted, grid = weight.clone(), torch.zeros(3, rows, count), torch.full((columns // group_size, rows), 5.0)
    for column in range(count):
        place = start + column
        if place % group_size == 0:
            gptq.quantizer.find_params(weight[:, place : place + group_size], weight=True)
            grid[place // group_size] = gptq.quantizer.scale.flatten()
        value, pivotal = work[:, place], factor[place, place]
        rounded = gptq.quantizer.quantize(value.unsqueeze(1)).flatten()
        residual = value - rounded
        wanted[0, :, column] = rounded
        wanted[1, :, column] = residual / pivotal
        wanted[2, :, column] = residual.square() / pivotal.square()
        work[:, place:] -= wanted[1, :, column].unsqueeze(1) * factor[place, place:]
    scales, codes, differences, losses, number = block_of(weight, factor, start, count, group_size, bits)
    inside = slice(start, start + count)
    assert torch.equal(scales, grid)  # those of other groups are left alone
    steps = codes[:, inside].float() - 2 ** (bits - 1)
    assert torch.equal(steps * scales.T.repeat_interleave(group_size, dim=1)[:, inside], wanted[0])
    assert bool((codes[:, :start] == 99).all()) and bool((codes[:, start + count :] == 99).all())
    assert torch.equal(differences[:, :count], (weight + 1)[:, inside] - wanted[0])
    assert bool((differences[:, count:] == 7).all())
    assert torch.allclose(losses, 1 + wanted[2].sum(dim=1), rtol=1e-5) and float(wanted[2].max()) > 0
    assert number == int(torch.stack(watch.one_sided).sum()) >= 1


@WITH_TRITON
def test_what_is_no_number_is_seen():
    """As with torch.clamp, it is not rounded to a code in silence."""
    weight = weights_of(8, 128)
    weight[5, 3] = float("nan")
    losses = block_of(weight, torch.eye(128), 0, 128, 128, 4)[3]
    assert losses.isnan().tolist() == [row == 5 for row in range(8)]


@pytest.mark.parametrize("n", [1, 5, 128, 300, 1500])
def test_the_factor_is_the_inverse_of_gptqs(n):
    matrix = matrix_of(n)
    factor, exact = upper_factor(matrix, 0.01), exact_factor(matrix)
    assert torch.equal(factor, factor.triu()) and float(factor.diagonal().min()) > 0
    assert float((factor.double() @ exact - torch.eye(n)).abs().max()) < 1e-4
    inverses, padded = block_inverses(factor, 128), torch.eye(-(-n // 128) * 128, dtype=torch.float64)
    padded[:n, :n] = exact
    blocks = torch.stack([padded[start : start + 128, start : start + 128] for start in range(0, n, 128)])
    assert inverses.shape == blocks.shape and torch.equal(inverses, inverses.triu())
    theirs = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(matrix + 0.01 * torch.eye(n))), upper=True
    )
    padded[:n, :n] = theirs.double()
    long_way = torch.stack([padded[start : start + 128, start : start + 128] for start in range(0, n, 128)])
    assert (inverses - blocks).norm() <= 1.1 * (long_way - blocks).norm() + 1e-6 * blocks.norm()  # not worse


def test_a_matrix_without_a_factor():
    assert upper_factor(-torch.eye(8), 0.01) is None


@WITH_TRITON
@pytest.mark.parametrize("columns", [128, 416])
def test_blocks_learn_of_those_before_as_by_gptqs_updates(columns):
    """Against GPTQ as it is written, in float64: each error is spread over all columns after it by the inverse."""
    weight, matrix = weights_of(40, columns), matrix_of(columns)
    settings = LinearSettings(desc_act=False, damp_percent=0.01 / float(matrix.diagonal().mean()))
    found = solver.solve(weight.to(DEVICE), solver._prepare(matrix.clone().to(DEVICE), settings), settings)
    factor, work, scales = exact_factor(matrix), weight.double(), found.scales.double().cpu()
    for column in range(columns):
        if column % 128 == 0:  # as gptqmodel has it, see gptq.py
            absmax = work[:, column : column + 128].unflatten(1, (-1, 32)).abs().amax(dim=2)
            ours = scales[:, column // 32 :][:, : absmax.shape[1]]
            torch.testing.assert_close(ours[absmax > 0], (2 * absmax / 15)[absmax > 0], rtol=1e-4, atol=0)
        scale, code = scales[:, column // 32], found.codes[:, column].double().cpu()
        place = (work[:, column] / scale + 8).clamp(0, 15)
        assert float((place - code).abs().max()) <= 0.5 + 1e-3, column  # the nearest, given the codes before it
        error = (work[:, column] - scale * (code - 8)) / factor[column, column]
        work[:, column:] -= error[:, None] * factor[column, column:]


ORDERS = {"desc_act": (True, False), "act_group_aware": (False, True), "natural": (False, False)}


def both_ways(weight, hessian, settings, monkeypatch):
    """Quantize by our solver, and by gptqmodel with its eager loops."""
    monkeypatch.setenv("GPTQMODEL_DISABLE_GPTQ_CUDA", "1")
    found = []
    for obstacle in (None, "off"):
        monkeypatch.setattr(adapter, "kernel_obstacle", lambda device, obstacle=obstacle: obstacle)
        found.append(gptq_quantize(weight, hessian, settings))
    return found


@WITH_TRITON
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dead", [False, True])
def test_whole_linears_are_gptqmodels(order, dead, monkeypatch):
    """The factor is rounded otherwise, so a weight between two codes may fall to either; three in a thousand may."""
    weight, x = weights_of(32, 320).to(DEVICE), torch.randn(1500, 320, generator=torch.Generator().manual_seed(3))
    x = (x * torch.randperm(320, generator=torch.Generator().manual_seed(4)).add(1).pow(-0.5)).to(DEVICE)
    x[:, 7] *= 0 if dead else 1
    hessian = Hessian(320, "wo")
    hessian.add(x)
    desc_act, act_group_aware = ORDERS[order]
    settings = LinearSettings(desc_act=desc_act, act_group_aware=act_group_aware)
    (ours, stats), (theirs, wanted) = both_ways(weight, hessian, settings, monkeypatch)
    assert torch.equal(ours.g_idx, theirs.g_idx) and torch.equal(ours.zeros, theirs.zeros)
    assert float((ours.codes == theirs.codes).float().mean()) > 0.997
    assert torch.allclose(ours.scales.float(), theirs.scales.float(), rtol=1e-2)
    assert stats.loss == pytest.approx(wanted.loss, rel=1e-3)
    assert (stats.num_dead, stats.num_one_sided) == (wanted.num_dead, wanted.num_one_sided)
    assert (stats.solver, wanted.solver) == ("s2quant", "gptqmodel")
    assert stats.num_dead == dead and stats.fallback is None and stats.damp_percent == 0.05
    if order == "desc_act":
        assert not torch.equal(ours.g_idx, ours.g_idx.sort().values)


@WITH_TRITON
def test_parts_of_a_linear_are_the_whole(monkeypatch):
    """Two halves, each by itself, in another order; also what is said of them."""
    for module in (adapter, rows_module):
        monkeypatch.setattr(module, "kernel_obstacle", lambda device: None)
    weight, hessian, settings = weights_of(96, 128).to(DEVICE), Hessian(128, "wo"), LinearSettings()
    hessian.add(torch.randn(512, 128, generator=torch.Generator().manual_seed(5)).to(DEVICE))
    ranges = rows_module.row_ranges(weight, alone=True)
    assert ranges == [slice(0, 32), slice(32, 96)]
    assert rows_module.row_ranges(weight, alone=False) == [slice(0, 96)]
    assert rows_module.row_ranges(weight[:56], alone=True) == [slice(0, 56)]
    held = torch.randn(50, 128, generator=torch.Generator().manual_seed(6)).to(DEVICE)

    def part(rows, quantize=gptq_quantize, more=(hessian, settings)):
        quantized, stats = quantize(weight[rows], *more)
        return rows_module.Part(
            weight=quantized, stats=stats, squares=output_squares(held, weight[rows], quantized, settings)
        )

    found = [part(rows) for rows in reversed(ranges)]
    both = rows_module.join_rows(found[::-1], weight, settings, "wo")
    joined, stats, squares = both.weight, both.stats, both.squares
    one = part(slice(None))
    whole, wanted = one.weight, one.stats
    for kind in ("whole", "ours", "nearest"):
        assert getattr(squares, kind) == pytest.approx(getattr(one.squares, kind), rel=1e-4), kind
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    assert stats.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert (stats.num_one_sided, stats.max_scale_error) == (wanted.num_one_sided, wanted.max_scale_error)
    rounded = part(ranges[1], adapter._without_gptq, (settings, "wo", False, "a reason", 512, 0))
    both = rows_module.join_rows([found[1], rounded], weight, settings, "wo")
    joined, stats = both.weight, both.stats
    assert both.squares.ours == both.squares.nearest == pytest.approx(squares.nearest, rel=1e-4)
    assert torch.equal(joined.codes, rows_module.rtn_quantize(weight, settings)[0].codes)
    assert stats.method == "rtn" and stats.fallback == "round-to-nearest: a reason" and stats.num_tokens == 512


@WITH_TRITON
def test_a_matrix_that_needs_more_damping_gets_gptqmodels(monkeypatch):
    monkeypatch.setattr(adapter, "kernel_obstacle", lambda device: None)
    hessian = Hessian(128, "wo")
    hessian.add(torch.randn(256, 128, generator=torch.Generator().manual_seed(6)).to(DEVICE))
    broken = hessian.matrix()
    broken.diagonal().sub_(1.2 * broken.diagonal().mean())
    monkeypatch.setattr(Hessian, "matrix", lambda self: broken.clone())
    _, stats = gptq_quantize(weights_of(16, 128).to(DEVICE), hessian, LinearSettings(), strict=False)
    assert stats.fallback is not None


@WITH_TRITON
def test_weights_that_all_become_zero_are_refused(monkeypatch):
    """Inputs that were always zero: GPTQ sets their weights to zero, and here that is all of them."""
    monkeypatch.setattr(adapter, "kernel_obstacle", lambda device: None)
    hessian = Hessian(128, "wo")
    hessian.add(torch.zeros(256, 128, device=DEVICE))
    with pytest.raises(UserError, match="every quantized weight is zero"):
        gptq_quantize(weights_of(16, 128).to(DEVICE), hessian, LinearSettings(), "wo")
    _, stats = gptq_quantize(weights_of(16, 128).to(DEVICE), hessian, LinearSettings(), strict=False)
    assert stats.fallback == "round-to-nearest: every quantized weight is zero" and stats.num_dead == 128
    _, stats = gptq_quantize(torch.zeros(16, 128, device=DEVICE), hessian, LinearSettings())
    assert stats.fallback is None and stats.method == "gptq"


@WITH_TRITON
def test_a_result_that_is_not_finite_is_refused(monkeypatch):
    monkeypatch.setattr(adapter, "kernel_obstacle", lambda device: None)
    monkeypatch.setattr(solver, "block_inverses", lambda upper, size: upper.new_full((1, size, size), float("inf")))
    hessian = Hessian(128, "wo")
    hessian.add(torch.randn(256, 128, generator=torch.Generator().manual_seed(6)).to(DEVICE))
    with pytest.raises(UserError, match="not finite"):
        gptq_quantize(weights_of(16, 128).to(DEVICE), hessian, LinearSettings())
    _, stats = gptq_quantize(weights_of(16, 128).to(DEVICE), hessian, LinearSettings(), strict=False)
    assert stats.method == "rtn" and "not finite" in stats.fallback


@WITH_TRITON
def test_kernels_are_warmed_up_for_every_group_size(monkeypatch):
    seen = []
    solve = adapter.solve

    def counted(weight, prepared, settings):
        seen.append(settings.group_size)
        return solve(weight, prepared, settings)

    monkeypatch.setattr(adapter, "solve", counted)
    device = torch.device(DEVICE)
    monkeypatch.setattr(adapter, "kernel_obstacle", lambda device: "none here")
    adapter.warm_up([LinearSettings()], device)
    assert seen == []
    monkeypatch.setattr(adapter, "kernel_obstacle", lambda device: None)
    adapter.warm_up([LinearSettings(), LinearSettings(bits=8, group_size=128), LinearSettings(bits=8)], device)
    assert seen == [32, 128]


@WITH_TRITON
def test_a_whole_stage_is_solved_by_ours(tmp_path, tiny_folder, monkeypatch):
    """Through the loop, with lone linears in two parts; against gptqmodel's on the CPU."""
    if not INSIDE:
        pytest.skip("the real size does that on a GPU")
    checkpoint = open_checkpoint(tiny_folder)
    rules = [{"quantize": "text_model.model.layers.0.{attention,feed_forward}.w*"}, {"keep": "**"}]
    recipe = {"name": "one-block", "rules": rules, "calibration": {"source": "x.jsonl"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    plan = make_plan(load_recipe(tmp_path / "recipe.yaml"), checkpoint.config)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(0, 400, (2, 11, 200), generator=generator), torch.ones(2, 200, dtype=torch.bool))
        for _ in range(3)
    ]
    found = []
    for obstacle in (None, "off"):
        for module in (adapter, rows_module):
            monkeypatch.setattr(module, "kernel_obstacle", lambda device, obstacle=obstacle: obstacle)
        store = StageStore.open(tmp_path / str(obstacle), {}, resume=False)
        found.append(quantize_stages(checkpoint, plan, batches, 1, store, torch.device("cpu")))
    assert [record["solver"] for record in found[0]] == ["s2quant"] * 5
    assert [record["solver"] for record in found[1]] == ["gptqmodel"] * 5
    for ours, theirs in zip(*found, strict=True):
        assert ours["output_error"] == pytest.approx(theirs["output_error"], rel=0.03), ours["module"]
        assert ours["output_error"] < ours["output_error_rtn"]


@WITH_TRITON
def test_linears_of_like_sizes_share_a_space_and_nothing_else(monkeypatch):
    """By one graph on a GPU, whose replays are played here: the bits of each alone, and none overwrites another's."""
    played = []

    class Played:
        def __init__(self, space):
            self.replay = lambda: (played.append(space), space._run())

    if INSIDE:
        monkeypatch.setattr(solver._Space, "_capture", lambda space, device: Played(space))
        monkeypatch.setattr(solver, "_space", lambda *key: solver._KEPT.get().setdefault(key, None) or kept(key))

    def kept(key):
        solver._KEPT.get()[key] = solver._Space(*key, is_kept=True)
        return solver._KEPT.get()[key]

    settings, cases = LinearSettings(), []
    for seed, rows in ((0, 16), (1, 16), (2, 8)):
        matrix = matrix_of(160, seed).to(DEVICE)
        cases.append((weights_of(rows, 160, seed).to(DEVICE), solver._prepare(matrix, settings), settings))
    with solver.spaces_kept():
        together = [solver.solve(*case) for case in cases]
        assert len(solver._KEPT.get()) == 2
    assert solver._KEPT.get() is None and (not INSIDE or len(played) == 3)
    monkeypatch.undo()
    for ours, case in zip(together, cases, strict=True):
        alone = solver.solve(*case)
        assert torch.equal(ours.codes, alone.codes) and torch.equal(ours.scales, alone.scales)
        assert (ours.loss, ours.num_one_sided, ours.is_lost) == (alone.loss, alone.num_one_sided, alone.is_lost)


@WITH_TRITON
def test_a_hessian_is_factored_once(monkeypatch):
    """For linears and widths that share it, until inputs are added or the settings differ."""
    made = []

    def counted(matrix, damping):
        made.append(len(matrix))
        return upper_factor(matrix, damping)

    monkeypatch.setattr(solver, "upper_factor", counted)
    monkeypatch.setattr(adapter, "kernel_obstacle", lambda device: None)
    hessian, x = Hessian(128, "wo"), torch.randn(256, 128, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    hessian.add(x)
    for bits in (4, 8):
        gptq_quantize(weights_of(16, 128).to(DEVICE), hessian, LinearSettings(bits=bits))
    assert made == [128]
    gptq_quantize(weights_of(16, 128).to(DEVICE), hessian, LinearSettings(damp_percent=0.1))
    hessian.add(x)
    gptq_quantize(weights_of(16, 128).to(DEVICE), hessian, LinearSettings(damp_percent=0.1))
    assert made == [128] * 3


@pytest.mark.skipif(INSIDE, reason="Triton interprets here")
@pytest.mark.parametrize("group_size", [16, 32, 128])
def test_compiled_nothing_is_fused_or_approximated(group_size):
    """For a GPU on a machine without one: else the bits would not be gptqmodel's."""
    triton = pytest.importorskip("triton")
    pytest.importorskip("triton.backends.nvidia")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from s2quant.quantize.kernels import ROWS, block_kernel
    from s2quant.quantize.solver import BLOCK

    names = block_kernel.arg_names
    sizes = {"GROUP": group_size, "BLOCK": BLOCK, "ROWS": ROWS}
    types = dict.fromkeys(names, "i32") | dict.fromkeys(("top", "middle"), "fp32") | dict.fromkeys(sizes, "constexpr")
    types |= dict.fromkeys(("weight", "updated", "inverse", "scales", "differences", "losses"), "*fp32")
    types |= {"codes": "*u8", "num_one_sided": "*i64"}
    source = ASTSource(fn=block_kernel, signature=types, constexprs=sizes)
    options = {"num_warps": ROWS, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "fma." not in ptx and "div.full" not in ptx and "div.approx" not in ptx
    assert ptx.count("div.rn.f32") >= 4
