"""LSSL: a linear state-space layer with a dense, trained matrix.

    h' = A h + B u                        A in R^{N x N}, B in R^N: one of each a layer, started from HiPPO
    h_t = (1 - dt/2 A)^-1 ((1 + dt/2 A) h_{t-1} + dt B u_t)     bilinear, dt is each channel's own
    y_t = C h_t + D u_t                   C in R^{M x N}, D in R^M of each channel
    out = W gelu(y) + b                   over all M outputs of all channels

The paper keeps A in a class of structured matrices so as to multiply by it fast; here it is any matrix. It is S4's
ancestor: S4 takes the same HiPPO matrix apart into diagonal plus low rank, with one of its own per channel.

N state size, M outputs of a channel.
Source: Gu et al. 2021, "Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers",
equation 3 with alpha = 1/2 (bilinear), section 3 (dt and A are learned) and section 5 (the layer: M outputs, GELU and
a linear mix of channels). One A for all channels of a layer: the authors' code, state-spaces/s4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..core.heads import model_classes
from ..core.registry import register_mixer
from ..s4.hippo import HIPPO
from ..s4.state_space import StateSpaceMixer, fill
from .configuration_lssl import LSSLConfig


@register_mixer("lssl")
class LSSLMixer(StateSpaceMixer):
    """The equations at the head of this file."""

    paper = "Gu et al. 2021, arXiv 2110.13985"

    def __init__(self, config: LSSLConfig, layer_idx: int):
        size, outputs = config.s4_state_size, config.lssl_outputs
        super().__init__(config, layer_idx, states=size, is_complex=False, outputs=outputs, glu=False)
        self.A = nn.Parameter(torch.empty(size, size))
        self.B = nn.Parameter(torch.empty(size))
        self.C = nn.Parameter(torch.empty(*self.D.shape, size))
        # Of the last call without gradients: what it was made from, and the matrices (D, N, N) and (D, N).
        self._solved: tuple[list[Tensor], tuple[Tensor, Tensor]] | None = None

    def init_weights(self) -> None:
        super().init_weights()
        a, b = HIPPO[self.config.lssl_init](self.config.s4_state_size)
        fill(self.A, a)
        fill(self.B, b)
        init.normal_(self.C)

    def system(self) -> dict[str, Tensor]:
        a, b = self._solve() if torch.is_grad_enabled() or torch.compiler.is_compiling() else self._solve_once()
        return {"a": a, "b": b, "c": self.C}

    def _solve(self) -> tuple[Tensor, Tensor]:
        dt = self.dt()[..., None]
        half = dt / 2 * self.A.to(dt.dtype)
        one = torch.eye(half.shape[-1], device=half.device, dtype=half.dtype)
        forward = (dt * self.B.to(dt.dtype)[:, None]).expand(-1, -1, 1)
        a, b = torch.linalg.solve(one - half, torch.cat([one + half, forward], -1)).split([half.shape[-1], 1], -1)
        return a, b[..., 0]

    def _solve_once(self) -> tuple[Tensor, Tensor]:
        """Solving takes longer than all the rest of a decoded token; the few parameters tell whether it must be."""
        made_from = [self.A, self.B, self.log_dt]
        if self._solved is not None:
            before, solution = self._solved
            alike = (x.dtype == y.dtype and x.device == y.device for x, y in zip(made_from, before, strict=True))
            if all(alike) and all(torch.equal(x, y) for x, y in zip(made_from, before, strict=True)):
                return solution
        self._solved = [x.detach().clone() for x in made_from], self._solve()
        return self._solved[1]


LSSLModel, LSSLForCausalLM, LSSLForSequenceClassification = model_classes(LSSLConfig)
