"""The Cholesky factor of an inverse Hessian, without the inverse.

With J the reversal of the order of rows and columns, J H J = L L^T gives H = (J L J) (J L J)^T, where J L J is upper
triangular. So H^-1 = U^T U with U = J L^-1 J, also upper triangular, and there is only one such factor with a positive
diagonal. That takes one factorization and the inverse of a triangle, where the usual way takes a factorization, an
inverse and another factorization, and rounds more often.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1024  # up to here a triangle is inverted by torch's own solver


def inverse_factor(matrix: Tensor, damping: float | Tensor) -> Tensor | None:
    """Factor the inverse of a matrix that is added to its diagonal first.

    Args:
        matrix: float32 [n, n], symmetric; not changed.
        damping: What is added to the diagonal.

    Returns:
        U, float32 [n, n] upper triangular with U^T U = (matrix + damping I)^-1; None if that is not positive definite.
    """
    damped = matrix.flip(0, 1)
    damped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        return None
    del damped
    return inverse_of_lower(lower).flip(0, 1).contiguous()


def inverse_of_lower(lower: Tensor) -> Tensor:
    """Invert a lower triangle by halves, most of it by products.

    Args:
        lower: float32 [n, n], zeros above the diagonal; overwritten.

    Returns:
        Its inverse, in the same memory.
    """
    n = len(lower)
    if n <= SMALL:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    half = n // 2
    upper_left = inverse_of_lower(lower[:half, :half])
    lower_right = inverse_of_lower(lower[half:, half:])
    below = lower[half:, :half]
    below.copy_(lower_right @ (below @ upper_left)).neg_()
    return lower
