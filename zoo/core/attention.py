"""Attention projections, and the softmax attention layers that hybrids keep.

B batch, T new tokens, P cached tokens, S = P + T, H query heads, Hk key heads, Hv value heads (Hk
but where said), d head width (dv of values).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.errors import ShapeError
from .configuration import RecurrentConfig
from .layers import RMSNorm
from .mixer import AttentionWeights, Context, Mixer, MixerState
from .registry import register_mixer

__all__ = ["AttentionProjections", "FullAttention", "KeyValueState", "SlidingAttention", "copy_weight"]


class AttentionProjections(nn.Module):
    """q, k, v, o of an attention layer, with its biases and q/k norms.

    Args:
        key_width: channels of a head of q and k. value_width: of v. None: `config.head_dim`, as attention has it.
        heads: of q, of k and of v, where they are not the configuration's attention heads. There are as many heads of
            output, of width value_width, as of queries or of values, whichever is more.
    """

    def __init__(
        self,
        config: RecurrentConfig,
        key_width: int | None = None,
        value_width: int | None = None,
        heads: tuple[int, int, int] | None = None,
    ):
        super().__init__()
        kv_heads = config.num_key_value_heads
        self.num_heads, self.num_kv_heads, self.v_heads = heads or (config.num_attention_heads, kv_heads, kv_heads)
        self.key_width, self.value_width = key_width or config.head_dim, value_width or config.head_dim
        # What a teacher's heads must be, see `load`.
        self.head_dim = config.head_dim if heads is None else self.key_width
        hidden, bias, out_heads = config.hidden_size, config.attention_bias, max(self.num_heads, self.v_heads)
        self.q_proj = nn.Linear(hidden, self.num_heads * self.key_width, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.key_width, bias=bias)
        self.v_proj = nn.Linear(hidden, self.v_heads * self.value_width, bias=bias)
        self.o_proj = nn.Linear(out_heads * self.value_width, hidden, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(self.key_width, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.key_width, config.rms_norm_eps) if config.qk_norm else None

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B, T, D) -> q (B, T, H, d), k (B, T, Hk, d), v (B, T, Hv, dv): normed if configured, not rotated."""
        q = self.q_proj(hidden).unflatten(-1, (self.num_heads, self.key_width))
        k = self.k_proj(hidden).unflatten(-1, (self.num_kv_heads, self.key_width))
        v = self.v_proj(hidden).unflatten(-1, (self.v_heads, self.value_width))
        if self.q_norm is not None:
            # Under autocast the norms' float32 weights would make them wider than v.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return q, k, v

    @torch.no_grad()
    def load(self, weights: AttentionWeights) -> None:
        """Copies a teacher's tensors. A bias or norm that the teacher lacks becomes the neutral one.

        Raises:
            ShapeError: heads or sizes differ, or the teacher has a bias or norm that this layer was built without.
        """
        ours = (self.num_heads, self.num_kv_heads, self.head_dim)
        theirs = (weights.num_heads, weights.num_kv_heads, weights.head_dim)
        if ours != theirs:
            raise ShapeError(
                f"The teacher's attention has (heads, kv heads, head width) {theirs}, the student's layer {ours}; "
                "build the student from the teacher's configuration."
            )
        for name in "qkvo":
            layer = getattr(self, f"{name}_proj")
            copy_weight(layer.weight, getattr(weights, name), f"{name}_proj.weight", None)
            copy_weight(layer.bias, getattr(weights, f"{name}_bias"), f"{name}_proj.bias", 0.0)
        for name in ("q_norm", "k_norm"):
            norm = getattr(self, name)
            copy_weight(None if norm is None else norm.weight, getattr(weights, name), name, 1.0)


def copy_weight(target: Tensor | None, source: Tensor | None, name: str, neutral: float | None) -> None:
    """Copies a teacher's tensor into ours; one that the teacher lacks is filled with `neutral`.

    Raises:
        ShapeError: the shapes differ, or one of the two is missing and there is no neutral value.
    """
    if source is None and target is None:
        return
    if source is None and neutral is not None:
        target.fill_(neutral)
    elif source is None or target is None or source.shape != target.shape:
        shapes = [None if t is None else tuple(t.shape) for t in (source, target)]
        raise ShapeError(f"{name}: the teacher has {shapes[0]}, the student's layer expects {shapes[1]}.")
    else:
        target.copy_(source)


