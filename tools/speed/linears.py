"""Linears alone: right against float64, and microseconds per product with weights that are in no cache."""

from __future__ import annotations

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
from s2quant.runtime.kernels.choice import Plan, is_many, multiply, num_parts, num_sums, padded_rows, plan_for
from s2quant.runtime.kernels.launch import MEASURED, How
from s2quant.runtime.kernels.layout import arranged, pack, pair
from s2quant.runtime.kernels.linear import columns_for
from s2quant.runtime.kernels.many import rows_of
from s2quant.runtime.kernels.shapes import Key, block_candidates, candidates, key_of
from s2quant.runtime.kernels.weights import Block, Shape, Then, Weight
from tools.speed.timing import captured, replayed

ROTATED_BYTES = 400 << 20  # of copies of a weight: several times the L2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One linear of the model: what it is called, its kind, sizes, what follows it and what its input's norm needs."""

    name: str
    kind: str
    out_features: int
    in_features: int
    epilogue: str
    group_size: int = 32
    placed: bool = True
    num_squares: int = 160

    @property
    def gated(self) -> bool:
        return self.epilogue == "gate"


def cases(sizes: dict[str, int]) -> list[Case]:
    """List the linears of both transformers: blocks of 4 bits (group 32), 8 bits (group 128) and bf16, and heads."""
    dim, heads, middle = sizes["dim"], sizes["heads"], sizes["middle"]
    blocks = [
        ("wqkv", sizes["qkv"], dim, "store"),
        ("wo", dim, heads, "residual"),
        ("w1+w3", 2 * middle, dim, "gate"),
        ("w2", dim, middle, "residual"),
    ]
    found = [
        Case(name=name, kind=kind, out_features=n, in_features=k, epilogue=then, group_size=group_size)
        for kind, group_size in (("w4", 32), ("bf16", 32), ("w8", 128))
        for name, n, k, then in blocks
    ]
    heads_of = (("head", "bf16", sizes["semantic"] + 1), ("fast head", "bf16", sizes["residual"]))
    for name, kind, n in (*heads_of, ("fast head", "w8", sizes["residual"])):
        found.append(Case(name=name, kind=kind, out_features=n, in_features=dim, epilogue="store", group_size=128))
    return found


