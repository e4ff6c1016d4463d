"""Least squares from streamed sums: the weight of a linear layer whose inputs and wanted outputs come a row at a time.

    minimise  sum_t w_t |y_t W^T - z_t|^2 + lambda |W - W_0|^2
    W = W_0 + ((G + lambda)^-1 (C - G W_0^T))^T,   G = sum_t w_t y_t^T y_t,   C = sum_t w_t y_t^T z_t

y_t (I,) inputs, z_t (O,) wanted outputs, w_t >= 0, W_0 the weight so far. The sums are kept in float64, and take
I (I + O) numbers however many tokens there are.

How strong lambda has to be depends on how much text there is and how much of z_t the y_t can tell, so it is chosen by
the error of what half of the text asks for on the other half (`chosen_ridge`); where nothing helps, W stays W_0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..precision import mixed_precision

__all__ = ["RIDGES", "Gram", "chosen_ridge", "held_out"]

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


class Gram:
    """The sums G (I, I), C (I, O) and sum_t w_t |z_t|^2."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None):
        self.g = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.c = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, y: Tensor, z: Tensor, weight: Tensor | None = None) -> None:
        """Takes in y (n, I) and z (n, O), with weights (n,); None: 1. Products are float32, or float64 for such y."""
        y, z = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (y, z))
        with mixed_precision(y.device, False):
            weighted = y if weight is None else y * weight.to(y)[:, None]
            self.g += weighted.T @ y
            self.c += weighted.T @ z
            squares = z.double().square().sum(-1)
            self.total += (squares if weight is None else squares * weight.to(squares)).sum()

    def finite(self) -> bool:
        return bool(self.g.isfinite().all() and self.c.isfinite().all() and self.total.isfinite())

    def __add__(self, other: Gram) -> Gram:
        both = Gram(*self.c.shape, self.g.device)
        both.g, both.c, both.total = self.g + other.g, self.c + other.c, self.total + other.total
        return both

    def left(self, weight: Tensor) -> float:
        """sum_t w_t |y_t W^T - z_t|^2 for a weight (O, I)."""
        w = weight.double()
        return float((self.total + ((w @ self.g - 2 * self.c.T) * w).sum()).clamp(min=0))

    def error(self, weight: Tensor) -> float:
        """`left` over the sum of w_t |z_t|^2."""
        return self.left(weight) / max(float(self.total), torch.finfo(torch.float64).tiny)

    def path(self, weight: Tensor, ridges: Sequence[float]) -> Iterator[Tensor]:
        """`refit` for one ridge after the other, at the price of one decomposition."""
        w, mean = weight.double(), float(self.g.diagonal().mean())
        values, vectors = torch.linalg.eigh(self.g)
        gradient = vectors.T @ (self.c - self.g @ w.T)
        for ridge in ridges:
            yield w if mean <= 0 else w + (vectors @ (gradient / (values.clamp(min=0) + ridge * mean)[:, None])).T

    def refit(self, weight: Tensor, ridge: float) -> Tensor:
        """The minimum (O, I), float64, drawn to `weight` by lambda = ridge times the mean of G's diagonal."""
        w = weight.double()
        level = ridge * float(self.g.diagonal().mean())
        if level <= 0:
            return w
        system = self.g + level * torch.eye(len(self.g), dtype=self.g.dtype, device=self.g.device)
        return w + torch.cholesky_solve(self.c - self.g @ w.T, torch.linalg.cholesky(system)).T

    def scaled(self, weight: Tensor, factors: Tensor) -> Tensor:
        """`weight` (O, I) with its columns times factors (I,), where that lowers the error; else `weight`."""
        scaled = weight.double() * factors.double()
        return scaled if self.error(scaled) < self.error(weight) else weight.double()


def held_out(
    fitted: tuple[Gram, Gram], judges: tuple[Gram, Gram], weight: Tensor, ridges: Sequence[float] = RIDGES
) -> list[float]:
    """Errors (`left`) on the judges of what `fitted` ask for: for every ridge, and last for `weight` itself."""
    found = [0.0] * (len(ridges) + 1)
    for gram, judge in zip(fitted, judges, strict=True):
        for i, refitted in enumerate([*gram.path(weight, ridges), weight]):
            found[i] += judge.left(refitted)
    return found


def chosen_ridge(halves: tuple[Gram, Gram], weight: Tensor, ridges: Sequence[float] = RIDGES) -> float:
    """Of `ridges` the one with the least error on the half that was not fitted; infinite where `weight` itself has."""
    *left, own = held_out(halves, halves[::-1], weight, ridges)
    best = min(range(len(left)), key=left.__getitem__)
    total = float(halves[0].total + halves[1].total)
    return ridges[best] if own - left[best] > 1e-9 * total else math.inf  # more than rounding