@dataclasses.dataclass
class KeyValueState(MixerState):
    """Keys and values so far, (B, Hk, P, d), rotated; valid (B, P) bool tells padding from tokens, None: all tokens."""

    k: Tensor
    v: Tensor
    valid: Tensor | None = None

    def reset_rows(self, rows: Tensor) -> KeyValueState:
        length = self.k.shape[2]
        valid = self.valid if self.valid is not None else rows.new_ones(rows.shape[0], length)
        return KeyValueState(self.k, self.v, valid & ~rows.to(valid.device)[:, None])


@register_mixer("full_attention")
class FullAttention(Mixer):
    """Softmax attention over every token of the document, by torch's scaled_dot_product_attention."""

    kernel = "scaled_dot_product_attention"
    paper = "Vaswani et al. 2017, arXiv 1706.03762"
    complexity = "T^2 / T"
    rotates = True
    window: int | None = None

    def __init__(self, config: RecurrentConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.proj = AttentionProjections(config)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> KeyValueState:
        heads, widths = self.proj.num_kv_heads, (self.proj.key_width, self.proj.value_width)
        return KeyValueState(*(torch.zeros(batch, heads, 0, width, device=device, dtype=dtype) for width in widths))

    def init_from_attention(self, weights: AttentionWeights) -> None:
        self.proj.load(weights)

    def project(self, hidden: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B, T, D) -> q (B, T, H, d), k (B, T, Hk, d), v (B, T, Hk, dv), rotated."""
        q, k, v = self.proj.split(hidden)
        return ctx.rotary.rotate(q, ctx.positions), ctx.rotary.rotate(k, ctx.positions), v

    def mixing_matrix(self, hidden: Tensor, ctx: Context) -> Tensor:
        """softmax(q k^T / sqrt(d)); rows of padding attend to themselves."""
        q, k, _ = self.project(hidden, ctx)
        q = q.unflatten(2, (k.shape[2], -1))
        scores = torch.einsum("btkgd,bskd->bkgts", q, k).flatten(1, 2) * q.shape[-1] ** -0.5
        mask = attention_mask(ctx, None, q.shape[1], self.window, q.device)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return wide.masked_fill(~mask, -torch.inf).softmax(-1)

    def read_out(self, o: Tensor, hidden: Tensor) -> Tensor:
        """What the heads have read, o (B, T, H, dv), of the input hidden (B, T, D) -> (B, T, D)."""
        return self.proj.o_proj(o.flatten(-2))

    def forward(self, hidden: Tensor, state: KeyValueState | None, ctx: Context):
        q, k, v = self.project(hidden, ctx)
        if not ctx.in_place or state is None:
            o, after = self.attend(q, k, v, state, ctx)
            return self.read_out(o, hidden), after

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o, after = self.attend(q, k, v, state, ctx)
            vars(state).update(vars(after))
            return o

        return self.read_out(ctx.outside(attend, q, k, v), hidden), state

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: KeyValueState | None, ctx: Context):
        """What the heads read, (B, T, H, dv), and the state with the new keys and values."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        past_valid = None
        if state is not None:
            past_valid = state.valid
            k, v = torch.cat([state.k.to(k.dtype), k], 2), torch.cat([state.v.to(v.dtype), v], 2)
        time, span = q.shape[2], k.shape[2]
        plain = past_valid is None and ctx.mask is None and ctx.seq_ids is None
        in_window = self.window is None or span <= self.window
        if plain and in_window and (time == 1 or time == span):
            mask, causal = None, time > 1
        else:
            key = ("attention_mask", self.window, span)
            if key not in ctx.memo:
                ctx.memo[key] = attention_mask(ctx, past_valid, span, self.window, q.device)
            mask, causal = ctx.memo[key], False
        o = _attend(q, k, v, mask, causal).transpose(1, 2)
        return o, None if state is None else self._next_state(k, v, past_valid, ctx)

    def _next_state(self, k: Tensor, v: Tensor, past_valid: Tensor | None, ctx: Context) -> KeyValueState:
        valid = next_valid(ctx, past_valid, k.shape[0], k.shape[2], k.device)
        if self.window is None:
            return KeyValueState(k, v, valid)
        kept = min(self.window - 1, k.shape[2])
        if valid is not None:
            # Push padding to the front, so that the last slots are the last tokens of every row.
            order = valid.to(torch.uint8).argsort(dim=1, stable=True)[:, k.shape[2] - kept :]
            index = order[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            return KeyValueState(k.gather(2, index), v.gather(2, index), valid.gather(1, order))
        start = k.shape[2] - kept
        return KeyValueState(k[:, :, start:].contiguous(), v[:, :, start:].contiguous())


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with grouped heads: (B, H, T, dv)."""
    if q.shape[2] == 1:
        # One token: the queries of a group become the rows of one product (5 times faster on CPU in bfloat16).
        grouped = q.reshape(*k.shape[:2], q.shape[1] // k.shape[1], q.shape[3])
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(*q.shape[:3], v.shape[3])
    options = {"attn_mask": mask, "is_causal": causal, "enable_gqa": q.shape[1] != k.shape[1]}
    width, missing = v.shape[-1], k.shape[-1] - v.shape[-1]
    if missing > 0:  # torch's fused attention is for values as wide as keys
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, missing)), **options)[..., :width]
    return F.scaled_dot_product_attention(q, k, v, **options)


@register_mixer("sliding_attention")
class SlidingAttention(FullAttention):
    """Softmax attention over the last `config.sliding_window` tokens, the current one included."""

    complexity = "T / 1"

    def __init__(self, config: RecurrentConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.window = config.sliding_window


def attention_mask(
    ctx: Context, past_valid: Tensor | None, span: int, window: int | None, device: torch.device
) -> Tensor:
    """Which of the `span` keys (cached ones first) each of the T queries sees: (B or 1, 1, T, span) bool.

    A query always sees itself, so that padding gives a finite output.
    """
    time = ctx.positions.shape[1]
    past = span - time
    step = torch.arange(span, device=device)
    allowed = (step[None, :] <= step[past:, None])[None]
    valid = ctx.mask if ctx.mask is not None else torch.ones(1, time, dtype=torch.bool, device=device)
    if past:
        before = past_valid if past_valid is not None else torch.ones(1, past, dtype=torch.bool, device=device)
        (rows,) = torch.broadcast_shapes(before.shape[:1], valid.shape[:1])
        valid = torch.cat([before.expand(rows, -1), valid.expand(rows, -1)], 1)
    allowed = allowed & valid[:, None, :]
    if ctx.seq_ids is not None:
        allowed = allowed & same_document(ctx.seq_ids, past)
    if window is not None:
        count = valid.long().cumsum(1)
        allowed = allowed & (count[:, past:, None] - count[:, None, :] < window)
    return (allowed | (step[None, :] == step[past:, None])[None])[:, None]


def same_document(seq_ids: Tensor, past: int) -> Tensor:
    """(B, T, past + T) bool: are query and key of one document? Cached keys belong to the call's first one."""
    document = document_index(seq_ids)
    keys = torch.cat([document.new_zeros(document.shape[0], past), document], 1)
    return document[:, :, None] == keys[:, None, :]


def document_index(seq_ids: Tensor) -> Tensor:
    """Runs of equal ids counted from 0: (B, T) int64. An id that comes back later is another document."""
    changed = seq_ids[:, 1:] != seq_ids[:, :-1]
    return F.pad(changed.long().cumsum(1), (1, 0))


def next_valid(ctx: Context, past_valid: Tensor | None, batch: int, span: int, device: torch.device) -> Tensor | None:
    """(B, span) bool: slots that later tokens may see, those of the last document that are tokens; None for all."""
    if ctx.mask is None and past_valid is None and ctx.seq_ids is None:
        return None
    time = ctx.positions.shape[1]
    ones = torch.ones(batch, span, dtype=torch.bool, device=device)
    past = ones[:, : span - time] if past_valid is None else past_valid
    new = ones[:, span - time :] if ctx.mask is None else ctx.mask
    valid = torch.cat([past, new], 1)
    if ctx.seq_ids is not None:
        document = document_index(ctx.seq_ids)
        document = torch.cat([document.new_zeros(batch, span - time), document], 1)
        valid = valid & (document == document[:, -1:])
    return valid
