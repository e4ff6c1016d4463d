"""The layer around a linear state space: one per channel, then a matrix over the channels.

    y   = long_conv(u) + D u                       per channel, the same at all times
    out = GLU(W gelu(y) + b), or W gelu(y) + b

B batch, T time, D channels (hidden_size), N state size, M outputs of a channel.
Sources: S4 (Gu, Goel, Re 2021, section 3.4); the GLU: the authors' code, state-spaces/s4.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..core.mixer import Context, Mixer, MixerState
from ..core.recurrences import state_space
from .configuration_s4 import StateSpaceConfig


@dataclasses.dataclass
class StateSpaceState(MixerState):
    """h: (B, D, states), float32 or complex64 (float64, complex128 in a float64 model)."""

    h: Tensor


def pairs(*shape: int) -> nn.Parameter:
    """A complex parameter of this shape, stored as its real and imaginary parts in a last axis of two."""
    return nn.Parameter(torch.empty(*shape, 2))


def as_complex(x: Tensor) -> Tensor:
    """(..., 2) -> (...), complex64 or complex128."""
    return torch.view_as_complex(x.to(torch.promote_types(x.dtype, torch.float32)).contiguous())


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copies `value`, expanded, into a parameter; complex values into one that `pairs` made."""
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    init.copy_(parameter, value.to(parameter.device, parameter.dtype).expand_as(parameter))


class StateSpaceMixer(Mixer):
    """The equations at the head of this file, for a system that subclasses define.

    Args:
        states: numbers of a channel's state, complex or real. outputs: M. glu: whether W makes values and gates.
    """

    kernel = "long_conv"
    complexity = "T log T / 1"

    def __init__(
        self,
        config: StateSpaceConfig,
        layer_idx: int,
        *,
        states: int,
        is_complex: bool = True,
        outputs: int = 1,
        glu: bool = True,
    ):
        super().__init__(config, layer_idx)
        self.states, self.is_complex, self.glu = states, is_complex, glu
        width = config.hidden_size
        self.log_dt = nn.Parameter(torch.empty(width))
        self.D = nn.Parameter(torch.empty((width,) if outputs == 1 else (width, outputs)))
        self.out_proj = nn.Linear(width * outputs, 2 * width if glu else width)

    def system(self) -> dict[str, Tensor]:
        """a, b, c (and p, q) of `long_conv`, discretised."""
        raise NotImplementedError

    def init_weights(self) -> None:
        init.uniform_(self.log_dt, math.log(self.config.s4_dt_min), math.log(self.config.s4_dt_max))
        init.normal_(self.D)

    def dt(self) -> Tensor:
        """The steps, (D, 1), float32 or float64."""
        return self.log_dt.to(torch.promote_types(self.log_dt.dtype, torch.float32)).exp()[:, None]

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> StateSpaceState:
        kind = torch.promote_types(dtype, torch.complex64 if self.is_complex else torch.float32)
        return StateSpaceState(torch.zeros(batch, self.config.hidden_size, self.states, device=device, dtype=kind))

    def forward(self, hidden: Tensor, state: StateSpaceState | None, ctx: Context):
        y, h = state_space(hidden, self.system(), self.D, None if state is None else state.h, ctx)
        y = self.out_proj(F.gelu(y.flatten(2)))
        return F.glu(y, -1) if self.glu else y, None if state is None else StateSpaceState(h)


class PairedMixer(StateSpaceMixer):
    """A state of N/2 complex numbers a channel, halves of pairs of conjugates, with eigenvalues of negative real part.

    log_A_real, A_imag: (D, N/2), for -exp(log_A_real) + i A_imag. B, C: (D, N/2), complex; y = 2 Re(C h).
    """

    def __init__(self, config: StateSpaceConfig, layer_idx: int):
        half = config.s4_state_size // 2
        super().__init__(config, layer_idx, states=half)
        shape = (config.hidden_size, half)
        self.log_A_real = nn.Parameter(torch.empty(shape))
        self.A_imag = nn.Parameter(torch.empty(shape))
        self.B, self.C = pairs(*shape), pairs(*shape)

    def start_from(self, eigenvalues: Tensor, b: Tensor) -> None:
        """Fresh parameters: these eigenvalues and B (N/2,) in every channel, C complex normal of variance 1."""
        super().init_weights()
        fill(self.log_A_real, (-eigenvalues.real).log())
        fill(self.A_imag, eigenvalues.imag)
        fill(self.B, b)
        init.normal_(self.C, std=0.5**0.5)

    def eigenvalues(self) -> Tensor:
        """(D, N/2), complex64 or complex128."""
        wide = torch.promote_types(self.A_imag.dtype, torch.float32)
        return torch.complex(-self.log_A_real.to(wide).exp(), self.A_imag.to(wide))
