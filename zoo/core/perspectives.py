"""Multiple temporal perspectives: several residual streams through the same layers, joined before the head.

    x^i_t = embedding, for every perspective i = 1 ... P; every layer runs on each of them, its large matrices shared
    y_t = sum_i softmax(W mean_j norm(x^j_t))_i norm(x^i_t)

The streams differ by what layers give them of their own (in RWKV the factors of token shift). As the head is linear,
this is the paper's weighted sum of the streams' logits. The authors start all streams alike, so that only the random W
tells them apart in the first step, and W itself gets its first gradient in the second.

B batch, T time, P perspectives, D hidden_size.
Source: Dumitru, Peteleaza and Surdeanu 2024, "Enhancing Transformer RNNs with Multiple Temporal Perspectives"
(arXiv 2402.02625, section 3), and the authors' code.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Perspectives"]


class Perspectives(nn.Module):
    """Spreads hidden states (B, T, D) into (B, T, P, D), and joins them again by learned weights."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count = count
        self.weigh = nn.Linear(width, count, bias=False)

    def spread(self, hidden: Tensor) -> Tensor:
        """The same for all: (B, T, D) -> (B, T, P, D)."""
        return hidden[:, :, None].expand(-1, -1, self.count, -1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, P, D) -> (B, T, D)."""
        return (self.weigh(hidden.mean(2)).softmax(-1)[..., None].to(hidden.dtype) * hidden).sum(2)
