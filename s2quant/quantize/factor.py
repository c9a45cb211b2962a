"""The factor of a Hessian that GPTQ goes by, without an inverse.

GPTQ is written with U, the upper Cholesky factor of the inverse Hessian: U^T U = H^-1. With J the reversal of the order
of rows and columns, J H J = L L^T gives H = R R^T, where R = J L J is upper triangular, and so U = R^-1. Within a block
of columns only the block of U on the diagonal is needed, which is the inverse of R's own; what the columns before a
block do to it is told by R itself (`s2quant.quantize.solver`). That takes one factorization, where the usual way takes
a factorization, an inverse and another factorization, and rounds more often.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upper_factor(matrix: Tensor, damping: float | Tensor) -> Tensor | None:
    """Factor a matrix that is added to its diagonal first, from its last row to its first.

    Args:
        matrix: float32 [n, n], symmetric; not changed.
        damping: What is added to the diagonal.

    Returns:
        R, float32 [n, n] upper triangular with R R^T = matrix + damping I; None if that is not positive definite.
    """
    damped = matrix.flip(0, 1)
    damped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        return None
    del damped
    return lower.flip(0, 1).contiguous()  # LAPACK's and cuSOLVER's are column by column


def block_inverses(upper: Tensor, size: int) -> Tensor:
    """Invert the blocks on the diagonal of an upper triangle; they are the blocks on the diagonal of its inverse.

    Args:
        upper: float32 [n, n], zeros below the diagonal.
        size: Rows of a block.

    Returns:
        float32 [ceil(n / size), size, size]; the last one is filled up with those of the identity.
    """
    whole, rest = divmod(len(upper), size)
    identity = torch.eye(size, dtype=upper.dtype, device=upper.device).expand(whole + bool(rest), -1, -1)
    blocks, filled = identity.clone(), whole * size
    if whole:  # [blocks, size, blocks, size], of which those on the diagonal
        squares = upper[:filled, :filled].unflatten(1, (whole, size)).unflatten(0, (whole, size))
        blocks[:whole] = squares.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    if rest:
        blocks[-1, :rest, :rest] = upper[filled:, filled:]
    return torch.linalg.solve_triangular(blocks, identity, upper=True).contiguous()
