"""Least squares from streamed sums: what a dense solve of all rows at once gives."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.fit.least_squares import RIDGES, Gram, chosen_ridge


def problem(seed: int = 0, rows: int = 60, inputs: int = 12, outputs: int = 5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(rows, inputs), draw(rows, outputs), draw(outputs, inputs), draw(rows).exp()


def streamed(y, z, weights, pieces: int = 4) -> Gram:
    gram = Gram(y.shape[1], z.shape[1])
    for part in torch.arange(len(y)).chunk(pieces):
        gram.add(y[part], z[part], None if weights is None else weights[part])
    return gram


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ridge", [0.03, 2.0])
def test_the_refit_is_the_dense_ridge_solution_around_the_old_weight(weighted, ridge):
    """As least squares with rows for the ridge: sqrt(w) y W^T = sqrt(w) z, sqrt(lambda) W = sqrt(lambda) W_0."""
    y, z, old, weights = problem()
    weights = weights if weighted else torch.ones_like(weights)
    found = streamed(y, z, weights if weighted else None).refit(old, ridge)
    root = weights.sqrt()[:, None]
    level = (ridge * (root * y).square().sum(0).mean()).sqrt()
    rows = torch.cat([root * y, level * torch.eye(12, dtype=torch.float64)])
    wanted = torch.cat([root * z, level * old.T])
    torch.testing.assert_close(found, torch.linalg.lstsq(rows, wanted).solution.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_is_the_relative_one_of_all_rows(weighted):
    y, z, old, weights = problem(1)
    gram = streamed(y, z, weights if weighted else None)
    weights = weights if weighted else torch.ones_like(weights)
    left = (weights[:, None] * (y @ old.T - z) ** 2).sum() / (weights[:, None] * z**2).sum()
    assert gram.error(old) == pytest.approx(float(left), rel=1e-9)


@pytest.mark.parametrize("rows", [1, 3, 60])
@pytest.mark.parametrize("ridge", [1e-6, 0.03, 100.0])
def test_a_refit_never_makes_the_error_worse_and_with_little_text_changes_little(rows, ridge):
    y, z, old, _ = problem(2, rows)
    gram = streamed(y, z, None, 1)
    new = gram.refit(old, ridge)
    assert gram.error(new) <= gram.error(old)
    if ridge == 100.0:
        assert (new - old).norm() < 0.05 * old.norm()
    unseen = torch.linalg.svd(y, full_matrices=True)[2][rows:]  # directions of inputs that no row has
    torch.testing.assert_close(new @ unseen.T, old @ unseen.T, rtol=1e-6, atol=1e-6)


def test_scaled_columns_are_taken_only_where_they_help():
    y, _, old, _ = problem(3)
    factors = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    gram = streamed(y, y @ (old * factors).T, None)
    torch.testing.assert_close(gram.scaled(old, factors), old * factors)
    assert torch.equal(gram.scaled(old, -factors), old)


def test_sums_of_bfloat16_rows_and_of_dead_outputs():
    y, z, old, _ = problem(4)
    rough = streamed(y.bfloat16(), z.bfloat16(), None)
    assert rough.g.dtype == torch.float64
    torch.testing.assert_close(rough.refit(old, 0.03), streamed(y, z, None).refit(old, 0.03), rtol=0.05, atol=0.05)
    assert torch.equal(streamed(y * 0, z, None).refit(old, 0.03), old)
    assert not streamed(y / 0, z, None).finite()


def test_the_path_is_a_refit_for_each_ridge():
    y, z, old, weights = problem(5)
    gram = streamed(y, z, weights)
    for ridge, found in zip(RIDGES, gram.path(old, RIDGES), strict=True):
        torch.testing.assert_close(found, gram.refit(old, ridge), rtol=1e-8, atol=1e-10)
    both = streamed(y[:20], z[:20], weights[:20]) + streamed(y[20:], z[20:], weights[20:])
    torch.testing.assert_close(both.refit(old, 0.1), gram.refit(old, 0.1))


@pytest.mark.parametrize("seed", range(3))
def test_the_ridge_is_weak_for_what_holds_on_other_text_and_without_end_for_noise(seed):
    y, noise, old, _ = problem(seed, 200)
    halves = lambda z: (streamed(y[:100], z[:100], None), streamed(y[100:], z[100:], None))  # noqa: E731
    better = old + 0.3
    assert chosen_ridge(halves(y @ better.T), old) == RIDGES[0]
    assert chosen_ridge(halves(y @ old.T), old) == float("inf")
    noisy = chosen_ridge(halves(y @ old.T + 30 * noise), old)
    assert noisy >= 10.0
    middle = chosen_ridge(halves(y @ better.T + 3 * noise), old)
    assert RIDGES[0] < middle <= noisy


def test_the_chosen_ridge_has_the_least_error_on_the_other_half():
    y, noise, old, _ = problem(7, 80)
    z = y @ (old + 0.2).T + noise
    one, two = streamed(y[:40], z[:40], None), streamed(y[40:], z[40:], None)
    errors = {}
    for ridge in RIDGES:
        a, b = one.refit(old, ridge), two.refit(old, ridge)
        errors[ridge] = float((y[40:] @ a.T - z[40:]).square().sum() + (y[:40] @ b.T - z[:40]).square().sum())
    assert chosen_ridge((one, two), old) == min(errors, key=errors.__getitem__)
