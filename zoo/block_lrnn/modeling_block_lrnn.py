"""A linear RNN whose transition is block-diagonal and made out of the token.

    M_t = W_2 relu(W_1 x_t)                         as H blocks of b x b numbers
    A_t = (M_t - mean of each column) / max over the block's columns c of |c|_p
    u_t = V_2 relu(V_1 x_t)
    h_t = A_t h_{t-1} + u_t;  h_0 learned           h in R^b per block
    out = h                                         (projected to D where b does not divide D)

What distinguishes it: A_t mixes the channels of a block and need not be symmetric or positive, so a layer can take a
block through the states of an automaton, token by token; diagonal recurrences cannot subtract or swap. With p = 1.2 no
column of A_t is longer than 1 in a norm a little below the 1-norm, which keeps products of many A_t in range.

B batch, T time, D hidden_size, H blocks of b channels.
Source: Fan, Chi and Rudnicky 2023, "Advancing Regular Language Reasoning in Linear Recurrent Neural Networks", the
proposed method; means, networks and the learned start as in the authors' code.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..core.heads import model_classes
from ..core.mixer import Context, Mixer, MixerState
from ..core.recurrences import scan_blocks
from ..core.registry import register_mixer
from .configuration_block_lrnn import BlockLRNNConfig

SMALLEST = 1e-12  # a norm that is divided by: columns without any variation


@dataclasses.dataclass
class BlockLRNNState(MixerState):
    """h: (B, H, b), float32 (float64 in a float64 model). Zero before the first token; h_0 comes in with that."""

    h: Tensor


@register_mixer("block_lrnn")
class BlockLRNNMixer(Mixer):
    """The equations at the head of this file."""

    kernel = "block_scan"
    paper = "Fan et al. 2023, arXiv 2309.07412"

    def __init__(self, config: BlockLRNNConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden, inner, self.width = config.hidden_size, config.block_lrnn_inner_size, config.block_lrnn_block_size
        self.blocks = -(-hidden // self.width)
        channels = self.blocks * self.width
        self.transition_in = nn.Linear(hidden, inner)
        self.transition_out = nn.Linear(inner, channels * self.width)
        self.value_in = nn.Linear(hidden, channels)
        self.value_out = nn.Linear(channels, channels)
        self.start = nn.Parameter(torch.zeros(self.blocks, self.width))
        self.out_proj = nn.Linear(channels, hidden, bias=False) if channels != hidden else None

    def init_weights(self) -> None:
        for layer in (self.transition_in, self.transition_out, self.value_in, self.value_out):
            bound = layer.in_features**-0.5
            init.uniform_(layer.weight, -bound, bound)
            init.uniform_(layer.bias, -bound, bound)
        init.normal_(self.start, std=1.0)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> BlockLRNNState:
        wide = torch.promote_types(dtype, torch.float32)
        return BlockLRNNState(torch.zeros(batch, self.blocks, self.width, device=device, dtype=wide))

    def forward(self, hidden: Tensor, state: BlockLRNNState | None, ctx: Context):
        a = self._transitions(hidden)
        u = self.value_out(torch.relu(self.value_in(hidden))).to(a.dtype).unflatten(-1, (self.blocks, self.width))
        # A document's first token also carries what its transition makes of the learned start.
        first = (ctx.positions == 0)[..., None, None]
        u = torch.where(first, u + (a * self.start.to(a.dtype)[:, None]).sum(-1), u)
        h, after = scan_blocks(a, u, None if state is None else state.h, ctx)
        y = h.flatten(-2).to(hidden.dtype)
        y = y if self.out_proj is None else self.out_proj(y)
        return y, None if state is None else BlockLRNNState(after)

    def _transitions(self, hidden: Tensor) -> Tensor:
        """A: (B, T, H, b, b), float32 (float64 for float64)."""
        m = self.transition_out(torch.relu(self.transition_in(hidden)))
        m = m.to(torch.promote_types(m.dtype, torch.float32)).unflatten(-1, (self.blocks, self.width, self.width))
        m = m - m.mean(-2, keepdim=True)
        norms = torch.linalg.vector_norm(m, self.config.block_lrnn_norm, dim=-2, keepdim=True)
        return m / norms.amax(-1, keepdim=True).clamp(min=SMALLEST)


BlockLRNNModel, BlockLRNNForCausalLM, BlockLRNNForSequenceClassification = model_classes(BlockLRNNConfig)
