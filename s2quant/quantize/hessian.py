"""The Hessian of a linear's squared output error, summed batch by batch over calibration inputs.

H = 2 sum(w x x^T) / sum(w) over positions x with weight w. Without weights w is 1, and a batch's product is bit for bit
what gptqmodel computes, but for inputs of 16 bits on a GPU: its tensor cores multiply the same exact products, and add
them up in float32 in another order, much faster (reports/2026-11-26-targets). A batch's own product depends on nothing
else, so several processes can each compute some; in which order they are added, `Exchange.sum` says.

Legend: K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2quant.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """What one batch adds.

    Args:
        matrix: sum(w x x^T), float32 [K, K].
        num_tokens: Rows of a weight above 0.
        total: sum(w).
        num_bad: int64, those of them that hold NaN or infinity, on the matrix's device: to read it waits for that.
    """

    matrix: Tensor
    num_tokens: int
    total: float
    num_bad: Tensor


def gram(rows: Tensor) -> Tensor:
    """Compute the Gram matrix X^T X.

    Args:
        rows: Floating point [R, K], on any device.

    Returns:
        float32 [K, K] on that device: exact products of the elements, added up in float32.
    """
    rows = rows.contiguous()
    if rows.is_cuda and rows.element_size() == 2:
        return torch.mm(rows.T, rows, out_dtype=torch.float32)
    rows = rows.to(torch.float32)
    return torch.matmul(rows.T, rows)


class Hessian:
    """Weighted sum of X^T X over calibration inputs; serves every linear that reads that input.

    Args:
        in_features: K.
        name: How messages name the module (or the first of them).
        device: Where the sum lives; None for that of the first inputs.
    """

    def __init__(self, in_features: int, name: str, device: torch.device | str | None = None) -> None:
        self.in_features, self.name = in_features, name
        self.num_tokens = 0
        self.prepared: dict[Any, Any] = {}
        """What a solver has made of it, for the next linear (`s2quant.quantize.solver`)."""
        self._total = 0.0
        self._num_bad: Tensor | None = None  # int64: inputs, of which it is not known here, that are not finite
        self._device = None if device is None else torch.device(device)
        self._sum: Tensor | None = None  # float32 [K, K]

    @property
    def device(self) -> torch.device:
        """Where the sum lives; the CPU while nothing is known of it."""
        return self._device or torch.device("cpu")

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add calibration inputs, in place; a temporary of [K, K] and a float32 copy of `x` are made.

        Args:
            x: Floating point [rows, K] or [..., K], padding already dropped.
            weights: Float [rows] or [...], 0 or more; None: all 1.

        Raises:
            UserError: An input is NaN or infinite.
        """
        product = self.product(x, weights)
        if product is not None:
            self._check(product.num_tokens, int(product.num_bad))
            self.accumulate(product)

    def _check(self, num_tokens: int, num_bad: int) -> None:
        """Refuse inputs that are not finite."""
        if num_bad:
            raise UserError(
                f"{self.name}: {num_bad} of {num_tokens} calibration inputs hold NaN or infinity",
                "finite activations",
                "check the weights of the layers before it and the calibration lines, or run in bf16 or float32",
            )

    @torch.no_grad()
    def product(self, x: Tensor, weights: Tensor | None = None) -> Product | None:
        """Compute what a batch would add; without weights, nothing here waits for the device.

        Args:
            x: As `add`.
            weights: As `add`.

        Returns:
            The product, or None when no row counts.
        """
        assert x.shape[-1] == self.in_features and x.is_floating_point(), (self.name, x.shape, x.dtype)
        rows = x.detach().reshape(-1, self.in_features).to(self._device or x.device)
        if weights is not None:
            weights = weights.reshape(-1).to(rows.device, torch.float32)
            assert len(weights) == len(rows), (self.name, weights.shape, rows.shape)
            rows, weights = rows[weights > 0], weights[weights > 0]
        if rows.shape[0] == 0:
            return None
        largest = torch.linalg.vector_norm(rows, float("inf"), dim=1)  # NaN where one is
        num_bad = (~torch.isfinite(largest)).sum()
        if weights is None:
            return Product(matrix=gram(rows), num_tokens=len(rows), total=float(len(rows)), num_bad=num_bad)
        weighted, total = rows.to(torch.float32) * weights.sqrt()[:, None], float(weights.double().sum())
        return Product(matrix=gram(weighted), num_tokens=len(rows), total=total, num_bad=num_bad)

    @torch.no_grad()
    def accumulate(self, product: Product) -> None:
        """Add a batch's product, in place; the order of calls decides the last bits. Nothing here waits for the device.

        Args:
            product: From `product`; its matrix may become the sum itself. Inputs that are not finite are refused by
                `matrix`.
        """
        self.prepared.clear()
        if self._sum is None:
            self._sum, self._device = product.matrix, product.matrix.device
        else:
            self._sum.add_(product.matrix)
        self._num_bad = product.num_bad if self._num_bad is None else self._num_bad + product.num_bad
        self.num_tokens += product.num_tokens
        self._total += product.total

    def matrix(self) -> Tensor:
        """Compute the Hessian of the squared output error, 2/n X^T X, n being the sum of the weights.

        Returns:
            A new float32 [K, K].

        Raises:
            UserError: No inputs were added, one of them is NaN or infinite, or the sum overflowed.
        """
        if self._sum is None or self._num_bad is None:
            raise UserError(f"{self.name}: no calibration inputs", "at least one position", "add calibration lines")
        is_finite, num_bad = torch.stack([torch.isfinite(self._sum).all().long(), self._num_bad]).tolist()
        self._check(self.num_tokens, num_bad)
        if not is_finite:
            raise UserError(
                f"{self.name}: X^T X overflows float32",
                "activations below about 1e18",
                "keep this module in bf16, or check the layers before it",
            )
        return self._sum * (2.0 / self._total)
