"""Losses by compiled code between the products: equal to the reference in values and gradients, at any size."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.dispatch import backends
from rnnzoo.kernels.losses import linear_cross_entropy, linear_kl

from .test_losses import make

FUSED = ["cpu", "triton"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def skip_if_unavailable(backend):
    reason = {status.backend: status.reason for status in backends("linear_cross_entropy")}[backend]
    if reason:
        pytest.skip(f"{backend}: {reason}")


def relative_error(found, expected):
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).norm() / expected.norm())


def run_in(dtype, backend, loss, call, others, options):
    """Value and gradients of a fixed function of a loss, in float64 numbers that `dtype` holds for the reference."""
    held = {name: x.detach().to(dtype) for name, x in call.items()}
    if backend == "reference":
        held = {name: x.double() for name, x in held.items()}
        others = {name: x.to(dtype).double() if x.is_floating_point() else x for name, x in others.items()}
    else:
        others = {name: x.to(dtype) if x.is_floating_point() else x for name, x in others.items()}
    leaves = {name: x.requires_grad_() for name, x in held.items()}
    if loss == "kl":
        names = {"hidden": "student_hidden", "weight": "student_weight", "bias": "student_bias"}
        value = linear_kl(**{names[name]: x for name, x in leaves.items()}, **others, **options, backend=backend)
    else:
        value = linear_cross_entropy(**leaves, **others, **options, backend=backend)
    incoming = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).reshape(value.shape)
    return [value, *torch.autograd.grad((value.double() * incoming).sum(), list(leaves.values()))]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 11), (9, 16), (33, 1003)])
@pytest.mark.parametrize("loss", ["entropy", "z loss", "kl", "reverse kl"])
def test_fused_backends_equal_the_reference(backend, dtype, reduction, tokens, vocabulary, loss):
    skip_if_unavailable(backend)
    call = make(0, tokens, width=24, vocabulary=vocabulary)
    options = {"chunk_size": 8, "reduction": reduction}
    if "kl" in loss:
        others = {"teacher_hidden": torch.randn(tokens, 16), "teacher_weight": torch.randn(vocabulary, 16)}
        others |= {"teacher_bias": torch.randn(vocabulary), "weights": (torch.arange(tokens) % 3 != 1).double()}
        options |= {"temperature": 1.7, "reverse": loss == "reverse kl"}
        loss = "kl"
    else:
        others = {"labels": torch.randint(0, vocabulary, (tokens,))}
        others["labels"][1::4] = -100
        options |= {"z_loss": 0.1 if loss == "z loss" else 0.0}
    expected = run_in(dtype, "reference", loss, call, others, options)
    for found, truth in zip(run_in(dtype, backend, loss, call, others, options), expected, strict=True):
        assert relative_error(found, truth) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", FUSED)
def test_fused_backends_take_any_size_of_logits(backend):
    """Logits beyond the range of exp, a vocabulary with entries that are ruled out, and mixed dtypes."""
    skip_if_unavailable(backend)
    call = {name: x.detach().float() for name, x in make(0, 9, vocabulary=50).items()}
    labels = torch.arange(9)
    call["bias"][20:] = float("-inf")
    call["hidden"] = call["hidden"] * 300
    expected = linear_cross_entropy(**{name: x.double() for name, x in call.items()}, labels=labels)
    assert relative_error(linear_cross_entropy(**call, labels=labels, backend=backend), expected) < 1e-5
    mixed = linear_cross_entropy(call["hidden"].bfloat16(), call["weight"], labels, backend=backend)
    assert mixed.dtype == torch.float32 and mixed.isfinite()
    teacher = torch.randn(9, 4), torch.randn(50, 4)
    kl = linear_kl(call["hidden"].bfloat16(), call["weight"], *teacher, backend=backend)
    truth = linear_kl(*(x.double() for x in (call["hidden"].bfloat16(), call["weight"], *teacher)), backend="reference")
    assert relative_error(kl, truth) < 2e-2


def test_a_label_outside_of_the_vocabulary_is_named():
    skip_if_unavailable("cpu")
    hidden, weight = torch.zeros(3, 4), torch.zeros(5, 4)
    with pytest.raises(IndexError, match="Target 7 is out of bounds: the vocabulary has 5 entries"):
        linear_cross_entropy(hidden, weight, torch.tensor([1, 7, 2]), backend="cpu")


def test_the_c_code_gives_the_same_bits_with_one_thread_or_two():
    skip_if_unavailable("cpu")
    logits, labels, factors = torch.randn(9, 1003), torch.randint(0, 1003, (9,)), torch.rand(9)
    teacher, threads, results = torch.randn(9, 1003), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            own, divergence, total = logits.clone(), logits.clone(), logits.clone()
            losses = torch.ops.rnnzoo.cross_entropy_rows_cpu(own, labels, factors, 0.1)
            divergences = torch.ops.rnnzoo.kl_rows_cpu(divergence, teacher, factors, 2.0, True)
            torch.ops.rnnzoo.add_bf16_cpu(total, teacher.bfloat16())
            results.append([own, losses, divergence, divergences, total])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.testing.assert_close(results[0][4], logits + teacher.bfloat16())
