"""What the mixers with a delta rule have in common: DeltaNet, Gated DeltaNet and Kimi Delta Attention.

    q, k, v = activation(convolution(W x))           each channel over the last few tokens
    q_t, n_t = q_t / |q_t|, k_t / |k_t|              per head
    beta_t = sigmoid(W_b x_t)                        per head; times 2 to allow negative eigenvalues
    S_t = (I - beta_t n_t n_t^T) diag(alpha_t) S_{t-1} + beta_t n_t^T v_t        S in R^{K x V} per head
    o_t = W_o (RMSNorm(K^-1/2 q_t S_t) * activation(gate(x_t)))                  norm per head

They differ in alpha (none, one a head, one a channel) and in the gate. A token first lets the state forget, and then
replaces a share beta of what is stored under n by v.

B batch, T time, D hidden_size, Hq, Hk, Hv heads of queries, keys and values, K key width, V value width. There is a
state for each head of values; fewer heads of keys are repeated; more heads of queries share a state in groups.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration import RecurrentConfig
from .mixer import AttentionWeights, Context, Mixer, MixerState
from .projections import ConvolvedProjections, l2_norm
from .recurrences import delta

__all__ = ["DeltaMixer", "DeltaSizes", "DeltaState", "GatedHeadNorm", "init_decay"]

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


class GatedHeadNorm(nn.Module):
    """weight * x / rms(x) over the last dimension, times activation(gate) where there is a gate; float32 inside."""

    def __init__(self, width: int, eps: float, activation: str = "silu"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.activation = eps, activation

    def forward(self, x: Tensor, gate: Tensor | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps))
        if gate is not None:
            wide = wide * ACTIVATIONS[self.activation](gate.to(wide.dtype))
        return wide.to(x.dtype)


def init_decay(a_log: nn.Parameter, dt_bias: nn.Parameter, least: float) -> None:
    """A uniform in [least, 16] and softplus(dt_bias) log-uniform in [0.001, 0.1], as Mamba-2 starts exp(-A dt)."""
    init.copy_(a_log, torch.empty_like(a_log).uniform_(least, 16).log())
    dt = torch.empty_like(dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
    init.copy_(dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


@dataclasses.dataclass(frozen=True)
class DeltaSizes:
    """Hq, Hk, Hv, K, V; taps of the convolutions, and the activation after them ("silu" or "none")."""

    q_heads: int
    k_heads: int
    v_heads: int
    key_dim: int
    value_dim: int
    taps: int
    activation: str

    @classmethod
    def of(cls, config: RecurrentConfig, prefix: str) -> DeltaSizes:
        """From the fields that begin with a prefix."""
        names = ("num_heads", "k_heads", "v_heads", "key_dim", "value_dim", "conv_kernel", "conv_activation")
        return cls(*(getattr(config, f"{prefix}_{name}") for name in names))


@dataclasses.dataclass
class DeltaState(MixerState):
    """conv: (B, channels of q, k and v, taps - 1), the last inputs. s: (B, Hv, K, V), float32 or float64."""

    conv: Tensor
    s: Tensor


class DeltaMixer(Mixer):
    """The equations at the head of this file; an architecture adds `log_decay` and `gate`.

    Args:
        beta_limit: 1, or 2 for eigenvalues of the transition down to -1 (Grazzi et al. 2024).
    """

    kernel = "delta_rule"

    def __init__(
        self,
        config: RecurrentConfig,
        layer_idx: int,
        sizes: DeltaSizes,
        beta_limit: float,
        gate_activation: str = "silu",
    ):
        super().__init__(config, layer_idx)
        self.sizes, self.beta_limit = sizes, beta_limit
        heads = sizes.q_heads, sizes.k_heads, sizes.v_heads
        self.proj = ConvolvedProjections(
            config, sizes.key_dim, sizes.value_dim, heads, taps=sizes.taps, activation=sizes.activation
        )
        self.b_proj = nn.Linear(config.hidden_size, sizes.v_heads, bias=False)
        self.norm = GatedHeadNorm(sizes.value_dim, config.rms_norm_eps, gate_activation)

    def log_decay(self, hidden: Tensor) -> Tensor | None:
        """log alpha of hidden (B, T, D): (B, T, Hv, 1) or (B, T, Hv, K), float32 or wider; None for no decay."""

    def gate(self, hidden: Tensor) -> Tensor | None:
        """Of the output: (B, T, heads of output * V); None for no gate."""

    def init_from_attention(self, weights: AttentionWeights) -> None:
        """W_q <- q, W_k <- k, W_v <- v, W_o <- o, and the convolution becomes the identity.

        With the fields of `student_fields`, which leave out the activation, the layer so starts with the teacher's
        values, and with the directions of its queries and keys, not rotated.
        """
        self.proj.load(weights)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> DeltaState:
        shape = (batch, self.sizes.v_heads, self.sizes.key_dim, self.sizes.value_dim)
        s = torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return DeltaState(self.proj.init_state(batch, device, dtype), s)

    def forward(self, hidden: Tensor, state: DeltaState | None, ctx: Context):
        q, k, v, conv = self.proj(hidden, None if state is None else state.conv, ctx)
        q, n = self._for_states(l2_norm(q)), self._for_states(l2_norm(k))
        beta = self.b_proj(hidden)
        beta = (self.beta_limit * torch.sigmoid(beta.to(torch.promote_types(beta.dtype, torch.float32))))[..., None]
        learned, g = (beta * n).to(v.dtype), self.log_decay(hidden)
        read = n if g is None else (g.exp() * n).to(v.dtype)
        o, s = delta(q, learned, v, -learned, read, g, None if state is None else state.s, ctx)
        gate = self.gate(hidden)
        o = self.norm(o, None if gate is None else gate.unflatten(-1, o.shape[-2:]))
        return self.proj.o_proj(o.flatten(-2)), None if state is None else DeltaState(conv, s)

    def _for_states(self, x: Tensor) -> Tensor:
        """(B, T, heads, K), repeated to the heads of the states where they are fewer."""
        times = self.sizes.v_heads // x.shape[-2]
        return x if times <= 1 else x.repeat_interleave(times, -2)
