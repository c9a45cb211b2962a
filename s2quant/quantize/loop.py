"""Block by block: capture inputs, quantize, run the block again with its quantized weights.

Legend: M out_features, K in_features, rows calibration positions.

One stage is on the device at a time, and the next one's weights, so peak memory does not depend on depth; the
calibration stream may rest on the host. Several processes can share the work and end with the same bytes
(`s2quant.quantize.exchange`). Inputs of each linear are those that the model with everything before it already
quantized would see. Every module gets a record: what was done, with what damping, over how many tokens, and its output
error on held-out rows, with that of round-to-nearest beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from s2quant.checkpoint.layout import FAST
from s2quant.checkpoint.reader import Checkpoint
from s2quant.packing import QuantizedWeight
from s2quant.quantize.exchange import Exchange
from s2quant.quantize.gptq import gptq_quantize
from s2quant.quantize.hessian import Hessian
from s2quant.quantize.keeping import Keeper
from s2quant.quantize.outputs import output_errors, output_squares
from s2quant.quantize.plan import Plan
from s2quant.quantize.rows import Part, join_rows, row_ranges
from s2quant.quantize.rtn import rtn_quantize
from s2quant.quantize.solver import spaces_kept
from s2quant.quantize.stages import Stage, fast_stages, slow_stages, stage_of
from s2quant.quantize.store import StageStore
from s2quant.quantize.stream import Stream, fast_stream, slow_stream
from s2quant.recipe import LinearSettings

MAX_HELD_ROWS = 4096

Progress = Callable[[str], None]
"""Called with the name of each stage when it is done."""
Kept = Callable[[], list[dict[str, Any]]]
"""Waits until a stage is kept, and gives its records."""


@torch.inference_mode()
def quantize_stages(
    checkpoint: Checkpoint,
    plan: Plan,
    batches: Sequence[tuple[Tensor, Tensor]],
    num_held: int,
    store: StageStore,
    device: torch.device,
    progress: Progress = lambda name: None,
    exchange: Exchange | None = None,
    rest: torch.device | None = None,
) -> list[dict[str, Any]]:
    """Quantize every module that the plan names and keep each finished stage.

    Args:
        checkpoint: The bf16 model.
        plan: What to do.
        batches: Calibration tokens int64 [B, 1+N, T] and masks bool [B, T].
        num_held: Batches at the end that are held out of the Hessians.
        store: Where finished stages are kept, and found again.
        device: Where to work.
        progress: Told of every finished stage.
        exchange: The processes that share the work; None: this one alone.
        rest: Where the calibration stream is kept between stages; None: on the device.

    Returns:
        One record per quantized module, in order.

    Raises:
        UserError: A module could not be quantized as the recipe says and the recipe is strict.
    """
    records: list[dict[str, Any]] = []
    exchange = exchange or Exchange()
    weights = plan.recipe.calibration.weights
    stream = slow_stream(checkpoint, batches, num_held, device, weights, rest, exchange.owns_batch)
    length = max(tokens.shape[2] for tokens, _ in batches)
    fast_wanted = any(name.startswith(f"{FAST}.") for name in plan.quantized)
    last = _last_stage(plan)

    def stages() -> Iterable[Stage]:
        nonlocal stream
        yield from slow_stages(checkpoint, device, length, last)
        if fast_wanted:
            stream = fast_stream(checkpoint, stream, batches, device, rest)
            yield from fast_stages(checkpoint, device, last)

    found = exchange.once(store.names)
    spaces = spaces_kept() if rest is None else nullcontext()  # which take a GB
    with Keeper(store if exchange.is_first else None, device) as keeper, spaces:
        before: Kept = list
        for stage in stages():
            kept = quantize_stage(stage, stream, plan, store if stage.name in found else None, exchange, keeper)
            records += exchange.once(before)  # written meanwhile
            before = kept
            checkpoint.close()  # its pages count as this process's memory while they are mapped
            progress(stage.name)
            if stage.name == last:
                break
            stream.advance(stage)
            del stage  # so that its weights are gone: those of the next stage are there already
        records += exchange.once(before)
    return records


def _last_stage(plan: Plan) -> str | None:
    """Name the last stage that holds a quantized module: what comes after it need not be run."""
    names = list(plan.quantized)
    return stage_of(names[-1]) if names else None


def num_stages(plan: Plan) -> int:
    """Count the stages that will be walked.

    Args:
        plan: The plan.

    Returns:
        Their number, for a progress bar.
    """
    last = _last_stage(plan)
    if last is None:
        return 0
    slow, fast = plan.config.slow.n_layer, plan.config.fast.n_layer
    if last == FAST:
        return slow + fast + 1
    number = int(last.rpartition(".")[2]) + 1
    return slow + number if last.startswith(f"{FAST}.") else number


def quantize_stage(
    stage: Stage, stream: Stream, plan: Plan, store: StageStore | None, exchange: Exchange, keeper: Keeper
) -> Kept:
    """Quantize one stage, in place, or take it from the store.

    Args:
        stage: The stage with its dense weights; left with the dequantized ones.
        stream: Its inputs.
        plan: What to do.
        store: Where it is found; None: it has to be made.
        exchange: The processes that share the work.
        keeper: Keeps it, in the first process.

    Returns:
        What waits until it is kept and gives one record per quantized module, in the first process.

    Raises:
        UserError: As `quantize_stages`.
    """
    wanted = {
        name: settings
        for name in (f"{stage.name}.{linear}" for linear in chain.from_iterable(stage.subsets))
        if name in plan.quantized and (settings := plan.quantized[name].settings) is not None
    }
    if not wanted:
        return list
    if store is not None:
        weights, records = store.load(stage.name, {name: (s.bits, s.group_size) for name, s in wanted.items()})
        for name, weight in weights.items():
            _replace(stage, name, weight)
        return lambda: records
    weights, records = {}, []
    for subset in stage.subsets:
        chosen = {f"{stage.name}.{linear}": wanted.get(f"{stage.name}.{linear}") for linear in subset}
        present = {name: settings for name, settings in chosen.items() if settings is not None}
        found = _quantize_subset(stage, stream, present, plan.recipe.strict, exchange)
        for name, (weight, record) in found.items():
            keeper.hash(name, weight)
            weights[name] = weight
            records.append(dict(record))
            _replace(stage, name, weight)
    kept: Future[list[dict[str, Any]]] | None = keeper.keep(stage.name, weights, records)
    return list if kept is None else kept.result


def _quantize_subset(
    stage: Stage, stream: Stream, wanted: dict[str, LinearSettings], strict: bool, exchange: Exchange
) -> dict[str, tuple[QuantizedWeight, dict[str, Any]]]:
    """Quantize linears that share their input."""
    if not wanted:
        return {}
    first = next(iter(wanted)).removeprefix(f"{stage.name}.")
    started = time.perf_counter()
    own = held_rows(stage, stream, first, exchange)  # before anything is exchanged, so that none waits for it
    hessian = None
    if any(settings.method == "gptq" for settings in wanted.values()):
        hessian = sum_hessian(stage, stream, first, exchange)
    seconds = (time.perf_counter() - started) / len(wanted)
    held = exchange.share_batches(own).float()

    def task(name: str, settings: LinearSettings, rows: slice) -> Part:
        weight = _linear(stage, name).weight[rows]
        if settings.method == "gptq":
            assert hessian is not None
            quantized, stats = gptq_quantize(weight, hessian, settings, name, strict)
        else:
            quantized, stats = rtn_quantize(weight, settings, name)
        return Part(weight=quantized, stats=stats, squares=output_squares(held, weight, quantized, settings))

    parts = {
        name: row_ranges(_linear(stage, name).weight, len(wanted) == 1 and settings.method == "gptq")
        for name, settings in wanted.items()
    }
    tasks = [partial(task, name, wanted[name], rows) for name in wanted for rows in parts[name]]
    found = iter(exchange.solve(tasks, stream.device))
    solved = {}
    for name, settings in wanted.items():
        whole = join_rows([next(found) for _ in parts[name]], _linear(stage, name).weight, settings, name)
        record = {"module": name, "bits": settings.bits, "group_size": settings.group_size}
        record |= asdict(whole.stats) | {"hessian_seconds": seconds} | output_errors(whole.squares)
        solved[name] = whole.weight, record | {"held_rows": len(held)}
    return solved


def sum_hessian(stage: Stage, stream: Stream, linear: str, exchange: Exchange | None = None) -> Hessian:
    """Sum the Hessian of one linear over the batches that are not held out.

    Args:
        stage: The stage.
        stream: Its inputs.
        linear: Relative name of the linear.
        exchange: The processes that share the batches; None: this one alone.

    Returns:
        The Hessian, the same in every process.
    """
    exchange = exchange or Exchange()
    module = stage.module.get_submodule(linear)
    assert isinstance(module, nn.Linear)
    hessian = Hessian(module.in_features, f"{stage.name}.{linear}", stream.device)
    counts = stream.totals[: stream.num_used]
    exchange.sum(hessian, counts, lambda index: hessian.product(*stream.inputs(stage, linear, index)))
    return hessian


def held_rows(stage: Stage, stream: Stream, linear: str, exchange: Exchange) -> dict[int, Tensor]:
    """Take rows of one linear's input from this process's batches that are held out.

    Args:
        stage: The stage.
        stream: Its inputs; of the rows held out, about MAX_HELD_ROWS are used, evenly thinned in every batch.
        linear: Relative name of the linear.
        exchange: The processes that share the batches.

    Returns:
        By batch, in order, [R, K] in the linear's type: rows of this process's, and room for those of others.
    """
    module = stage.module.get_submodule(linear)
    assert isinstance(module, nn.Linear)
    counts = {index: stream.num_rows[index] for index in range(stream.num_used, len(stream.values))}
    share = min(1.0, MAX_HELD_ROWS / max(1, sum(counts.values())))
    found = {}
    for index, count in counts.items():
        wanted = min(count, max(1, round(count * share)))
        rows = torch.empty(wanted, module.in_features, dtype=module.weight.dtype, device=stream.device)
        if wanted and exchange.owns_batch(index):
            inputs = stream.inputs(stage, linear, index)[0]
            rows = inputs[torch.linspace(0, len(inputs) - 1, wanted, device=rows.device).long()].to(rows.dtype)
        found[index] = rows
    return found


def _linear(stage: Stage, name: str) -> nn.Linear:
    module = stage.module.get_submodule(name.removeprefix(f"{stage.name}."))
    assert isinstance(module, nn.Linear)
    return module


def _replace(stage: Stage, name: str, weight: QuantizedWeight) -> None:
    """Put the dequantized weight in the linear's place, in bfloat16, as it will be when the model speaks."""
    linear = _linear(stage, name)
    values = weight.to(linear.weight.device).dequantize(torch.bfloat16)
    linear.weight = nn.Parameter(values, requires_grad=False)
