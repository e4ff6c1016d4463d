"""Random calls of gated linear attention with a window, and their results as lists, for the tests of windows."""

from __future__ import annotations

from dataclasses import fields

import torch

from rnnzoo.kernels.gated_linear_attention import Window, gated_linear_attention, ring_positions

__all__ = ["Layer", "assert_close", "flat", "gradients"]


class Layer:
    """Random inputs of one call, which can be cut in time, row by row or by tokens."""

    def __init__(
        self, seed, batch, time, lengths, group, width, sinks, anchor="absolute", sharp=True, dtype=torch.float64
    ):
        torch.manual_seed(seed)
        kv_heads, heads, key_width, value_width = len(lengths), len(lengths) * group, 4, 3
        self.lengths, self.sinks, self.anchor, self.width = lengths, sinks, anchor, width

        def leaf(*shape, positive=False):
            x = torch.randn(*shape, dtype=dtype)
            return (x.exp() if positive else x).requires_grad_()

        self.over_time = {
            "q": leaf(batch, time, heads, width, positive=True),
            "k": leaf(batch, time, kv_heads, width, positive=True),
            "v": leaf(batch, time, kv_heads, value_width),
            "wq": leaf(batch, time, heads, key_width),
            "wk": leaf(batch, time, kv_heads, key_width),
            "q_sink": leaf(batch, time, heads, key_width),
        }
        self.constant = {"g": leaf(kv_heads), "factor": leaf(heads, positive=True)}
        self.constant["g"] = (-self.constant["g"].detach().exp()).requires_grad_()

    def leaves(self):
        return list(self.over_time.values()) + list(self.constant.values())

    def run(self, pick=lambda x: x, state=None, ring_features=None, **options):
        part = {name: pick(x) for name, x in self.over_time.items()}
        window = Window(
            q=part["wq"],
            k=part["wk"],
            lengths=self.lengths,
            sinks=self.sinks,
            q_sink=part["q_sink"],
            factor=self.constant["factor"],
            anchor=self.anchor,
            ring_features=ring_features,
        )
        return gated_linear_attention(
            part["q"], part["k"], part["v"], self.constant["g"], window=window, initial_state=state, **options
        )

    def features_in_rings(self, count, tokens_before):
        """(B, R, K): features of the tokens in the rings, of the valid ones `tokens_before` (B lists of steps)."""
        held = ring_positions(count, self.lengths)
        owner = [head for head, length in enumerate(self.lengths) for _ in range(length)]
        out = torch.zeros(*held.shape, self.width, dtype=self.over_time["k"].dtype)
        for row in range(len(held)):
            for place, token in enumerate(held[row].tolist()):
                if token >= 0:
                    out[row, place] = self.over_time["k"][row, tokens_before[row][token], owner[place]]
        return out


def flat(result):
    o, state = result
    return [o] + [getattr(state, field.name) for field in fields(state)]


def assert_close(found, expected, tolerance=1e-9):
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(result, leaves):
    torch.manual_seed(1)
    outputs = [x for x in flat(result) if x.is_floating_point() and x.requires_grad]
    loss = sum((x * torch.randn(x.shape).to(x.dtype)).sum() for x in outputs)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
