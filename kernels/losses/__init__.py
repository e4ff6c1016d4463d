"""Losses on a large vocabulary that never hold the logits of all tokens at once.

    linear_cross_entropy:  -log softmax(h W^T + b)[label]  (+ z_loss * logsumexp^2)
    linear_kl:             KL( softmax(t T^T / temperature) || softmax(s S^T / temperature) ) * temperature^2
    linear_top_kl:         the same at temperature 1, from K log-probabilities a token and the mass of all others

N tokens, D width, V vocabulary, K < V kept classes. Logits are formed `chunk_size` tokens at a time; the gradients are
computed in the same pass and only scaled later, so peak memory is a few chunks of logits whatever N. Products run in
the hidden states' dtype, the softmax in float32 (float64 for float64 inputs).
Sources: Hinton et al. 2015 (temperature), PaLM 2022 (z loss), Wijmans et al. 2024 and Liger kernels 2024 (chunks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, native
from ..dispatch import dispatch
from ..errors import RnnzooError, ShapeError
from ..registration import register_backends
from . import chunked, cpu, reference

__all__ = ["linear_cross_entropy", "linear_kl", "linear_top_kl"]


def _triton():
    from . import triton_

    return triton_


def _hidden(call: dict) -> dict:
    """What C and Triton code sees are logits: in the hidden states' dtype, wherever the head's is converted to it."""
    return {name: x for name, x in call.items() if name in ("hidden", "student_hidden", "teacher_hidden")}


def _cpu_supports(**call) -> str | None:
    return native.supports("losses", _hidden(call))


def _triton_supports(**call) -> str | None:
    return gpu.supports(_hidden(call))


for _operation in ("linear_cross_entropy", "linear_kl"):
    register_backends(
        *("losses", _operation, reference, chunked, cpu, _triton),
        cpu_supports=_cpu_supports,
        triton_supports=_triton_supports,
    )
register_backends("losses", "linear_top_kl", reference, chunked)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    chunk_size: int = 256,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of a linear head, as torch's `cross_entropy(hidden @ weight.T + bias, labels)`.

    Args:
        hidden: (N, D). weight: (V, D). bias: (V,).
        labels: (N,) int64; tokens with `ignore_index` count nothing.
        z_loss: adds z_loss * logsumexp(logits)^2 to each token's loss, which keeps the logits near log-probabilities.
        chunk_size: tokens whose logits are in memory at once.
        reduction: "mean" over tokens that are not ignored (nan if there are none, as torch), "sum", or "none": (N,).
    Raises:
        ShapeError: names the argument, its shape and the expected one. RnnzooError: unknown reduction.
    """
    _check_head("hidden", hidden, "weight", weight)
    if tuple(labels.shape) != (len(hidden),) or labels.dtype != torch.int64:
        raise ShapeError(
            f"labels is {labels.dtype} of shape {tuple(labels.shape)}; expected int64 of ({len(hidden)},)."
        )
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; expected ({len(weight)},).")
    _check_options(chunk_size, reduction)
    call = {
        "hidden": _cast(hidden),
        "weight": weight,
        "labels": labels,
        "bias": bias,
        "ignore_index": ignore_index,
        "z_loss": z_loss,
        "chunk_size": chunk_size,
        "reduction": reduction,
    }
    return dispatch("linear_cross_entropy", call, backend)


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    chunk_size: int = 256,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """KL(teacher || student) between the predictions of two linear heads, in nats; gradients go to the student only.

    Args:
        student_hidden: (N, D). student_weight: (V, D). teacher_hidden: (N, Dt). teacher_weight: (V, Dt).
        student_bias, teacher_bias: (V,).
        weights: (N,) how much each token counts, booleans or numbers >= 0; None: 1.
        temperature: divides the logits of both; the loss is multiplied by its square.
        reverse: KL(student || teacher) instead.
        chunk_size: tokens whose logits are in memory at once.
        reduction: "mean": weighted sum / sum of weights (0 if that is 0); "sum": weighted sum; "none": its terms (N,).
    Raises:
        ShapeError: names the argument, its shape and the expected one. RnnzooError: unknown reduction.
    """
    _check_head("student_hidden", student_hidden, "student_weight", student_weight)
    _check_head("teacher_hidden", teacher_hidden, "teacher_weight", teacher_weight)
    tokens, vocabulary = len(student_hidden), len(student_weight)
    if len(teacher_hidden) != tokens:
        raise ShapeError(f"teacher_hidden has {len(teacher_hidden)} tokens; expected {tokens}, as student_hidden.")
    if len(teacher_weight) != vocabulary:
        raise ShapeError(f"teacher_weight has {len(teacher_weight)} rows; expected {vocabulary}, as student_weight.")
    for name, vector, size in (
        ("student_bias", student_bias, vocabulary),
        ("teacher_bias", teacher_bias, vocabulary),
        ("weights", weights, tokens),
    ):
        if vector is not None and tuple(vector.shape) != (size,):
            raise ShapeError(f"{name} has shape {tuple(vector.shape)}; expected ({size},).")
    if temperature <= 0:
        raise RnnzooError(f"temperature is {temperature}; expected more than 0.")
    _check_options(chunk_size, reduction)
    call = {
        "student_hidden": _cast(student_hidden),
        "student_weight": student_weight,
        "teacher_hidden": _cast(teacher_hidden),
        "teacher_weight": teacher_weight,
        "student_bias": student_bias,
        "teacher_bias": teacher_bias,
        "weights": weights,
        "temperature": temperature,
        "reverse": reverse,
        "chunk_size": chunk_size,
        "reduction": reduction,
    }
    return dispatch("linear_kl", call, backend)


