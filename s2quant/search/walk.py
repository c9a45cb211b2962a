"""The pass over the model: quantize each unit to each width, measure it in place, keep the record.

Legend: M out_features, K in_features.

Two copies of a block are on the device while it is worked on: the stage that calibrates (its inputs are those of the
bf16 model throughout) and the block of the whole model that is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2quant.checkpoint.reader import Checkpoint
from s2quant.export.calibration import Report
from s2quant.packing import QuantizedWeight
from s2quant.quantize.gptq import gptq_quantize
from s2quant.quantize.hessian import Hessian
from s2quant.quantize.loop import sum_hessian
from s2quant.quantize.rtn import rtn_quantize
from s2quant.quantize.stages import Stage, fast_stages, slow_stages
from s2quant.quantize.store import StageStore
from s2quant.quantize.stream import Stream, fast_stream, slow_stream
from s2quant.recipe import PositionWeights
from s2quant.search.damage import Held, replaced, summarise
from s2quant.search.store import candidate_name, dense_of
from s2quant.search.units import Unit


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What the pass needs.

    Args:
        checkpoint: The bf16 model on disk.
        batches: Calibration tokens int64 [B, 1+N, T] and masks bool [B, T], for Hessians.
        held: The bf16 model on the held-out sequences, at its first block; moved along.
        units: All units.
        bits: Candidate widths.
        store: Where finished candidates are kept, and found again.
        device: Where to work.
        weights: How much text and speech positions count in Hessians.
        strict: Whether a fallback of GPTQ is an error.
    """

    checkpoint: Checkpoint
    batches: Sequence[tuple[Tensor, Tensor]]
    held: Held
    units: Sequence[Unit]
    bits: tuple[int, ...]
    store: StageStore
    device: torch.device
    weights: PositionWeights
    strict: bool

    def missing(self, unit: Unit) -> list[int]:
        """List the widths of a unit that are not finished.

        Args:
            unit: The unit.

        Returns:
            Their bits.
        """
        return [bits for bits in self.bits if not self.store.has(candidate_name(unit.name, bits))]


@torch.inference_mode()
def measure_units(job: Job, report: Report) -> None:
    """Measure every candidate that is not in the store.

    Args:
        job: What is needed.
        report: Told of progress, one step per candidate.

    Raises:
        UserError: A unit could not be quantized as the recipe says and the recipe is strict.
    """
    total = len(job.units) * len(job.bits)
    done = total - sum(len(job.missing(unit)) for unit in job.units)
    report("linears", done, total)
    for stage, stream in _stages(job):
        for unit in [unit for unit in job.units if job.missing(unit) and _is_of(unit, stage)]:
            hessian = None
            if unit.settings.method == "gptq":
                hessian = sum_hessian(stage, stream, _relative(stage, unit.modules[0]))
            for bits in job.missing(unit):
                weights, record = _candidate(job, stage, unit, bits, hessian)
                job.store.save(candidate_name(unit.name, bits), weights, [record])
                done += 1
                report(unit.name, done, total)


def _stages(job: Job) -> Iterator[tuple[Stage, Stream]]:
    """Walk as far as something is missing, with the inputs of each stage; the held-out sequences go along."""
    checkpoint, device = job.checkpoint, job.device
    stream = slow_stream(checkpoint, job.batches, 0, device, job.weights)
    length = max(tokens.shape[2] for tokens, _ in job.batches)
    for stage in slow_stages(checkpoint, device, length):
        if not any(job.missing(unit) for unit in job.units):
            return
        yield stage, stream
        checkpoint.close()
        stream.advance(stage)
        job.held.advance()
    stream = fast_stream(checkpoint, stream, job.batches, device)
    for stage in fast_stages(checkpoint, device):
        if not any(job.missing(unit) for unit in job.units):
            return
        yield stage, stream
        stream.advance(stage)


def _is_of(unit: Unit, stage: Stage) -> bool:
    return any(f"{stage.name}.{linear}" == unit.modules[0] for subset in stage.subsets for linear in subset)


def _relative(stage: Stage, module: str) -> str:
    return module.removeprefix(f"{stage.name}.")


def _candidate(
    job: Job, stage: Stage, unit: Unit, bits: int, hessian: Hessian | None
) -> tuple[dict[str, QuantizedWeight], dict[str, Any]]:
    """Quantize a unit and measure it."""
    settings = unit.with_bits(bits)
    weights, stats = {}, []
    for name in unit.modules:
        linear = stage.module.get_submodule(_relative(stage, name))
        assert isinstance(linear, nn.Linear)
        if hessian is not None:
            weights[name], facts = gptq_quantize(linear.weight, hessian, settings, name, job.strict)
        else:
            weights[name], facts = rtn_quantize(linear.weight, settings, name)
        stats.append(facts)
    like = job.held.inputs[0]
    dense = {name: dense_of(weight, like) for name, weight in weights.items()}
    with replaced(job.held.model, dense):
        found = summarise(job.held.measure(unit.part))
    fallbacks = [facts.fallback for facts in stats if facts.fallback is not None]
    losses = [facts.loss for facts in stats if facts.loss is not None]
    facts_of_unit = {
        "bits": bits,
        "num_bytes": unit.num_bytes[bits],
        "method": stats[0].method,
        "loss": sum(losses) if len(losses) == len(stats) else None,
        "num_tokens": stats[0].num_tokens,
        "fallback": "; ".join(fallbacks) or None,
    }
    return weights, facts_of_unit | found
