"""Linears alone: right against float64, and microseconds per product with weights that are in no cache."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s2quant.packing import QuantizedWeight
from s2quant.runtime.kernels.layout import pack_w4, pair_w4, unpack_w4
from s2quant.runtime.kernels.linear import Shape, Then, Weight, columns_for, linear, padded_rows
from s2quant.runtime.kernels.shapes import candidates, key_of, rule, shape_for
from tools.speed.timing import captured, replayed

ROTATED_BYTES = 400 << 20  # of copies of a weight: several times the L2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One linear of the model: what it is called, its kind, sizes and what follows it."""

    name: str
    kind: str
    out_features: int
    in_features: int
    epilogue: str
    group_size: int = 32

    @property
    def gated(self) -> bool:
        return self.epilogue == "gate"


def cases(sizes: dict[str, int]) -> list[Case]:
    """List the linears of both transformers: W4A16 and bf16 blocks, bf16 heads."""
    dim, heads, middle = sizes["dim"], sizes["heads"], sizes["middle"]
    blocks = [
        ("wqkv", sizes["qkv"], dim, "store"),
        ("wo", dim, heads, "residual"),
        ("w1+w3", 2 * middle, dim, "gate"),
        ("w2", dim, middle, "residual"),
    ]
    found = [
        Case(name=name, kind=kind, out_features=n, in_features=k, epilogue=then)
        for kind in ("w4", "bf16")
        for name, n, k, then in blocks
    ]
    for name, n in (("head", sizes["semantic"] + 1), ("fast head", sizes["residual"])):
        found.append(Case(name=name, kind="bf16", out_features=n, in_features=dim, epilogue="store"))
    return found


