"""Salient: softmax attention to the last tokens, the first ones, and those that a score of the token keeps.

    o_t = sum_j softmax_j(q_t k_j / sqrt(d)) v_j                                       j in C_t
    s_t = W_s x_t                                               a score for each kv head, x_t the input of the layer
    C_t = C_{t-1} + {t}, without the token of the least score among those that are neither sinks nor recent, when full

What matters is decided when a token is written, from its hidden state alone, and never again; so the whole sequence is
computed at once (`kernels/bounded_attention`). That a linear map of the hidden state foretells how much a token will be
looked at is from KVzap (2601.07891), a set of fixed size whose members are evicted by what they got when they were
written from TRIM-KV (Bui et al. 2025), which has gates that decay. A conversion fits W_s in closed form to the
attention that the teacher pays to tokens after they left the window (`conversions/fit/scores.py`).

With W_s = 0 the layer is a window; W_s is not trained, only fitted. Keys keep the rotation of their positions; tokens
that are `sink_distance` back are not seen any more, but sinks, as if from that far. With `ring_bits`, keys and values
are rounded to 4 or 8 bits as soon as they are made, and kept so.

B batch, T time, D hidden_size, H query heads, Hk kv heads, d head_dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import initialization as init

from ...kernels.block_floating_point import quantise
from ...kernels.bounded_attention import BoundedState, Bounds, bounded_attention, bounded_step
from ..core.attention import AttentionProjections
from ..core.heads import model_classes
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState
from ..core.recurrences import one_hot_values
from ..core.registry import register_mixer
from .configuration_salient import SalientConfig


@dataclasses.dataclass
class SalientMemory(MixerState):
    """The tokens that are kept, as the kernel has them."""

    tokens: BoundedState


@register_mixer("salient")
class SalientMixer(Mixer):
    """The equations at the head of this file, between the teacher's projections."""

    kernel = "bounded_attention"
    rotates = True
    paper = "KVzap, arXiv 2601.07891; TRIM-KV, Bui et al. 2025, arXiv 2512.03324"
    branches = ("recent", "salient")
    divides_budget = True
    keeps_by_score = True

    def __init__(self, config: SalientConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.proj, kv_heads = AttentionProjections(config), config.num_key_value_heads
        # No parameter: what is kept has no gradient, so training leaves it as it was fitted.
        self.score_weight: Tensor
        self.register_buffer("score_weight", torch.zeros(kv_heads, config.hidden_size))
        sizes = config.window_sizes[layer_idx] if config.window_sizes else [config.window_size] * kv_heads
        self.lengths, self.sinks = tuple(sizes), config.num_sinks
        self.recent_share, self.bits = config.recent_share, config.ring_bits

    def init_weights(self) -> None:
        init.zeros_(self.score_weight)  # equal scores: the oldest token goes

    def init_from_attention(self, weights: AttentionWeights) -> None:
        self.proj.load(weights)

    @property
    def bounds(self) -> Bounds:
        """How many tokens each kv head keeps now."""
        recents = _share_of(self.lengths, self.recent_share)
        return Bounds(self.lengths, recents, self.sinks, max(self.config.sink_distance, *recents))

    @classmethod
    def recent_tokens(cls, config: SalientConfig, lengths: tuple[int, ...]) -> tuple[int, ...]:
        return _share_of(lengths, config.recent_share)

    @torch.no_grad()
    def set_scores(self, weight: Tensor) -> None:
        self.score_weight.copy_(weight)

    @contextlib.contextmanager
    def only(self, branch: str) -> Iterator[None]:
        """ "recent": the last tokens alone; "salient": sinks and salient tokens, and the current one."""
        if branch not in self.branches:
            with super().only(branch):
                yield
        before, recents = (self.lengths, self.sinks, self.recent_share), self.bounds.recents
        if branch == "recent":
            self.lengths, self.sinks, self.recent_share = recents, 0, 1.0
        else:
            spared = zip(self.lengths, recents, strict=True)
            self.lengths, self.recent_share = tuple(length - recent + 1 for length, recent in spared), 0.0
        try:
            yield
        finally:
            self.lengths, self.sinks, self.recent_share = before

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> SalientMemory:
        width, bits = self.proj.head_dim, None if self.bits is None else tuple(self.bits)
        return SalientMemory(BoundedState.zeros(batch, self.bounds, width, width, dtype, device, bits))

    def mixing_matrix(self, hidden: Tensor, ctx: Context) -> Tensor:
        q, k, v = self.proj.split(hidden)
        call = self._call(q, k, one_hot_values(v, v.shape[2]), hidden, ctx)
        call["k"] = call["k"] if self.bits is None else quantise(call["k"], self.bits[0])
        return bounded_attention(**call, seq_ids=ctx.seq_ids, mask=ctx.mask)[0].transpose(1, 2)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, ctx: Context) -> dict:
        """The kernel's arguments, of heads before rotation."""
        # In place always: a replay decides nothing.
        far = ctx.in_place or bool((ctx.positions >= self.config.sink_distance).any())
        k = ctx.rotary.rotate(k, ctx.positions).to(v.dtype)
        return {
            "q": ctx.rotary.rotate(q, ctx.positions),
            "k": k,
            "v": v,
            "score": F.linear(hidden, self.score_weight.to(hidden.dtype)),
            "bounds": self.bounds,
            "q_sink": ctx.rotary.rotate(q, ctx.positions.clamp(max=self.config.sink_distance)) if far else None,
        }

    def forward(self, hidden: Tensor, state: SalientMemory | None, ctx: Context):
        q, k, v = self.proj.split(hidden)
        call = self._call(q, k, v, hidden, ctx)
        alone = q.shape[1] == 1 and ctx.mask is None and ctx.seq_ids is None
        if state is not None and alone and not torch.is_grad_enabled():
            after = state if ctx.in_place else state.map(Tensor.clone)
            token = {name: x[:, 0] if isinstance(x, Tensor) else x for name, x in call.items()}
            o = bounded_step(**token, state=after.tokens)
            return self.proj.o_proj(o.flatten(1).to(q.dtype)[:, None]), after
        if self.bits is not None:
            call |= {name: quantise(call[name], bits) for name, bits in zip("kv", self.bits, strict=True)}
        bounds: Bounds = call["bounds"]
        if state is None and ctx.mask is None and ctx.seq_ids is None and q.shape[1] <= min(bounds.rows):
            q, k, v = (call[name].transpose(1, 2) for name in "qkv")  # nothing drops out
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            return self.proj.o_proj(o.transpose(1, 2).flatten(-2)), None
        before = None if state is None else state.tokens
        o, after = bounded_attention(**call, initial_state=before, seq_ids=ctx.seq_ids, mask=ctx.mask)
        o = self.proj.o_proj(o.flatten(-2).to(q.dtype))
        return o, None if state is None else SalientMemory(after)


def _share_of(lengths: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(max(1, round(length * share)) for length in lengths)


SalientModel, SalientForCausalLM, SalientForSequenceClassification = model_classes(SalientConfig)
