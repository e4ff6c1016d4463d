"""Scores in closed form: what they are fitted to, and that what they keep is worth more than the last tokens."""

from __future__ import annotations

import torch

from rnnzoo.conversions.fit.scores import FEWEST, LEAST, NEAR, ScoreFit, attention_received
from rnnzoo.kernels.bounded_attention import Bounds, bounded_attention


def test_what_is_fitted_is_the_attention_from_far():
    torch.manual_seed(0)
    time = NEAR + 40
    q, k = torch.randn(time, 4, 8), torch.randn(time, 2, 8)
    received = attention_received(q, k)
    for head in range(2):
        for j in (0, 3, 39, 40):
            weights = []
            for t in range(j + NEAR, time):
                for each in (2 * head, 2 * head + 1):
                    row = (q[t, each] @ k[: t + 1, head].T * 8**-0.5).softmax(-1)
                    weights.append(row[j])
            mean = torch.stack(weights).mean() if weights else torch.zeros(())
            torch.testing.assert_close(received[j, head], (mean + LEAST).log())


def looked_back(time: int, seed: int) -> tuple[torch.Tensor, ...]:
    """A text of which a tenth is looked at by all later tokens; the first channel of its hidden states tells which."""
    torch.manual_seed(seed)
    hidden = torch.randn(time, 16)
    hidden[:, 0] = (torch.rand(time) < 0.1).float() * 3
    key = torch.randn(time, 1, 8) * 0.1
    key[:, 0, 0] = hidden[:, 0] * 3
    query = torch.randn(time, 2, 8) * 0.1
    query[:, :, 0] = 3.0
    return hidden, query, key, torch.randn(time, 1, 4)


def test_fitted_scores_keep_what_a_text_looks_back_at():
    time, fit = 2 * (NEAR + FEWEST), ScoreFit()
    for seed in (1, 2):
        hidden, q, k, _ = looked_back(time, seed)
        fit.add(hidden, q, k)
    weight = fit.solve()
    assert weight is not None and weight.shape == (1, 16)
    hidden, q, k, v = looked_back(time, 3)
    full = Bounds((time,), (time,))
    exact, _ = bounded_attention(q[None], k[None], v[None], torch.zeros(1, time, 1), bounds=full)

    def error(score: torch.Tensor) -> float:
        o, _ = bounded_attention(q[None], k[None], v[None], score[None], bounds=Bounds((60,), (10,)))
        return float((o - exact).square().mean())

    assert error(hidden @ weight.T) < 0.2 * error(torch.zeros(time, 1))


def test_of_texts_that_are_too_short_nothing_is_learned():
    fit = ScoreFit()
    fit.add(torch.randn(NEAR + FEWEST, 16), *(torch.randn(NEAR + FEWEST, 1, 8) for _ in range(2)))
    assert fit.solve() is None