def random_quantized(
    out_features: int, in_features: int, group_size: int, device: torch.device, bits: int = 4
) -> QuantizedWeight:
    """Draw a weight with a random act order."""
    groups, middle = in_features // group_size, 2 ** (bits - 1)
    unit = 1 / (middle * in_features**0.5)
    order = torch.randperm(in_features, device=device)
    return QuantizedWeight(
        codes=torch.randint(0, 2 * middle, (out_features, in_features), device=device, dtype=torch.uint8),
        scales=(unit * (0.5 + torch.rand(groups, out_features, device=device))).half(),
        zeros=torch.full((groups, out_features), middle, dtype=torch.uint8, device=device),
        g_idx=(torch.arange(in_features, device=device) // group_size)[order].int(),
        bits=bits,
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
    if case.kind != "bf16":
        sizes = (rows, case.in_features, case.group_size, device, 4 if case.kind == "w4" else 8)
        drawn = [random_quantized(*sizes) for _ in range(halves)]
        quantized = [QuantizedWeight(**{**vars(part), "g_idx": drawn[0].g_idx}) for part in drawn]
        packed = [pack(part) for part in quantized]
        order = slice(None) if packed[0].order is None else packed[0].order
        weight = Weight.of(pair(*packed) if case.gated else packed[0], case.gated)
        return Made(weight=weight, matrices=[part.dequantize()[:, order] for part in quantized])
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


def then_for(case: Case, weight: Weight, rows: int, plan: Plan, device: torch.device) -> Then:
    """Make what follows a linear, its outputs poisoned."""
    outputs = case.out_features // 2 if case.gated else case.out_features
    poison = float("nan")
    kind = torch.float32 if case.epilogue == "store" else torch.bfloat16
    scaled, squares = case.epilogue != "residual", case.num_squares
    in_order = case.epilogue == "store" or (case.gated and case.kind != "bf16" and isinstance(plan, Block))
    return Then(
        epilogue=case.epilogue,
        out=torch.full((rows, outputs), poison, dtype=kind, device=device),
        place=torch.randperm(outputs, device=device).int() if case.placed and not in_order else None,
        squares_in=case.in_features * (0.5 + torch.rand(rows, squares, device=device)) / squares if scaled else None,
        hidden=None if scaled else torch.randn(rows, outputs, device=device),
        norm=None if scaled else torch.rand(outputs, device=device).bfloat16(),
        squares_out=None if scaled else torch.full((rows, num_sums(weight, plan)), poison, device=device),
        eps=1e-6 if scaled else 0.0,
    )


def errors(case: Case, rows: int, device: torch.device, how: How = MEASURED) -> dict[str, float]:
    """Compare a linear with float64, of the weights that are multiplied; relative errors of all it writes."""
    made = make(case, device)
    plan = plan_for(made.weight, rows, how)
    x = torch.zeros(padded_rows(rows), case.in_features, dtype=torch.bfloat16, device=device)
    x[:rows] = torch.randn(rows, case.in_features, device=device)
    then = then_for(case, made.weight, rows, plan, device)
    before = None if then.hidden is None else then.hidden.double()
    many = isinstance(plan, Block)
    ordered = arranged(x, case.kind) if many else x
    parts = torch.full((num_parts(made.weight, plan, rows),), float("nan"), device=device)
    synchronize(device)  # a kernel that starts early reads its weights before it waits
    multiply(made.weight, ordered, rows, then, plan, how, parts=parts)
    matrices = [matrix.bfloat16() if many else matrix for matrix in made.matrices]  # many rows: rounded once
    exact = [x[:rows].double() @ matrix.double().T for matrix in matrices]
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


def seconds_of(case: Case, weights: list[Weight], rows: int, plan: Plan, device: torch.device, how: How) -> float:
    """Time one product, in a row of others with other weights."""
    x = torch.randn(padded_rows(rows), case.in_features, device=device).bfloat16()
    then = then_for(case, weights[0], rows, plan, device)
    parts = torch.empty(num_parts(weights[0], plan, rows), device=device)
    if then.hidden is not None:
        then.hidden.zero_()

    def body() -> None:
        for weight in weights:
            multiply(weight, x, rows, then, plan, how, parts=parts)

    if device.type != "cuda":
        started = time.perf_counter()
        multiply(weights[0], x, rows, then, plan, how, parts=parts)
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


Job = tuple[Case, int, Plan, How]


def compile_one(case: Case, rows: int, plan: Plan, how: How) -> None:
    """Compile one plan into Triton's cache; run in a process of its own."""
    device = torch.device("cuda")
    packed = case.kind != "bf16"
    first = torch.empty(16, dtype=torch.int32 if packed else torch.bfloat16, device=device)
    second = torch.empty(16, dtype=torch.half if packed else torch.bfloat16, device=device)
    weight = Weight(
        kind=case.kind,
        first=first,
        second=second if packed or case.gated else None,
        out_features=case.out_features,
        in_features=case.in_features,
        group_size=case.group_size,
        gated=case.gated,
    )
    x = torch.empty(padded_rows(rows), case.in_features, dtype=torch.bfloat16, device=device)
    then = then_for(case, weight, rows, plan, device)
    multiply(weight, x, rows, then, plan, how, launch=False)


def weight_like(case: Case) -> Weight:
    """Give a weight of a case, without its numbers."""
    return Weight(
        kind=case.kind,
        first=torch.empty(0),
        second=None,
        out_features=case.out_features,
        in_features=case.in_features,
        group_size=case.group_size,
        gated=case.gated,
    )


def table_key(weight: Weight, plan: Plan, rows: int) -> Key:
    """Say where a plan for so many rows stands in its table."""
    return key_of(weight, rows_of(rows) if isinstance(plan, Block) else columns_for(rows))


def jobs(case: Case, rows: int, every: bool, how: How = MEASURED) -> Iterator[Job]:
    """List what will need compiled: every shape worth trying, or the one in use."""
    kind = weight_like(case)
    for plan in plans(kind, rows, how) if every else [plan_for(kind, rows, how)]:
        yield case, rows, plan, how


def plans(weight: Weight, rows: int, how: How) -> list[Plan]:
    """List the ways to cut a linear up that are worth trying, the rule's first."""
    return [*(block_candidates(weight) if is_many(rows, how) else candidates(weight, columns_for(rows)))]


def compile_all(wanted: list[Job], workers: int, until: float) -> set[Job]:
    """Compile in parallel processes; those that could not be, or not in time."""
    context = multiprocessing.get_context("spawn")
    failed: set[Job] = set()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {job: pool.submit(compile_one, *job) for job in dict.fromkeys(wanted)}
        for job, future in futures.items():
            left = until - time.perf_counter()
            if left <= 0 and not future.done():
                future.cancel()
                failed.add(job)
                continue
            try:
                future.result(timeout=max(0.1, left))
            except Exception as error:  # noqa: BLE001 - one shape that cannot be compiled must not lose the rest
                failed.add(job)
                print(f"  not compiled: {job[2]} {type(error).__name__}: {str(error)[:300]}", flush=True)
    return failed


def tune(
    case: Case,
    rows: int,
    device: torch.device,
    until: float,
    how: How,
    left_out: set[Job] = frozenset(),  # type: ignore[assignment]
) -> dict[str, Any]:
    """Time every plan of one linear but those left out; those first in the list if the time is up."""
    made = make(case, device)
    weights = copies(made.weight)
    found: list[tuple[float, Plan]] = []
    wanted = plans(made.weight, rows, how)
    for plan in wanted:
        if found and time.perf_counter() > until:
            break
        if (case, rows, plan, how) in left_out:
            continue
        try:
            found.append((seconds_of(case, weights, rows, plan, device, how), plan))
        except Exception as error:  # noqa: BLE001 - a plan that fails is a finding
            print(f"  {case.name} {plan}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    found.sort(key=lambda pair: pair[0])
    best = found[0]
    first = [seconds for seconds, plan in found if plan == wanted[0]]
    row = {
        "rows": rows,
        "key": list(table_key(made.weight, best[1], rows)),
        "us": 1e6 * best[0],
        "us_rule": 1e6 * first[0] if first else None,
        "shape": numbers(best[1]),
        "tried": [[round(1e6 * seconds, 2), *numbers(plan)] for seconds, plan in found[:6]],
        "bytes": made.weight.num_bytes,
    }
    return row | {"best": best[1]}


def numbers(plan: Plan) -> list[int]:
    """Give a plan as a row of the table has it."""
    if isinstance(plan, Block):
        return [plan.tiles, plan.splits, plan.stages, plan.warps]
    return [plan.warps, plan.tiles, plan.depth, plan.columns]


TABLE = """\"\"\"How linears are best cut up on a Hopper GPU: by `tools/speed_check.py`, part "tune", on {device}.

Keys: kind, outputs, inputs, gated, groups of 8 rows. Values: warps, tiles, depth, columns. Others go by rule.
\"\"\"

from __future__ import annotations

TABLE: dict[tuple[str, int, int, bool, int], tuple[int, int, int, int]] = {{
{few}}}

# The same for many rows. Keys: kind, outputs, inputs, gated, rows of a program. Values: tiles, splits, stages, warps.
MANY: dict[tuple[str, int, int, bool, int], tuple[int, int, int, int]] = {{
{many}}}
"""


def table(few: dict[Key, Shape], many: dict[Key, Block], device: str) -> str:
    """Write tuned shapes as the module `s2quant.runtime.kernels.tuned`."""

    def lines(found: dict[Key, Any]) -> str:
        rows = [f"    {key!r}: {tuple(numbers(plan))!r},\n" for key, plan in sorted(found.items())]
        return "".join(rows).replace("'", '"')

    return TABLE.format(device=device, few=lines(few), many=lines(many))
