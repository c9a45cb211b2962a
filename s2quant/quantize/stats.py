"""What happened when one linear was quantized: recorded for every module, so that nothing is silent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QuantStats:
    """Figures of one quantized linear.

    Args:
        method: What was really done: "gptq" or "rtn".
        solver: Whose GPTQ it was: "s2quant" or "gptqmodel"; None for round-to-nearest.
        loss: GPTQ's squared error, weighted by the Hessian, per calibration token; None for round-to-nearest.
        damp_percent: Damping really used; None for round-to-nearest.
        num_tokens: Calibration positions in the Hessian.
        seconds: Wall time of the quantization, without the Hessian.
        fallback: Why the settings were not followed to the letter; None when they were.
        num_dead: Inputs that were zero in every calibration position; GPTQ sets their weights to zero.
        num_one_sided: Groups (of one output) without a negative weight, whose GPTQ scale was mended.
        num_subnormal_scales: Stored scales below float16's normal range, hence coarse; all-zero groups have none.
        max_scale_error: Largest relative error from rounding a normal scale to float16.
    """

    method: str
    solver: str | None
    loss: float | None
    damp_percent: float | None
    num_tokens: int
    seconds: float
    fallback: str | None
    num_dead: int
    num_one_sided: int
    num_subnormal_scales: int
    max_scale_error: float
