"""TOVA: a Transformer as a recurrent network with a bounded number of states, its cache.

    K_t, V_t = keys and values of the tokens in C_{t-1} and of token t       C_{t-1} at most N tokens, one set a layer
    a^h_t    = softmax(q^h_t K_t^T / sqrt(d));  o^h_t = a^h_t V_t
    C_t      = C_{t-1} + {t}, without argmin_j mean_h a^h_tj if that were more than N

"Token omission via attention": what the newest query weighs least, on average over the heads of the layer, is dropped,
be it the newest token. No sinks and no recent tokens are set aside; the policy finds those that matter. Up to N tokens
this is the teacher's attention exactly, with its weights as they are.

Keys keep the rotation of their positions, so a token that stays for long is seen from farther away than training had
it; positions are the teacher's limit, not the cache's. The authors read a prompt with full attention and drop all at
once after its last token. Here every token drops its own, as the policy is defined, so that it makes no difference in
how many calls the tokens come.

At many tokens a call, the tokens that drop out are found one after the other from the scores alone, without gradients;
what each query then sees is a mask of one ordinary attention.

B batch, T time, H query heads, Hk kv heads, d head_dim, N states, S keys in reach: N + 1 cached ones, then new ones.
Source: Oren et al. 2024, "Transformers are Multi-State RNNs", section 3.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention import AttentionProjections, document_index
from ..core.heads import model_classes
from ..core.mixer import AttentionWeights, Context, Mixer, MixerState
from ..core.registry import register_mixer
from .configuration_tova import TovaConfig

# Tokens that are laid out at once; memory is this times N plus this.
PIECE = 512


@dataclasses.dataclass
class TovaState(MixerState):
    """k, v: (B, Hk, N + 1, d), the keys rotated. kept: (B, N + 1) bool, which hold a token; at least one does not."""

    k: Tensor
    v: Tensor
    kept: Tensor


@register_mixer("tova")
class TovaMixer(Mixer):
    """The equations at the head of this file."""

    kernel = "scaled_dot_product_attention"
    rotates = True
    paper = "Oren et al. 2024, arXiv 2401.06104"

    def __init__(self, config: TovaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.proj = AttentionProjections(config)
        self.states = config.tova_states

    def init_from_attention(self, weights: AttentionWeights) -> None:
        """All of the teacher's attention; nothing is new."""
        self.proj.load(weights)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> TovaState:
        shape = (batch, self.proj.num_kv_heads, self.states + 1, self.proj.head_dim)
        k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return TovaState(k, v, torch.zeros(batch, self.states + 1, dtype=torch.bool, device=device))

    def forward(self, hidden: Tensor, state: TovaState | None, ctx: Context):
        q, k, v = self.proj.split(hidden)
        q, k = ctx.rotary.rotate(q, ctx.positions), ctx.rotary.rotate(k, ctx.positions).to(v.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if ctx.in_place and state is not None:
            o = self._step(q, k, v, state)
        elif state is None and ctx.mask is None and ctx.seq_ids is None and q.shape[2] <= self.states:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        else:
            o, after = self._pieces(q, k, v, state or self.init_state(len(q), q.device, v.dtype), ctx)
            state = None if state is None else after
        return self.proj.o_proj(o.transpose(1, 2).flatten(-2)), state

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: TovaState) -> Tensor:
        """One token, (B, H or Hk, 1, d), into the state in place: its output."""
        rows = torch.arange(len(q), device=q.device)
        free = state.kept.to(torch.uint8).argmin(1)
        state.k[rows, :, free], state.v[rows, :, free] = k[:, :, 0].to(state.k.dtype), v[:, :, 0].to(state.v.dtype)
        state.kept[rows, free] = True
        weights = self._scores(q, state.k).masked_fill(~state.kept[:, None, None], -torch.inf).softmax(-1)
        least = weights[:, :, 0].mean(1).masked_fill(~state.kept, torch.inf).argmin(1)
        state.kept[rows, least] = state.kept.sum(1) <= self.states
        groups = weights.unflatten(1, (k.shape[1], -1))[:, :, :, 0].to(v.dtype)
        return (groups @ state.v.to(v.dtype)).flatten(1, 2)[:, :, None]

    def _pieces(self, q: Tensor, k: Tensor, v: Tensor, state: TovaState, ctx: Context) -> tuple[Tensor, TovaState]:
        """Many tokens, with documents and padding: their outputs (B, H, T, d) and the state after them."""
        batch, time = q.shape[0], q.shape[2]
        document = torch.zeros(batch, time, dtype=torch.int64, device=q.device)
        if ctx.seq_ids is not None:
            document = document_index(ctx.seq_ids).expand(batch, -1)
        token = torch.ones_like(document).bool() if ctx.mask is None else ctx.mask.expand(batch, -1)
        # Of every key its document, -1 for none. What is cached belongs to the call's first document.
        owner = torch.where(state.kept, document[:, :1], -1)
        past_k, past_v, outputs = state.k.to(k.dtype), state.v.to(v.dtype), []
        for cut in (slice(start, start + PIECE) for start in range(0, time, PIECE)):
            past_k, past_v = torch.cat([past_k, k[:, :, cut]], 2), torch.cat([past_v, v[:, :, cut]], 2)
            owner = torch.cat([owner, torch.where(token, document, -1)[:, cut]], 1)
            seen, kept = self._select(q[:, :, cut], past_k, owner, document[:, cut], token[:, cut])
            grouped = q.shape[1] != k.shape[1]
            outputs.append(
                F.scaled_dot_product_attention(
                    q[:, :, cut], past_k, past_v, attn_mask=seen[:, None], enable_gqa=grouped
                )
            )
            order = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.states + 1]
            index = order[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            past_k, past_v, kept = past_k.gather(2, index), past_v.gather(2, index), kept.gather(1, order)
            owner = owner.gather(1, order).masked_fill(~kept, -1)
        return torch.cat(outputs, 2), TovaState(past_k, past_v, kept)

    @torch.no_grad()
    def _select(self, q: Tensor, k: Tensor, owner: Tensor, document: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """What the queries see, (B, T, S) bool, and which keys are left after the last of them, (B, S).

        Args:
            q: (B, H, T, d), the last T of the keys k (B, Hk, S, d). owner: (B, S) document of every key, -1 for none.
            document: (B, T). token: (B, T) bool, False for padding, which drops nothing.
        """
        time, span = q.shape[2], k.shape[2]
        step = torch.arange(span, device=q.device)
        now = step[span - time :, None]
        seen = (owner[:, None] == document[:, :, None]) & (step <= now)
        dropped = torch.zeros_like(owner, dtype=torch.bool)
        full = ((seen.sum(-1) > self.states) & token).any(0).nonzero()
        if len(full):
            scores, rows = self._scores(q, k), torch.arange(len(q), device=q.device)
            for t in range(int(full[0]), time):
                seen[:, t] &= ~dropped
                weights = scores[:, :, t].masked_fill(~seen[:, None, t], -torch.inf).softmax(-1).mean(1)
                least = weights.masked_fill(~seen[:, t], torch.inf).argmin(1)
                dropped[rows, least] |= (seen[:, t].sum(1) > self.states) & token[:, t]
        # A query always sees itself, so that padding gives a finite output.
        return seen | (step == now), (owner == document[:, -1:]) & ~dropped

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q k^T / sqrt(d), (B, H, T, S), float32 or float64."""
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
        grouped = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
        return (grouped @ k[:, :, None].transpose(-1, -2)).flatten(1, 2)


TovaModel, TovaForCausalLM, TovaForSequenceClassification = model_classes(TovaConfig)
