"""Phi-Mamba's discrete Mamba-2: the Mamba-2 that can be laid beside an attention matrix, head by head.

    C, B, x = causal depthwise convolution of W_C u, W_B u, W_x u        every head its own; no activation
    a_t = exp(-softplus(A_t)),  A_t = w_A u_t                            one number a head and step
    S_t = a_t S_{t-1} + B_t^T x_t;  y_t = C_t S_t + D x_t                S in R^{N x P} per head
    out = W_o (y * silu(z + b_z)),  z = W_z u                            no norm

so a head's output before the gate is y = M x with the lower triangular matrix

    M_ts = C_t B_s a_{s+1} ... a_t + [t = s] D,

which MOHAWK first makes like softmax(q k^T / sqrt(d)). Against Mamba-2: no step size (x is not multiplied by dt), B and
C of each head rather than of all, decays straight from the token with neither A nor a bias, no activation and no norm.

u (B, T, D) hidden states, B batch, T time, H heads, N state size, P channels of a head of x.
Sources: Bick et al. 2024, "Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic Models" (MOHAWK,
Phi-Mamba), and the authors' code; Bick et al. 2025, "Llamba", for the same layer in Llama's blocks.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..core.heads import model_classes
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState
from ..core.projections import ConvolvedProjections
from ..core.recurrences import linear_attention, linear_attention_matrix
from ..core.registry import register_mixer
from .configuration_phi_mamba import PhiMambaConfig

# silu of it is 1: a gate that lets all through.
OPEN_GATE = 1.2784645427610738


@dataclasses.dataclass
class PhiMambaState(MixerState):
    """conv: (B, channels of C, B and x, taps - 1), the last inputs. s: (B, H, N, P), float32 or float64."""

    conv: Tensor
    s: Tensor


@register_mixer("phi_mamba")
class PhiMambaMixer(Mixer):
    """The equations at the head of this file. Of `proj`, q is C, k is B, v is x."""

    kernel = "gated_linear_attention"
    paper = "Bick et al. 2024, arXiv 2408.10189"
    decay_parameters = ("decay.",)

    def __init__(self, config: PhiMambaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, states = config.num_attention_heads, config.phi_mamba_state_size
        self.proj = ConvolvedProjections(
            config,
            states,
            config.head_dim,
            (heads, heads, heads),
            taps=config.ssm_conv_kernel,
            activation="none",
            bias=config.ssm_conv_bias,
        )
        self.decay = nn.Linear(config.hidden_size, heads, bias=False)
        self.gate = nn.Linear(config.hidden_size, heads * config.head_dim)
        self.D = nn.Parameter(torch.ones(heads))

    def init_weights(self) -> None:
        identity = torch.zeros_like(self.proj.conv1d.weight)
        identity[..., -1] = 1.0
        init.copy_(self.proj.conv1d.weight, identity)
        init.ones_(self.D)

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> None:
        """B <- k, x <- v, repeated for the query heads; W_o <- o; C <- q / sqrt(d): C_t B_s is the teacher's score.

        The convolution is the identity, the gate open (z = 0, silu(b_z) = 1), D and the decays as in a fresh layer. The
        factor stands in C because M has none; where q is normed, in the norm's weight.
        """
        weights, scale = weights.repeated(), weights.head_dim**-0.5
        if self.proj.q_norm is None:
            bias = None if weights.q_bias is None else weights.q_bias * scale
            weights = dataclasses.replace(weights, q=weights.q * scale, q_bias=bias)
        else:
            one = torch.ones_like(self.proj.q_norm.weight)
            weights = dataclasses.replace(weights, q_norm=scale * (one if weights.q_norm is None else weights.q_norm))
        self.proj.load(weights)
        self.gate.weight.zero_()
        self.gate.bias.fill_(OPEN_GATE)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> PhiMambaState:
        shape = (batch, self.proj.num_heads, self.proj.key_width, self.proj.value_width)
        s = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return PhiMambaState(self.proj.init_state(batch, device, dtype), s)

    def log_decay(self, hidden: Tensor) -> Tensor:
        """log a of hidden (B, T, D): (B, T, H, 1), float32 or float64."""
        a = self.decay(hidden)
        return -F.softplus(a.to(torch.promote_types(a.dtype, torch.float32)))[..., None]

    def mixing_matrix(self, hidden: Tensor, ctx: Context) -> Tensor:
        c, b, _, _ = self.proj(hidden, None, ctx)
        m = linear_attention_matrix(c, b, self.log_decay(hidden), ctx, scale=1.0)
        return m + self.D.to(m.dtype)[:, None, None] * torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)

    def forward(self, hidden: Tensor, state: PhiMambaState | None, ctx: Context):
        c, b, x, conv = self.proj(hidden, None if state is None else state.conv, ctx)
        before = None if state is None else state.s
        y, s = linear_attention(c, b, x, self.log_decay(hidden), before, ctx, scale=1.0)
        y = (y + self.D.to(y.dtype)[:, None] * x).flatten(-2) * F.silu(self.gate(hidden))
        return self.proj.o_proj(y), None if state is None else PhiMambaState(conv, s)


PhiMambaModel, PhiMambaForCausalLM, PhiMambaForSequenceClassification = model_classes(PhiMambaConfig)
