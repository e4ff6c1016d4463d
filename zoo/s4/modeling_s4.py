"""S4: a state space whose matrix is diagonal plus low rank, started from a HiPPO matrix.

    h' = A h + B u,  y = 2 Re(C h)        A = diag(lambda) - P^T conj(P) on C^N, which comes in pairs of conjugates;
    lambda = -exp(log_A_real) + i A_imag  of each pair one half is kept: lambda, B, C in C^{N/2}, P in C^{R x N/2}
    h_t = (1 - dt/2 A)^-1 ((1 + dt/2 A) h_{t-1} + dt B u_t)                         bilinear

With g = 1 / (1 - dt/2 lambda), of the diagonal part alone, and G = (2/dt + 2 Re(conj(P) diag(g) P^T))^-1, R x R and
real, Woodbury's identity makes the step diagonal plus low rank again: no N x N matrix is inverted, decoding takes O(N):

    (1 - dt/2 A)^-1 x = g x - g P^T G 2 Re(conj(P) g x)
    (1 - dt/2 A)^-1 (1 + dt/2 A) = 2 (1 - dt/2 A)^-1 - 1

As SaShiMi found, A = diag(lambda) - P P^* with Re lambda < 0 is stable whatever is learned; in S4 the second P was a
parameter Q of its own. What is around the state space is in `zoo/s4/state_space.py`; HiPPO in `zoo/s4/hippo.py`. Here
the convolution kernel comes from powers of the matrix, which is as fast and more accurate at our lengths, where the
paper evaluates its generating function.

N state size, R rank (1 for LegS, 2 for LegT).
Sources: Gu, Goel, Re 2021, "Efficiently Modeling Long Sequences with Structured State Spaces": equation 3 (bilinear),
theorem 1 and 2 (NPLR; recurrence in O(N)), section 3.4 and appendix C.2; Goel et al. 2022, "It's Raw! Audio Generation
with State-Space Models" (stable form, section 4.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.heads import model_classes
from ..core.registry import register_mixer
from .configuration_s4 import S4Config
from .hippo import dplr
from .state_space import PairedMixer, as_complex, fill, pairs

RANKS = {"legs": 1, "legt": 2}
# LegT's normal part has no real part at all, which a logarithm cannot say; state-spaces/s4 takes the same.
LEAST_DECAY = 1e-4


@register_mixer("s4")
class S4Mixer(PairedMixer):
    """The equations at the head of this file."""

    paper = "Gu, Goel and Re 2021, arXiv 2111.00396"

    def __init__(self, config: S4Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.P = pairs(config.hidden_size, RANKS[config.s4_init], self.states)

    def init_weights(self) -> None:
        a, p, b, _ = dplr(self.config.s4_init, self.config.s4_state_size)
        self.start_from(torch.complex(a.real.clamp(max=-LEAST_DECAY), a.imag), b)
        fill(self.P, p.conj())

    def system(self) -> dict[str, Tensor]:
        dt, p, b = self.dt(), as_complex(self.P), as_complex(self.B)
        g = 1 / (1 - dt / 2 * self.eigenvalues())
        left, right = g[:, None] * p, 2 * g[:, None] * p.conj()  # (D, R, N/2)
        # Products and sums instead of matrix products, which autocast would take in half precision.
        inner = (p[:, None] * right[:, :, None]).real.sum(-1)
        inner = torch.linalg.inv(inner + torch.diag_embed((2 / dt).expand(-1, p.shape[1])))
        left = (left[:, :, None] * inner[..., None]).sum(1)
        return {
            "a": 2 * g - 1,
            "p": -2 * left.mT,
            "q": right,
            "b": dt * (g * b - (left * (right * b[:, None]).sum(-1, keepdim=True).real).sum(1)),
            "c": 2 * as_complex(self.C),
        }


S4Model, S4ForCausalLM, S4ForSequenceClassification = model_classes(S4Config)
