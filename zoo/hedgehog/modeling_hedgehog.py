"""Hedgehog: softmax attention over a window and the first tokens, a linear state for all the rest.

    o_t = (sum_j e^{s_tj} v_j + phi(q_t) S_t) / (sum_j e^{s_tj} + phi(q_t) z_t)                 j in window or sinks
    [S_t, z_t] = e^g [S_{t-1}, z_{t-1}] + phi(k_{t-w})^T [v_{t-w}, 1]        w the window of the kv head, g <= 0 learned

Two feature maps. "softmax", on rotated heads: phi(x) = [softmax(xW), softmax(-xW)], weights relative to the window's
largest, and a learned factor on the window (Hedgehog, Zhang et al. 2024; LoLCATs, Zhang et al. 2024). "prototype", on
heads before rotation, weights in the window's own units: row f of the state is what softmax attention would have summed
for one prototype query c_f, phi(k)_f = exp(k c_f), and a query mixes the prototypes, phi(q) = softmax(qU + b) e^a.

Without rotation the linear part does not know positions, so it holds at any length; sinks are seen from at most
`sink_distance` tokens away (StreamingLLM, Xiao et al. 2024, keeps positions inside its cache for the same reason).

With `ring_bits`, keys and values are rounded to 4 or 8 bits as soon as they are made, and kept so: the window is two or
three times as long in the same bytes.

B batch, T time, D hidden_size, H query heads, Hk kv heads, d head_dim, F feature width, R ring rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ...kernels.gated_linear_attention import (
    Window,
    WindowState,
    gated_linear_attention,
    ring_positions,
    ring_slots,
)
from ...kernels.microscaling import quantise
from ...kernels.window_step import window_step
from ..core.attention import AttentionProjections
from ..core.mixer import AttentionWeights, Context, Mixer
from ..core.modeling import model_classes
from ..core.registry import register_mixer
from .configuration_hedgehog import HedgehogConfig
from .state_hedgehog import HedgehogState, PackedHedgehogState

__all__ = ["HedgehogForCausalLM", "HedgehogForSequenceClassification", "HedgehogMixer", "HedgehogModel"]

# exp of it is the largest feature: keeps a sum over a million tokens inside float32.
LARGEST_LOGIT = 20.0


@register_mixer("hedgehog")
class HedgehogMixer(Mixer):
    """The equations at the head of this file, between the teacher's projections."""

    kernel = "gated_linear_attention"
    paper = "Zhang et al. 2024, arXiv 2402.04347"
    branches = ("window", "linear")

    def __init__(self, config: HedgehogConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.proj = AttentionProjections(config)
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        sizes = config.window_sizes[layer_idx] if config.window_sizes else [config.window_size] * kv_heads
        self.lengths, self.sinks = tuple(sizes), config.num_sinks
        self.linear_off = False  # see `only`
        self.features = config.feature_widths[layer_idx] if config.feature_widths else config.feature_width
        self.prototypes = config.feature_map == "prototype"
        self.bits = config.ring_bits
        columns = self.features if self.prototypes else self.features // 2
        self.query_map = nn.Parameter(torch.empty(heads, width, columns))
        self.key_map = nn.Parameter(torch.empty(kv_heads, width, columns))
        self.log_decay = nn.Parameter(torch.empty(kv_heads))
        if self.prototypes:
            self.query_bias = nn.Parameter(torch.empty(heads, columns))
            self.log_scale = nn.Parameter(torch.empty(heads))
        else:
            self.log_factor = nn.Parameter(torch.empty(heads))

    def init_weights(self) -> None:
        if self.prototypes:
            # Small prototypes: the linear part starts as an average of what left the window.
            init.normal_(self.query_map, std=self.config.head_dim**-0.5)
            init.normal_(self.key_map, std=self.config.head_dim**-1.0)
            init.zeros_(self.query_bias)
            init.zeros_(self.log_scale)
        else:
            columns = self.query_map.shape[-1]
            identity = torch.eye(self.config.head_dim, columns)
            init.copy_(self.query_map, identity.expand_as(self.query_map))
            init.copy_(self.key_map, identity.expand_as(self.key_map))
            init.zeros_(self.log_factor)
        init.constant_(self.log_decay, -1e-3)

    def init_from_attention(self, weights: AttentionWeights) -> None:
        self.proj.load(weights)

    @contextlib.contextmanager
    def only(self, branch: str) -> Iterator[None]:
        """ "window": window and sinks; "linear": the linear state, and of the window the current token."""
        if branch not in self.branches:
            with super().only(branch):
                yield
        before = self.lengths, self.sinks
        if branch == "linear":
            self.lengths, self.sinks = (1,) * len(self.lengths), 0
        self.linear_off = branch == "window"
        try:
            yield
        finally:
            (self.lengths, self.sinks), self.linear_off = before, False

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> HedgehogState | PackedHedgehogState:
        width, sinks, heads = self.proj.head_dim, self.sinks, len(self.lengths)
        if self.bits is None:
            sizes = self.lengths, sinks, width, self.features, width
            return HedgehogState(WindowState.zeros(batch, *sizes, dtype=dtype, device=device))
        return PackedHedgehogState.zeros(
            batch, heads, self.lengths, sinks, self.features, width, self.bits, device, dtype
        )

    def _query_features(self, q: Tensor) -> Tensor:
        """(B, T, H, d) -> (B, T, H, F)."""
        logits = _accurate(torch.einsum("bthd,hdf->bthf", q, self.query_map.to(q.dtype)))
        if self.prototypes:
            features = (logits + self.query_bias).softmax(-1) * self.log_scale.exp()[:, None]
        else:
            features = torch.cat([logits.softmax(-1), (-logits).softmax(-1)], -1)
        return features * 0 if self.linear_off else features

    def _key_features(self, k: Tensor) -> Tensor:
        """(B, T, Hk, d) -> (B, T, Hk, F)."""
        return torch.stack([self._key_features_of(head, k[:, :, head]) for head in range(k.shape[2])], 2)

    def _key_features_of(self, head: int, k: Tensor) -> Tensor:
        """Keys (B, n, d) of one kv head -> (B, n, F)."""
        return self._features_of(k @ self.key_map[head].to(k.dtype))

    def _features_of(self, logits: Tensor) -> Tensor:
        """Of keys times the key map."""
        logits = _accurate(logits)
        if not self.prototypes:
            return torch.cat([logits.softmax(-1), (-logits).softmax(-1)], -1)
        return logits.clamp(max=LARGEST_LOGIT).exp()

    def _ring_features(self, state: WindowState, ctx: Context) -> Tensor:
        """Features (B, R, F) of the keys in the rings."""
        keys = state.ring_k[:, :, None]
        if self.prototypes:
            keys = ctx.rotary.unrotate(keys, ring_positions(state.count, self.lengths))
        parts = keys[:, :, 0].split(list(self.lengths), 1)
        features = [self._key_features_of(head, part) for head, part in enumerate(parts)]
        return torch.cat(features, 1).to(state.s.dtype)

    def _leaving_features(self, state: WindowState | PackedHedgehogState, ctx: Context, dtype: torch.dtype) -> Tensor:
        """Features (B, Hk, F) of the keys whose rows the next token takes."""
        slots = ring_slots(state.count, self.lengths)
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        ring = state.ring_k
        keys = ring[rows, slots] if isinstance(ring, Tensor) else ring.select(rows, slots).unpack(dtype)
        if self.prototypes:
            positions = state.count[:, None] - slots.new_tensor(self.lengths)
            keys = ctx.rotary.unrotate(keys[:, :, None], positions)[:, :, 0]
        return self._features_of(torch.einsum("bhd,hdf->bhf", keys, self.key_map.to(keys.dtype)))

    def forward(self, hidden: Tensor, state: HedgehogState | PackedHedgehogState | None, ctx: Context):
        q, k, v = self.proj.split(hidden)
        turned_q, turned_k = ctx.rotary.rotate(q, ctx.positions), ctx.rotary.rotate(k, ctx.positions).to(v.dtype)
        far = ctx.positions.max() >= self.config.sink_distance
        near = ctx.positions.clamp(max=self.config.sink_distance)
        sink_q = ctx.rotary.rotate(q, near) if bool(far) else None
        factor = None if self.prototypes else self.log_factor.exp()
        anchor = "absolute" if self.prototypes else "max"
        log_decay = self.log_decay.clamp(max=0)
        alone = q.shape[1] == 1 and ctx.mask is None and ctx.seq_ids is None
        if state is not None and alone and not torch.is_grad_enabled():
            after = state if ctx.in_place else state.map(Tensor.clone)
            memory = after.window if isinstance(after, HedgehogState) else after
            o = window_step(
                self._query_features(q if self.prototypes else turned_q)[:, 0],
                turned_q[:, 0],
                turned_k[:, 0],
                v[:, 0],
                memory,
                lengths=self.lengths,
                sinks=self.sinks,
                far=None if sink_q is None else sink_q[:, 0],
                leaving=self._leaving_features(memory, ctx, v.dtype),
                g=log_decay,
                factor=factor,
                anchor=anchor,
            )
            return self.proj.o_proj(o.flatten(1).to(q.dtype)[:, None]), after
        if self.bits is not None:
            turned_k, v = quantise(turned_k, self.bits[0]), quantise(v, self.bits[1])
            k = ctx.rotary.unrotate(turned_k, ctx.positions) if self.prototypes else k
        base_q, base_k = (q, k) if self.prototypes else (turned_q, turned_k)
        before = None if state is None else state.unpack(v.dtype)
        window = Window(
            q=turned_q,
            k=turned_k,
            lengths=self.lengths,
            sinks=self.sinks,
            q_sink=sink_q,
            factor=factor,
            anchor=anchor,
            ring_features=None if before is None else self._ring_features(before, ctx),
        )
        o, after = gated_linear_attention(
            self._query_features(base_q),
            self._key_features(base_k),
            v,
            log_decay,
            window=window,
            initial_state=before,
            seq_ids=ctx.seq_ids,
            mask=ctx.mask,
        )
        o = self.proj.o_proj(o.flatten(-2).to(q.dtype))
        if state is None:
            return o, None
        return o, HedgehogState(after) if self.bits is None else PackedHedgehogState.of(after, *self.bits)


def _accurate(x: Tensor) -> Tensor:
    """At least float32: exponentials of it are features."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


HedgehogModel, HedgehogForCausalLM, HedgehogForSequenceClassification = model_classes(HedgehogConfig)
