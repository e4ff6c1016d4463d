"""HiPPO matrices: state spaces h' = A h + B u whose state keeps the coefficients of the input's past.

LegS: all of the past in Legendre polynomials, stretched as it grows. LegT: a window of the last unit of time.

    LegS    A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 for n < k
    LegT    A_nk = -sqrt((2n+1)(2k+1)) for n >= k, times (-1)^(n-k) for n < k
    both    B_n  = sqrt(2n+1)

Either is normal plus low rank (NPLR): A + P^T P is normal for real P of rank 1 (LegS) or 2 (LegT), so in the basis V of
its eigenvectors A is diagonal plus low rank (DPLR): V^* A V = diag(lambda) - (P V)^* (P V).

N state size, R rank. Float64 throughout.
Sources: HiPPO (Gu et al. 2020, arXiv 2008.07669, section 3 and appendix D), S4 (Gu, Goel, Re 2021, arXiv 2111.00396,
theorem 1 and appendix C.1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _scales(size: int) -> Tensor:
    return (2 * torch.arange(size, dtype=torch.float64) + 1).sqrt()


def legs(size: int) -> tuple[Tensor, Tensor]:
    """A (N, N) and B (N,) of the scaled Legendre measure."""
    scales = _scales(size)
    below = torch.tril(torch.outer(scales, scales), -1)
    return -below - torch.diag(torch.arange(1, size + 1, dtype=torch.float64)), scales


def legt(size: int) -> tuple[Tensor, Tensor]:
    """A (N, N) and B (N,) of the translated Legendre measure, with a window of length 1."""
    scales, n = _scales(size), torch.arange(size)
    signs = torch.where(n[:, None] >= n, 1.0, 1.0 - 2.0 * ((n[:, None] - n) % 2))
    return -torch.outer(scales, scales) * signs, scales


HIPPO = {"legs": legs, "legt": legt}
"""The measures by name."""


def low_rank(measure: str, size: int) -> Tensor:
    """P (R, N) with A + P^T P normal: minus half the identity (LegS) or zero (LegT) plus a skew-symmetric matrix."""
    scales = _scales(size)
    if measure == "legs":
        return scales[None] * 0.5**0.5
    even = torch.arange(size) % 2 == 0
    return torch.stack([torch.where(even, scales, 0.0), torch.where(even, 0.0, scales)])


def dplr(measure: str, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """HiPPO in the basis of eigenvectors, of which every pair of conjugates is kept by its half with Im lambda > 0.

    Args:
        size: N, even.
    Returns:
        lambda (N/2,), P (R, N/2), B (N/2,), V (N, N/2), complex128; with A = 2 Re(V diag(lambda) V^*) - P_0^T P_0, P_0
        (R, N) being the real one, P = P_0 V and B = V^* B_0.
    """
    a, b = HIPPO[measure](size)
    p = low_rank(measure, size)
    normal = a + p.T @ p
    shift = normal.diagonal().mean()
    # Minus i times a skew-symmetric matrix is Hermitian; its eigenvalues come in pairs +w, -w, ascending here.
    frequencies, v = torch.linalg.eigh(-1j * (normal - shift * torch.eye(size, dtype=torch.float64)))
    frequencies, v = frequencies[size // 2 :], v[:, size // 2 :]
    return torch.complex(shift.expand_as(frequencies), frequencies), p.to(v.dtype) @ v, v.mH @ b.to(v.dtype), v
