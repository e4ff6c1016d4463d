"""S4D: S4 with a diagonal matrix, of which nothing but the eigenvalues is left.

    h' = A h + B u,  y = 2 Re(C h)        A = -exp(log_A_real) + i A_imag, B, C in C^{N/2}, one of each per channel:
                                          the halves of N/2 pairs of conjugates
    zoh        h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A B u_t
    bilinear   h_t = (1 + dt A / 2) / (1 - dt A / 2) h_{t-1} + dt / (1 - dt A / 2) B u_t

    n = 0 ... N/2 - 1 at the start:
    legs       A_n = the eigenvalues of HiPPO-LegS's normal part, B its input vector in the basis of their vectors
    inv        A_n = -1/2 + i N/pi (N / (2n + 1) - 1), B = 1
    lin        A_n = -1/2 + i pi n, B = 1

What is around the state space is in `zoo/s4/state_space.py`. N state size.
Source: Gu, Gupta, Goel, Re 2022, "On the Parameterization and Initialization of Diagonal State Space Models": section 3
(discretisation, parameters) and section 4 (initialisations, equations 8 and 9).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.heads import model_classes
from ..core.registry import register_mixer
from ..s4.hippo import dplr
from ..s4.state_space import PairedMixer, as_complex
from .configuration_s4d import S4DConfig


def eigenvalues(kind: str, size: int) -> tuple[Tensor, Tensor]:
    """A and B (N/2,) at the start, complex128."""
    if kind == "legs":
        a, _, b, _ = dplr("legs", size)
        return a, b
    n = torch.arange(size // 2, dtype=torch.float64)
    imaginary = math.pi * n if kind == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(n, -0.5), imaginary), torch.ones(size // 2, dtype=torch.complex128)


def zero_order_hold(a: Tensor, b: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """The factor and the input weight of one step dt (D, 1), the input being constant during it; a, b: (D, N/2)."""
    return (dt * a).exp(), torch.expm1(dt * a) / a * b


def bilinear(a: Tensor, b: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the trapezoid rule."""
    backward = 1 / (1 - dt / 2 * a)
    return (1 + dt / 2 * a) * backward, dt * backward * b


DISCRETIZATIONS = {"zoh": zero_order_hold, "bilinear": bilinear}


@register_mixer("s4d")
class S4DMixer(PairedMixer):
    """The equations at the head of this file."""

    paper = "Gu et al. 2022, arXiv 2206.11893"

    def init_weights(self) -> None:
        self.start_from(*eigenvalues(self.config.s4d_init, self.config.s4_state_size))

    def system(self) -> dict[str, Tensor]:
        discretize = DISCRETIZATIONS[self.config.s4d_discretization]
        a, b = discretize(self.eigenvalues(), as_complex(self.B), self.dt())
        return {"a": a, "b": b, "c": 2 * as_complex(self.C)}


S4DModel, S4DForCausalLM, S4DForSequenceClassification = model_classes(S4DConfig)
