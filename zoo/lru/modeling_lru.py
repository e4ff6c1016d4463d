"""LRU: linear recurrent unit.

    lambda = exp(-exp(nu_log) + i exp(theta_log))             N complex numbers, |lambda| < 1 whatever the parameters
    h_t    = lambda * h_{t-1} + exp(gamma_log) * (B u_t)      equations 5 to 7; h in C^N
    y_t    = Re(C h_t) + D * u_t
    out    = GLU(gelu(y)) = (W_1 gelu(y) + b_1) * sigmoid(W_2 gelu(y) + b_2)

Nothing here depends on the token but the input: a linear time-invariant filter, whose nonlinearity is in the GLU. gamma
starts at sqrt(1 - |lambda|^2), so that white noise gives states of unit variance (section 3.5).

Complex matrices are stored as real ones: the rows of in_proj are Re B, then Im B; the columns of out_proj Re C, then
-Im C. B is Glorot-normal, C normal with variance 1 / N, D normal; eigenvalues uniform on a ring (lemma 3.2).

u = hidden states, B batch, T time, D hidden_size, N lru_state_size.
Source: Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences", section 3 and appendix A.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..core.heads import model_classes
from ..core.mixer import Context, Mixer, MixerState
from ..core.recurrences import scan
from ..core.registry import register_mixer
from .configuration_lru import LRUConfig


@dataclasses.dataclass
class LRUState(MixerState):
    """h: (B, N) complex64 (complex128 in a float64 model)."""

    h: Tensor


@register_mixer("lru")
class LRUMixer(Mixer):
    """The equations at the head of this file."""

    kernel = "linear_scan"
    paper = "Orvieto et al. 2023, arXiv 2303.06349"

    def __init__(self, config: LRUConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        width, self.size = config.hidden_size, config.lru_state_size
        self.nu_log = nn.Parameter(torch.zeros(self.size))
        self.theta_log = nn.Parameter(torch.zeros(self.size))
        self.gamma_log = nn.Parameter(torch.zeros(self.size))
        self.in_proj = nn.Linear(width, 2 * self.size, bias=False)
        self.out_proj = nn.Linear(2 * self.size, width, bias=False)
        self.D = nn.Parameter(torch.zeros(width))
        self.glu = nn.Linear(width, 2 * width)

    def init_weights(self) -> None:
        config, device = self.config, self.nu_log.device
        # The borders of the unit interval would give infinite logarithms.
        area, turn = torch.empty(2, self.size, device=device).uniform_(1e-6, 1 - 1e-6)
        nu = -0.5 * torch.log(area * (config.lru_r_max**2 - config.lru_r_min**2) + config.lru_r_min**2)
        init.copy_(self.nu_log, nu.log())
        init.copy_(self.theta_log, (config.lru_max_phase * turn).log())
        init.copy_(self.gamma_log, 0.5 * torch.log(-torch.expm1(-2 * nu)))
        init.normal_(self.in_proj.weight, std=(2 * config.hidden_size) ** -0.5)
        init.normal_(self.out_proj.weight, std=self.size**-0.5)
        init.normal_(self.D)
        init.normal_(self.glu.weight, std=config.hidden_size**-0.5)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> LRUState:
        wide = torch.promote_types(dtype, torch.float32).to_complex()
        return LRUState(torch.zeros(batch, self.size, device=device, dtype=wide))

    def forward(self, hidden: Tensor, state: LRUState | None, ctx: Context):
        u = self.in_proj(hidden)
        wide = torch.promote_types(u.dtype, torch.float32)
        nu, theta, gamma = (x.to(wide).exp() for x in (self.nu_log, self.theta_log, self.gamma_log))
        real, imaginary = u.to(wide).unflatten(-1, (2, self.size)).mul(gamma).unbind(-2)
        x = torch.complex(real, imaginary)
        eigenvalues = torch.polar(torch.exp(-nu), theta)
        h, last = scan(eigenvalues.expand_as(x), x, None if state is None else state.h, ctx)
        y = self.out_proj(torch.cat([h.real, h.imag], -1).to(hidden.dtype)) + self.D * hidden
        out = F.glu(self.glu(F.gelu(y, approximate="tanh")))
        return out, None if state is None else LRUState(last)


LRUModel, LRUForCausalLM, LRUForSequenceClassification = model_classes(LRUConfig)