def random_quantized(out_features: int, in_features: int, group_size: int, device: torch.device) -> QuantizedWeight:
    """Draw a 4-bit weight with a random act order."""
    groups = in_features // group_size
    unit = 1 / (8 * in_features**0.5)
    order = torch.randperm(in_features, device=device)
    return QuantizedWeight(
        codes=torch.randint(0, 16, (out_features, in_features), device=device, dtype=torch.uint8),
        scales=(unit * (0.5 + torch.rand(groups, out_features, device=device))).half(),
        zeros=torch.full((groups, out_features), 8, dtype=torch.uint8, device=device),
        g_idx=(torch.arange(in_features, device=device) // group_size)[order].int(),
        bits=4,
        group_size=group_size,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A weight for the kernels, the same as matrices (inputs in the kernel's order), and how to multiply plainly."""

    weight: Weight
    matrices: list[Tensor]


def make(case: Case, device: torch.device) -> Made:
    """Draw a weight."""
    halves = 2 if case.gated else 1
    rows = case.out_features // halves
    if case.kind == "w4":
        quantized = [random_quantized(rows, case.in_features, case.group_size, device) for _ in range(halves)]
        shared = quantized[0].g_idx
        packed = [pack_w4(QuantizedWeight(**{**vars(part), "g_idx": shared})) for part in quantized]
        whole = pair_w4(*packed) if case.gated else packed[0]
        weight = Weight(
            kind="w4",
            first=whole.words,
            second=whole.scales,
            out_features=whole.out_features,
            in_features=case.in_features,
            group_size=case.group_size,
            gated=case.gated,
        )
        return Made(weight=weight, matrices=[unpack_w4(part) for part in packed])
    padded = -(-rows // 16) * 16
    matrices = [torch.randn(padded, case.in_features, device=device) / case.in_features**0.5 for _ in range(halves)]
    stored = [matrix.bfloat16() for matrix in matrices]
    weight = Weight(
        kind="bf16",
        first=stored[0],
        second=stored[1] if case.gated else None,
        out_features=case.out_features,
        in_features=case.in_features,
        gated=case.gated,
    )
    return Made(weight=weight, matrices=[matrix[:rows].float() for matrix in stored])


def then_for(case: Case, weight: Weight, rows: int, shape: Shape, device: torch.device) -> Then:
    """Make what follows a linear, its outputs poisoned."""
    outputs = case.out_features // 2 if case.gated else case.out_features
    poison = float("nan")
    kind = torch.float32 if case.epilogue == "store" else torch.bfloat16
    scaled = case.epilogue != "residual"
    return Then(
        epilogue=case.epilogue,
        out=torch.full((rows, outputs), poison, dtype=kind, device=device),
        place=None if case.epilogue == "store" else torch.randperm(outputs, device=device).int(),
        squares_in=case.in_features * (0.5 + torch.rand(rows, 160, device=device)) / 160 if scaled else None,
        hidden=None if scaled else torch.randn(rows, outputs, device=device),
        norm=None if scaled else torch.rand(outputs, device=device).bfloat16(),
        squares_out=None if scaled else torch.full((rows, weight.num_tiles // shape.tiles), poison, device=device),
        eps=1e-6 if scaled else 0.0,
    )


def errors(case: Case, rows: int, device: torch.device, shape: Shape | None = None) -> dict[str, float]:
    """Compare a linear with float64; relative errors of all it writes."""
    made = make(case, device)
    shape = shape or shape_for(made.weight, columns_for(rows))
    x = torch.zeros(padded_rows(rows), case.in_features, dtype=torch.bfloat16, device=device)
    x[:rows] = torch.randn(rows, case.in_features, device=device)
    then = then_for(case, made.weight, rows, shape, device)
    before = None if then.hidden is None else then.hidden.double()
    synchronize(device)  # a kernel that starts early reads its weights before it waits
    linear(made.weight, x, rows, then, shape, early=True)
    exact = [x[:rows].double() @ matrix.double().T for matrix in made.matrices]
    if then.squares_in is not None:
        scale = (then.squares_in.double().sum(1) / case.in_features + 1e-6).rsqrt()[:, None]
        exact = [part * scale for part in exact]
    wanted = F.silu(exact[0]) * exact[1] if case.gated else exact[0]
    out = then.out if then.place is None else then.out[:, then.place.long()]
    found: dict[str, float] = {}
    if before is not None:
        wanted = wanted + before
        assert then.hidden is not None and then.squares_out is not None and then.norm is not None
        found["hidden"] = relative(then.hidden, wanted)
        found["squares"] = relative(then.squares_out.sum(1), wanted.square().sum(1))
        wanted = wanted * then.norm.double()
    return found | {"out": relative(out, wanted)}


def synchronize(device: torch.device) -> None:
    """Wait for everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Give the relative error in the 2-norm; NaN where something was not written."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# ---- time -----------------------------------------------------------------------------------------------------


def copies(weight: Weight, total: int = ROTATED_BYTES) -> list[Weight]:
    """Copy a weight until nothing of it stays in a cache."""
    count = max(2, -(-total // weight.num_bytes))
    return [
        Weight(**{**vars(weight), "first": weight.first.clone(), "second": _clone(weight.second)}) for _ in range(count)
    ]


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def seconds_of(case: Case, weights: list[Weight], rows: int, shape: Shape, device: torch.device, early: bool) -> float:
    """Time one product, in a row of others with other weights."""
    x = torch.randn(padded_rows(rows), case.in_features, device=device).bfloat16()
    then = then_for(case, weights[0], rows, shape, device)
    if then.hidden is not None:
        then.hidden.zero_()

    def body() -> None:
        for weight in weights:
            linear(weight, x, rows, then, shape, early)

    if device.type != "cuda":
        started = time.perf_counter()
        linear(weights[0], x, rows, then, shape)
        return time.perf_counter() - started
    return replayed(captured(body)) / len(weights)


def cublas_seconds(case: Case, made: Made, rows: int, device: torch.device) -> float:
    """Time the same product in bf16 by cuBLAS."""
    matrix = torch.cat([part.bfloat16() for part in made.matrices])
    count = max(2, -(-ROTATED_BYTES // (2 * matrix.numel())))
    weights = [matrix.clone() for _ in range(count)]
    x = torch.randn(rows, case.in_features, device=device).bfloat16()
    return replayed(captured(lambda: [F.linear(x, weight) for weight in weights])) / count


def tinygemm_seconds(case: Case, rows: int, device: torch.device) -> float:
    """Time the same product by torch's own int4 kernel."""
    from s2quant.runtime.linears import Int4Linear

    weight = random_quantized(case.out_features, case.in_features, case.group_size, device)
    one = Int4Linear(weight)
    count = max(2, -(-ROTATED_BYTES // (one.packed.numel() * one.packed.element_size())))
    packed = [one.packed.clone() for _ in range(count)]
    x = torch.randn(rows, case.in_features, device=device).bfloat16()
    kernel = torch.ops.aten._weight_int4pack_mm

    def body() -> None:
        for words in packed:
            kernel(x, words, case.group_size, one.scales_and_zeros)

    return replayed(captured(body)) / count


# ---- tuning ---------------------------------------------------------------------------------------------------


def compile_one(case: Case, rows: int, shape: Shape) -> None:
    """Compile one shape into Triton's cache; run in a process of its own."""
    device = torch.device("cuda")
    first = torch.empty(16, dtype=torch.int32 if case.kind == "w4" else torch.bfloat16, device=device)
    second = torch.empty(16, dtype=torch.half if case.kind == "w4" else torch.bfloat16, device=device)
    weight = Weight(
        kind=case.kind,
        first=first,
        second=second if case.kind == "w4" or case.gated else None,
        out_features=case.out_features,
        in_features=case.in_features,
        group_size=case.group_size,
        gated=case.gated,
    )
    x = torch.empty(padded_rows(rows), case.in_features, dtype=torch.bfloat16, device=device)
    then = then_for(case, weight, rows, shape, device)
    linear(weight, x, rows, then, shape, True, launch=False)


def jobs(case: Case, rows: int, every: bool) -> Iterator[tuple[Case, int, Shape]]:
    """List what will need compiled: every shape worth trying, or the one in use."""
    kind = Weight(
        kind=case.kind,
        first=torch.empty(0),
        second=None,
        out_features=case.out_features,
        in_features=case.in_features,
        group_size=case.group_size,
        gated=case.gated,
    )
    columns = columns_for(rows)
    for shape in candidates(kind, columns) if every else [shape_for(kind, columns)]:
        yield case, rows, shape


def compile_all(wanted: list[tuple[Case, int, Shape]], workers: int, until: float) -> int:
    """Compile in parallel processes; the number of those that could not be."""
    context = multiprocessing.get_context("spawn")
    failed = 0
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(compile_one, *job) for job in wanted]
        for future in futures:
            try:
                future.result(timeout=max(1.0, until - time.perf_counter()))
            except Exception as error:  # noqa: BLE001 - one shape that cannot be compiled must not lose the rest
                failed += 1
                print(f"  not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
                if time.perf_counter() > until:
                    pool.shutdown(wait=False, cancel_futures=True)
                    break
    return failed


def tune(case: Case, rows: int, device: torch.device, until: float) -> dict[str, Any]:
    """Time every shape of one linear; those first in the list if the time is up."""
    made = make(case, device)
    weights = copies(made.weight)
    columns = columns_for(rows)
    found: list[tuple[float, Shape]] = []
    for shape in candidates(made.weight, columns):
        if found and time.perf_counter() > until:
            break
        try:
            found.append((seconds_of(case, weights, rows, shape, device, True), shape))
        except Exception as error:  # noqa: BLE001 - a shape that fails is a finding
            print(f"  {case.name} {shape}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    found.sort(key=lambda pair: pair[0])
    best = found[0]
    start = rule(made.weight, columns)
    first = [seconds for seconds, shape in found if shape == start]
    row = {
        "rows": rows,
        "key": list(key_of(made.weight, columns)),
        "us": 1e6 * best[0],
        "us_waiting": 1e6 * seconds_of(case, weights, rows, best[1], device, False),
        "us_rule": 1e6 * first[0] if first else None,
        "shape": _numbers(best[1]),
        "tried": [[round(1e6 * seconds, 2), *_numbers(shape)] for seconds, shape in found[:6]],
        "bytes": made.weight.num_bytes,
    }
    return row | {"best": best[1]}


def _numbers(shape: Shape) -> list[int]:
    return [shape.warps, shape.tiles, shape.depth, shape.columns]


def combinations(names: list[Case], rows: list[int]) -> list[tuple[Case, int]]:
    """Pair every case with every number of rows."""
    return list(itertools.product(names, rows))
