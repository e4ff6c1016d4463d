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
from torch import Tensor, nn
from transformers import initialization as init

from ..core.modeling import model_classes
from ..core.registry import register_mixer
from ..s4.hippo import dplr
from ..s4.state_space import StateSpaceMixer, as_complex, fill, pairs
from .configuration_s4d import S4DConfig

__all__ = ["S4DForCausalLM", "S4DForSequenceClassification", "S4DMixer", "S4DModel", "eigenvalues"]


def eigenvalues(kind: str, size: int) -> tuple[Tensor, Tensor]:
    """A and B (N/2,) at the start, complex128."""
    if kind == "legs":
        a, _, b, _ = dplr("legs", size)
        return a, b
    n = torch.arange(size // 2, dtype=torch.float64)
    imaginary = math.pi * n if kind == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(n, -0.5), imaginary), torch.ones(size // 2, dtype=torch.complex128)


@register_mixer("s4d")
class S4DMixer(StateSpaceMixer):
    """The equations at the head of this file."""

    paper = "Gu et al. 2022, arXiv 2206.11893"

    def __init__(self, config: S4DConfig, layer_idx: int):
        half = config.s4_state_size // 2
        super().__init__(config, layer_idx, states=half)
        shape = (config.hidden_size, half)
        self.log_A_real = nn.Parameter(torch.empty(shape))
        self.A_imag = nn.Parameter(torch.empty(shape))
        self.B, self.C = pairs(*shape), pairs(*shape)

    def init_weights(self) -> None:
        super().init_weights()
        a, b = eigenvalues(self.config.s4d_init, self.config.s4_state_size)
        fill(self.log_A_real, (-a.real).log())
        fill(self.A_imag, a.imag)
        fill(self.B, b)
        init.normal_(self.C, std=0.5**0.5)  # of complex variance 1

    def system(self) -> dict[str, Tensor]:
        dt, b, c = self.dt(), as_complex(self.B), as_complex(self.C)
        a = torch.complex(-self.log_A_real.to(dt.dtype).exp(), self.A_imag.to(dt.dtype))
        if self.config.s4d_discretization == "bilinear":
            backward = 1 / (1 - dt / 2 * a)
            return {"a": (1 + dt / 2 * a) * backward, "b": dt * backward * b, "c": 2 * c}
        return {"a": (dt * a).exp(), "b": torch.expm1(dt * a) / a * b, "c": 2 * c}


S4DModel, S4DForCausalLM, S4DForSequenceClassification = model_classes(S4DConfig)
