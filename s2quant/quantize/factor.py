"""The Cholesky factor of an inverse Hessian, without the inverse.

With J the reversal of the order of rows and columns, J H J = L L^T gives H = (J L J) (J L J)^T, where J L J is upper
triangular. So H^-1 = U^T U with U = J L^-1 J, also upper triangular, and there is only one such factor with a positive
diagonal. That takes one factorization and the inverse of a triangle, where the usual way takes a factorization, an
inverse and another factorization, and rounds more often.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 256  # sides of the triangles that torch's own solver inverts


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
    """Invert a lower triangle: small triangles on its diagonal all at once, the rest by products of halves.

    Args:
        lower: float32 [n, n], zeros above the diagonal; overwritten.

    Returns:
        Its inverse, in the same memory.
    """
    n = len(lower)
    edges = [*range(0, n, SMALL), n]
    whole = n // SMALL * SMALL
    if whole:
        triangles = torch.stack([lower[start : start + SMALL, start : start + SMALL] for start in edges[: n // SMALL]])
        for start, inverse in zip(edges, _inverses(triangles), strict=False):
            lower[start : start + SMALL, start : start + SMALL] = inverse
    if whole < n:
        lower[whole:, whole:] = _inverses(lower[None, whole:, whole:])[0]
    _join(lower, edges)
    return lower


def _inverses(triangles: Tensor) -> Tensor:
    """Invert lower triangles [B, n, n]."""
    identity = torch.eye(triangles.shape[-1], dtype=triangles.dtype, device=triangles.device)
    return torch.linalg.solve_triangular(triangles, identity.expand_as(triangles), upper=False)


def _join(lower: Tensor, edges: list[int]) -> None:
    """Make the inverse of a triangle whose parts on the diagonal, between edges, are inverted already."""
    if len(edges) <= 2:
        return
    middle = len(edges) // 2
    _join(lower, edges[: middle + 1])
    _join(lower, edges[middle:])
    first, half, last = edges[0], edges[middle], edges[-1]
    below = lower[half:last, first:half]
    below.copy_(lower[half:last, half:last] @ (below @ lower[first:half, first:half])).neg_()
