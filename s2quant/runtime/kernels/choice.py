"""Which kernel multiplies, by the number of rows: the one place that knows both.

Legend: M rows of x, N outputs, K inputs.

Up to 16 rows every weight goes straight from memory into the tensor cores (`s2quant.runtime.kernels.linear`), exactly;
x is read by every program, which costs little. From 17 rows on that would be the most of the work, and blocks of
outputs share x (`s2quant.runtime.kernels.many`); packed weights are rounded to bf16 there, as in a prefill.
"""

from __future__ import annotations

from torch import Tensor

from s2quant.runtime.kernels.finish import CHUNK
from s2quant.runtime.kernels.launch import PATIENT, How
from s2quant.runtime.kernels.linear import columns_for, linear
from s2quant.runtime.kernels.linear import padded_rows as padded_few
from s2quant.runtime.kernels.many import many, num_blocks, rows_of
from s2quant.runtime.kernels.shapes import block_for, shape_for
from s2quant.runtime.kernels.weights import Block, Shape, Then, Weight

FEWEST_MANY = 17  # rows from which the kernel of many rows multiplies
Plan = Shape | Block


def is_many(num_rows: int, how: How = PATIENT) -> bool:
    """Say whether the kernel of many rows multiplies, and so in which order it wants x.

    Args:
        num_rows: M.
        how: How kernels are launched.

    Returns:
        Whether it does.
    """
    return how.many_rows and num_rows >= FEWEST_MANY


def plan_for(weight: Weight, num_rows: int, how: How = PATIENT) -> Plan:
    """Choose the kernel, and how it cuts the linear up.

    Args:
        weight: The weight.
        num_rows: M.
        how: How kernels are launched.

    Returns:
        The plan.
    """
    if is_many(num_rows, how):
        return block_for(weight, rows_of(num_rows))
    return shape_for(weight, columns_for(num_rows), how.narrow)


def padded_rows(num_rows: int) -> int:
    """Say how many rows a buffer of x needs, whichever kernel reads it.

    Args:
        num_rows: M.

    Returns:
        M rounded up.
    """
    whole = rows_of(num_rows)
    return max(padded_few(num_rows), -(-num_rows // whole) * whole if num_rows >= FEWEST_MANY else 0)


def num_sums(weight: Weight, plan: Plan) -> int:
    """Count the partial sums of squares that a residual linear leaves for each row.

    Args:
        weight: The weight.
        plan: How it is multiplied.

    Returns:
        Sums per row.
    """
    if isinstance(plan, Shape):
        return weight.num_tiles // plan.tiles
    return num_blocks(weight, plan) if plan.splits == 1 else -(-weight.out_features // CHUNK)


def num_parts(weight: Weight, plan: Plan, num_rows: int) -> int:
    """Count the numbers that a linear leaves to be added up.

    Args:
        weight: The weight.
        plan: How it is multiplied.
        num_rows: M.

    Returns:
        Float32 numbers; 0 where nothing is split.
    """
    if isinstance(plan, Shape) or plan.splits == 1:
        return 0
    return plan.splits * num_rows * weight.out_features


def multiply(
    weight: Weight,
    x: Tensor,
    num_rows: int,
    then: Then,
    plan: Plan,
    how: How = PATIENT,
    launch: bool = True,
    parts: Tensor | None = None,
    finished: bool = True,
) -> None:
    """Multiply as planned, and do what comes after.

    Args:
        weight: The weight.
        x: bfloat16 [padded_rows(M) or more, K], contiguous, inputs in the order that the plan's kernel wants; finite
            everywhere.
        num_rows: M.
        then: What is done with the product; its tensors have M rows or more.
        plan: What `plan_for` gave.
        how: How to launch it.
        launch: Whether to launch it, not only to compile it.
        parts: float32, room for `num_parts` numbers; None: made where it is needed.
        finished: Whether parts are added up; else whoever reads them does.
    """
    if isinstance(plan, Shape):
        linear(weight, x, num_rows, then, plan, how, launch)
    else:
        many(weight, x, num_rows, then, plan, how, launch, parts, finished)