def linear_top_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    indices: Tensor,
    log_probabilities: Tensor,
    log_rest: Tensor,
    *,
    student_bias: Tensor | None = None,
    reverse: bool = False,
    chunk_size: int = 256,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """KL(teacher || student) over K + 1 classes: K tokens of the vocabulary, and all others as one; in nats.

    It is at most the divergence over all V classes, and equal to it where the others are improbable or alike.

    Args:
        student_hidden: (N, D). student_weight: (V, D). student_bias: (V,).
        indices: (N, K) integers, the teacher's likeliest tokens, each once. log_probabilities: (N, K) of these tokens.
        log_rest: (N,) log of the teacher's mass on all others.
        reverse, chunk_size, reduction: as in `linear_kl`.
    Raises:
        ShapeError: names the argument, its shape and the expected one. RnnzooError: unknown reduction.
    """
    _check_head("student_hidden", student_hidden, "student_weight", student_weight)
    tokens, vocabulary = len(student_hidden), len(student_weight)
    if indices.ndim != 2 or len(indices) != tokens or not 0 < indices.shape[1] < vocabulary:
        raise ShapeError(f"indices has shape {tuple(indices.shape)}; expected ({tokens}, 1 to {vocabulary - 1}).")
    for name, tensor, shape in (
        ("log_probabilities", log_probabilities, tuple(indices.shape)),
        ("log_rest", log_rest, (tokens,)),
        ("student_bias", student_bias, (vocabulary,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
    _check_options(chunk_size, reduction)
    call = {
        "student_hidden": _cast(student_hidden),
        "student_weight": student_weight,
        "indices": indices.long(),
        "log_probabilities": log_probabilities,
        "log_rest": log_rest,
        "student_bias": student_bias,
        "reverse": reverse,
        "chunk_size": chunk_size,
        "reduction": reduction,
    }
    return dispatch("linear_top_kl", call, backend)


def _cast(hidden: Tensor) -> Tensor:
    """Under autocast the products run in its dtype, as those of a linear layer would."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def _check_head(hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    if hidden.ndim != 2:
        raise ShapeError(f"{hidden_name} has shape {tuple(hidden.shape)}; expected (tokens, width).")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
        expected = f"(vocabulary, {hidden.shape[1]}), of at least one word"
        raise ShapeError(f"{weight_name} has shape {tuple(weight.shape)}; expected {expected}.")


def _check_options(chunk_size: int, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise RnnzooError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'.")
    if chunk_size < 1:
        raise RnnzooError(f"chunk_size is {chunk_size}; expected at least 1.")
