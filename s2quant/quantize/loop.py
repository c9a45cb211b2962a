"""Block by block: capture inputs, quantize, run the block again with its quantized weights.

Legend: M out_features, K in_features, rows calibration positions.

One stage is on the device at a time, so peak memory does not depend on depth; the calibration stream may rest on the
host. Several processes can share the work and end with the same bytes (`s2quant.quantize.exchange`). Inputs of
each linear are those that the model with everything before it already quantized would see. Every module gets a record:
what was done, with what damping, over how many tokens, and its output error on held-out rows, with that of
round-to-nearest beside it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2quant.checkpoint.layout import FAST
from s2quant.checkpoint.reader import Checkpoint
from s2quant.packing import QuantizedWeight
from s2quant.quantize.exchange import Exchange, Solved
from s2quant.quantize.gptq import gptq_quantize
from s2quant.quantize.hessian import Hessian
from s2quant.quantize.plan import Plan
from s2quant.quantize.rtn import rtn_quantize
from s2quant.quantize.stages import Stage, Stream, fast_stages, fast_stream, slow_stages, slow_stream
from s2quant.quantize.store import StageStore
from s2quant.recipe import LinearSettings

MAX_HELD_ROWS = 4096

Progress = Callable[[str], None]
"""Called with the name of each stage when it is done."""


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
    stream = slow_stream(checkpoint, batches, num_held, device, weights, rest, exchange.owns)
    length = max(tokens.shape[2] for tokens, _ in batches)
    fast_wanted = any(name.startswith(f"{FAST}.") for name in plan.quantized)
    last = _last_stage(plan)

    def stages() -> Iterable[Stage]:
        nonlocal stream
        yield from slow_stages(checkpoint, device, length)
        if fast_wanted:
            stream = fast_stream(checkpoint, stream, batches, device, rest)
            yield from fast_stages(checkpoint, device)

    for stage in stages():
        records += quantize_stage(stage, stream, plan, store, exchange)
        checkpoint.close()  # its pages count as this process's memory while they are mapped
        progress(stage.name)
        if stage.name == last:
            break
        stream.advance(stage)
        del stage  # so that its weights are gone before the next one's are loaded
    return records


def _last_stage(plan: Plan) -> str | None:
    """Name the last stage that holds a quantized module: what comes after it need not be run."""
    names = list(plan.quantized)
    if not names:
        return None
    parts = names[-1].split(".")
    return ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else FAST


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
    stage: Stage, stream: Stream, plan: Plan, store: StageStore, exchange: Exchange
) -> list[dict[str, Any]]:
    """Quantize one stage, in place, or take it from the store.

    Args:
        stage: The stage with its dense weights; left with the dequantized ones.
        stream: Its inputs; not changed.
        plan: What to do.
        store: Where it is kept.
        exchange: The processes that share the work.

    Returns:
        One record per quantized module.

    Raises:
        UserError: As `quantize_stages`.
    """
    wanted = {
        name: settings
        for name in (f"{stage.name}.{linear}" for linear in chain.from_iterable(stage.subsets))
        if name in plan.quantized and (settings := plan.quantized[name].settings) is not None
    }
    if not wanted:
        return []
    if exchange.agree(store.has(stage.name)):
        weights, records = store.load(stage.name, {name: (s.bits, s.group_size) for name, s in wanted.items()})
        for name, weight in weights.items():
            _replace(stage, name, weight)
        return records
    weights, records = {}, []
    hashes: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(1) as thread:  # hashes while the next linear is worked on
        for subset in stage.subsets:
            chosen = {f"{stage.name}.{linear}": wanted.get(f"{stage.name}.{linear}") for linear in subset}
            present = {name: settings for name, settings in chosen.items() if settings is not None}
            found = _quantize_subset(stage, stream, present, plan.recipe.strict, exchange)
            for name, (weight, record) in found.items():
                if exchange.owns(len(weights)):
                    hashes[name] = thread.submit(dequantized_sha256, weight)
                weights[name] = weight
                records.append(dict(record))
                _replace(stage, name, weight)
    known = exchange.merge({name: future.result() for name, future in hashes.items()})
    records = [record | {"dequantized_sha256": known[record["module"]]} for record in records]
    exchange.once(lambda: store.save(stage.name, weights, records))
    return records


def _quantize_subset(
    stage: Stage, stream: Stream, wanted: dict[str, LinearSettings], strict: bool, exchange: Exchange
) -> dict[str, Solved]:
    """Quantize linears that share their input."""
    if not wanted:
        return {}
    first = next(iter(wanted))
    started = time.perf_counter()
    hessian = None
    if any(settings.method == "gptq" for settings in wanted.values()):
        hessian = sum_hessian(stage, stream, first.removeprefix(f"{stage.name}."), exchange)
    held = held_rows(stage, stream, first.removeprefix(f"{stage.name}."))
    seconds = (time.perf_counter() - started) / len(wanted)

    def task(name: str, settings: LinearSettings) -> Solved:
        weight = _linear(stage, name).weight
        rtn, rtn_stats = rtn_quantize(weight, settings)
        if settings.method == "gptq":
            assert hessian is not None
            quantized, stats = gptq_quantize(weight, hessian, settings, name, strict)
        else:
            quantized, stats = rtn, rtn_stats
        record = {"module": name, "bits": settings.bits, "group_size": settings.group_size} | asdict(stats)
        record["output_error"] = output_error(weight, quantized, held)
        record["output_error_rtn"] = output_error(weight, rtn, held)
        record["held_rows"] = 0 if held is None else len(held)
        record["hessian_seconds"] = seconds
        return quantized, record

    solved = exchange.solve([partial(task, *item) for item in wanted.items()], stream.device)
    return dict(zip(wanted, solved, strict=True))


def sum_hessian(stage: Stage, stream: Stream, linear: str, exchange: Exchange | None = None) -> Hessian:
    """Sum the Hessian of one linear over the batches that are not held out, in their order.

    Args:
        stage: The stage.
        stream: Its inputs.
        linear: Relative name of the linear.
        exchange: The processes that share the batches; None: this one alone.

    Returns:
        The Hessian, the same in every process.

    Raises:
        UserError: An input is NaN or infinite.
    """
    exchange = exchange or Exchange()
    module = stage.module.get_submodule(linear)
    assert isinstance(module, nn.Linear)
    hessian = Hessian(module.in_features, f"{stage.name}.{linear}", stream.device)
    exchange.sum(hessian, stream.num_used, lambda index: hessian.product(*stream.inputs(stage, linear, index)))
    return hessian


def held_rows(stage: Stage, stream: Stream, linear: str) -> Tensor | None:
    """Gather inputs of one linear over the held-out batches, evenly thinned to MAX_HELD_ROWS.

    Args:
        stage: The stage.
        stream: Its inputs.
        linear: Relative name of the linear.

    Returns:
        [rows, K], or None when nothing is held out.
    """
    rows = [stream.inputs(stage, linear, index)[0] for index in range(stream.num_used, len(stream.values))]
    whole = torch.cat(rows) if rows else torch.zeros(0, 1)
    if not len(whole):
        return None
    return whole[torch.linspace(0, len(whole) - 1, min(len(whole), MAX_HELD_ROWS), device=whole.device).long()]


def output_error(weight: Tensor, quantized: QuantizedWeight, rows: Tensor | None) -> float | None:
    """Measure how far a quantized linear's output is from the dense one's.

    Args:
        weight: Dense [M, K].
        quantized: Its quantized form.
        rows: Inputs [rows, K], or None when none were held out.

    Returns:
        ||X (Wq - W)^T|| / ||X W^T|| in float32, or None.
    """
    if rows is None:
        return None
    inputs, dense = rows.float(), weight.float()
    difference = F.linear(inputs, quantized.dequantize(torch.float32) - dense)
    return float(difference.norm() / F.linear(inputs, dense).norm().clamp(min=1e-30))


def dequantized_sha256(weight: QuantizedWeight) -> str:
    """Hash the dequantized weight, so that what is read back can be compared with what was made.

    Args:
        weight: The quantized weight.

    Returns:
        sha256 of the float32 values [M, K] in row order.
    """
    values = weight.dequantize(torch.float32).cpu().contiguous()
    return hashlib.sha256(values.numpy().data).hexdigest()


def _linear(stage: Stage, name: str) -> nn.Linear:
    module = stage.module.get_submodule(name.removeprefix(f"{stage.name}."))
    assert isinstance(module, nn.Linear)
    return module


def _replace(stage: Stage, name: str, weight: QuantizedWeight) -> None:
    """Put the dequantized weight in the linear's place, in bfloat16, as it will be when the model speaks."""
    linear = _linear(stage, name)
    values = weight.to(linear.weight.device).dequantize(torch.bfloat16)
    linear.weight = nn.Parameter(values, requires_grad=False)
