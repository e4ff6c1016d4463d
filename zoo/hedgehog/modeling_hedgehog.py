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
from torch import Tensor

from ...kernels.block_floating_point import quantise
from ...kernels.gated_linear_attention import Window, WindowState, gated_linear_attention, ring_positions
from ...kernels.window_step import leaving_keys, window_step
from ..core.attention import AttentionProjections
from ..core.heads import model_classes
from ..core.mixer import AttentionWeights, Context
from ..core.recurrences import one_hot_values
from ..core.registry import register_mixer
from .configuration_hedgehog import HedgehogConfig
from .features_hedgehog import FeatureMaps
from .state_hedgehog import HedgehogState, PackedHedgehogState


@register_mixer("hedgehog")
class HedgehogMixer(FeatureMaps):
    """The equations at the head of this file, between the teacher's projections."""

    kernel = "gated_linear_attention"
    rotates = True
    paper = "Zhang et al. 2024, arXiv 2402.04347"
    branches = ("window", "linear")
    decay_parameters = ("log_decay",)
    divides_budget = True

    def __init__(self, config: HedgehogConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.proj, kv_heads = AttentionProjections(config), config.num_key_value_heads
        sizes = config.window_sizes[layer_idx] if config.window_sizes else [config.window_size] * kv_heads
        self.lengths, self.sinks = tuple(sizes), config.num_sinks
        self.bits = config.ring_bits

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
        keys = leaving_keys(state, lengths=self.lengths, dtype=dtype)
        if self.prototypes:
            positions = state.count[:, None] - state.count.new_tensor(self.lengths)
            keys = ctx.rotary.unrotate(keys[:, :, None], positions)[:, :, 0]
        return self._features_of(torch.einsum("bhd,hdf->bhf", keys, self.key_map.to(keys.dtype)))

    def mixing_matrix(self, hidden: Tensor, ctx: Context) -> Tensor:
        q, k, v = self.proj.split(hidden)
        return self._whole(q, k, one_hot_values(v, v.shape[2]), None, ctx)[0].transpose(1, 2)

    def _window(self, q: Tensor, k: Tensor, dtype: torch.dtype, ctx: Context) -> Window:
        """The exact part, of heads before rotation."""
        # In place always: a replay decides nothing.
        far = ctx.in_place or bool((ctx.positions >= self.config.sink_distance).any())
        return Window(
            q=ctx.rotary.rotate(q, ctx.positions),
            k=ctx.rotary.rotate(k, ctx.positions).to(dtype),
            lengths=self.lengths,
            sinks=self.sinks,
            q_sink=ctx.rotary.rotate(q, ctx.positions.clamp(max=self.config.sink_distance)) if far else None,
            factor=None if self.prototypes else self.log_factor.exp(),
            anchor="absolute" if self.prototypes else "max",
        )

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, before: WindowState | None, ctx: Context):
        """Outputs (B, T, H, dv) of heads before rotation, and the state after them."""
        window = self._window(q, k, v.dtype, ctx)
        if self.bits is not None:
            window.k = quantise(window.k, self.bits[0])
            k = ctx.rotary.unrotate(window.k, ctx.positions) if self.prototypes else k
        if before is not None:
            window.ring_features = self._ring_features(before, ctx)
        return gated_linear_attention(
            self._query_features(q if self.prototypes else window.q),
            self._key_features(k if self.prototypes else window.k),
            v,
            self.log_decay.clamp(max=0),
            window=window,
            initial_state=before,
            seq_ids=ctx.seq_ids,
            mask=ctx.mask,
        )

    def _step(self, q: Tensor, k: Tensor, v: Tensor, memory: WindowState | PackedHedgehogState, ctx: Context) -> Tensor:
        """Outputs (B, H, dv) of one token; `memory` is changed in place."""
        window = self._window(q, k, v.dtype, ctx)
        return window_step(
            self._query_features(q if self.prototypes else window.q)[:, 0],
            window.q[:, 0],
            window.k[:, 0],
            v[:, 0],
            memory,
            lengths=self.lengths,
            sinks=self.sinks,
            far=None if window.q_sink is None else window.q_sink[:, 0],
            leaving=self._leaving_features(memory, ctx, v.dtype),
            g=self.log_decay.clamp(max=0),
            factor=window.factor,
            anchor=window.anchor,
        )

    def forward(self, hidden: Tensor, state: HedgehogState | PackedHedgehogState | None, ctx: Context):
        q, k, v = self.proj.split(hidden)
        alone = q.shape[1] == 1 and ctx.mask is None and ctx.seq_ids is None
        if state is not None and alone and not torch.is_grad_enabled():
            after = state if ctx.in_place else state.map(Tensor.clone)
            o = self._step(q, k, v, after.window if isinstance(after, HedgehogState) else after, ctx)
            return self.proj.o_proj(o.flatten(1).to(q.dtype)[:, None]), after
        if self.bits is not None:
            v = quantise(v, self.bits[1])
        o, after = self._whole(q, k, v, None if state is None else state.unpack(v.dtype), ctx)
        o = self.proj.o_proj(o.flatten(-2).to(q.dtype))
        if state is None:
            return o, None
        return o, HedgehogState(after) if self.bits is None else PackedHedgehogState.of(after, *self.bits)


HedgehogModel, HedgehogForCausalLM, HedgehogForSequenceClassification = model_classes(HedgehogConfig)
