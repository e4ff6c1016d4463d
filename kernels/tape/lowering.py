"""From an operation of torch that has run to the steps of `cpu.c` that do it again."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Unsupported", "lower"]

DIMS, INPUTS = 4, 4
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int64: 2, torch.bool: 3}  # as in cpu.c
# As in cpu.c, in this order.
OPERATIONS = (
    *("copy", "fill", "exp", "log", "sqrt", "rsqrt", "abs", "sigmoid", "silu", "tanh", "gelu", "gelu_tanh", "softplus"),
    *("log_sigmoid", "sin", "cos", "expm1", "log1p", "add", "mul", "div", "pow", "logaddexp", "maximum", "ge", "eq"),
    *("where", "clamp", "sum", "mean", "norm", "softmax", "layer_norm", "matmul"),
)
COMPARISONS = ("ge", "eq")
# What is done between integers without rounding; the others are for floating numbers.
OF_INTEGERS = ("copy", "fill", "add", "mul", "maximum", "where", "clamp", *COMPARISONS)
LARGEST = 2**53  # up to here a double, as a step's options are, holds every integer
CODES = {name: code for code, name in enumerate(OPERATIONS)}


class Unsupported(Exception):
    """Says which operation, and why."""


# The structure Step of cpu.c: op, inputs, sizes; address, strides and type of the output and of each input; a, b.
STEP = struct.Struct(f"={2 + DIMS + (1 + INPUTS) * (DIMS + 2)}q2d")
NO_OPERAND = (0,) * (DIMS + 2)


def lower(func: Any, args: tuple, kwargs: dict, result: Any, kept: list[Any]) -> list[bytes]:
    """The steps of one call of an operator, as cpu.c reads them.

    Args:
        result: what the call returned. kept: takes in the memory that the steps need.
    Raises:
        Unsupported: there are none that do the same.
    """
    if func.is_view or (isinstance(result, Tensor) and result.numel() == 0):
        return []
    name = _names.get(func) or _names.setdefault(func, _name(func))
    if name in NOTHING:
        return []
    rule = RULES.get(name)
    if rule is None:
        raise Unsupported(name)
    if any(isinstance(x, Tensor) and not x.is_cpu for x in (*args, result)):
        raise Unsupported(f"{name} on another device")
    return list(rule(_Call(name, args, kwargs, result, kept)))


# Of these, nothing is to be done again: memory, other views of it, and questions about dtypes alone.
NOTHING = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"),
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "promote_types", "result_type", "can_cast"),
}
_names: dict[Any, str] = {}


def _name(func: Any) -> str:
    """Of an operator, without the mark of one that works in place."""
    namespace, name = func._schema.name.split("::")
    if namespace != "aten":
        return func._schema.name
    return name.rstrip("_") if func._schema.is_mutable else name


class _Call:
    """One call of an operator, and how its steps are made."""

    def __init__(self, name: str, args: tuple, kwargs: dict, result: Any, kept: list[Any]):
        self.name, self.args, self.kwargs, self.kept = name, args, kwargs, kept
        self.result: Tensor = result[0] if isinstance(result, tuple) else result

    def option(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def tensor(self, value: Any) -> Tensor:
        """A number as a tensor."""
        if isinstance(value, Tensor):
            return value
        kinds = {bool: torch.bool, int: torch.int64, float: torch.float32}
        if type(value) not in kinds:
            raise Unsupported(f"{self.name} with {type(value).__name__}")
        self.kept.append(torch.tensor(value, dtype=kinds[type(value)]))
        return self.kept[-1]

    def pointwise(self, op: str, out: Tensor, *inputs: Any, a: float = 0.0, b: float = 0.0) -> bytes:
        tensors = [self.tensor(x) for x in inputs]
        self.check_types(op, out, tensors)
        if not out.is_floating_point() and any(abs(x) > LARGEST and not math.isinf(x) for x in (a, b)):
            raise Unsupported(f"{self.name} with an integer above 2^53")
        if out.is_contiguous() and all(x.ndim == 0 or (x.shape == out.shape and x.is_contiguous()) for x in tensors):
            along = [(0, 0, 0, 0 if x.ndim == 0 < out.ndim else 1) for x in (out, *tensors)]
            return self.step(op, (1, 1, 1, out.numel()), along, [out, *tensors], a, b)
        try:
            strides = [out.stride(), *(x.expand(out.shape).stride() for x in tensors)]
        except RuntimeError:
            raise Unsupported(f"{self.name} whose output has another shape") from None
        sizes, strides = _merged(out.shape, strides, DIMS, self.name)
        return self.step(op, sizes, strides, [out, *tensors], a, b)

    def check_types(self, op: str, out: Tensor, inputs: Sequence[Tensor]) -> None:
        """Refuses where cpu.c, which computes in float32 or between integers, would round otherwise than torch."""
        floating = [x for x in inputs if x.is_floating_point()]
        if not floating and not out.is_floating_point():
            if op not in OF_INTEGERS:
                raise Unsupported(f"{self.name} of integers")
            return
        if out.dtype == torch.int64 or (out.dtype == torch.bool and op not in COMPARISONS and op != "copy"):
            raise Unsupported(f"{self.name} of floating numbers into {_dtype(out)}")
        # Torch brings all inputs into one type first.
        half = any(x.dtype == torch.bfloat16 for x in inputs)
        if half and any(x.dtype == torch.int64 and x.ndim for x in inputs):
            raise Unsupported(f"{self.name} of bfloat16 and int64")
        if op in (*COMPARISONS, "pow") and half and len({x.dtype for x in inputs}) > 1:
            raise Unsupported(f"{self.name} of bfloat16 and another type")

    def rows(self, op: str, out: Tensor, x: Tensor, dims: Sequence[int], *more: Tensor | None, a: float = 0.0) -> bytes:
        """Over the dimensions `dims` of x; `out` and `more` have as many dimensions as x, of size 1 or x's."""
        if x.ndim == 0:
            raise Unsupported(f"{self.name} of a number")
        # With another type for the result torch first brings x into it.
        if not x.is_floating_point() or out.dtype not in (x.dtype, torch.float32):
            raise Unsupported(f"{self.name} of {_dtype(x)} in {_dtype(out)}")
        dims = [d % x.ndim for d in dims] if dims else list(range(x.ndim))
        others = [d for d in range(x.ndim) if d not in dims]
        tensors = [out, x, *more]
        strides = [None if t is None else t.expand(x.shape).stride() for t in tensors]

        def along(which: list[int], most: int) -> tuple[list[int], list[list[int]]]:
            picked = [[0 if s is None else s[d] for d in which] for s in strides]
            return _merged([x.shape[d] for d in which], picked, most, self.name)

        outer, outer_strides = along(others, DIMS - 1)
        inner, inner_strides = along(dims, 1)
        joined = [a + b for a, b in zip(outer_strides, inner_strides, strict=True)]
        return self.step(op, outer + inner, joined, tensors, a)

    def step(
        self, op: str, sizes: Sequence[int], strides: Sequence[Sequence[int]], tensors: Sequence[Tensor | None],
        a: float = 0.0, b: float = 0.0,
    ) -> bytes:  # fmt: skip
        operands: list[int] = []
        for tensor, along in zip(tensors, strides, strict=True):
            if tensor is None:
                operands += NO_OPERAND
                continue
            if tensor.dtype not in TYPES:
                raise Unsupported(f"{self.name} of {_dtype(tensor)}")
            operands += (tensor.data_ptr(), *along, TYPES[tensor.dtype])
        operands += NO_OPERAND * (1 + INPUTS - len(tensors))
        self.kept.append(tensors)
        return STEP.pack(CODES[op], len(tensors) - 1, *sizes, *operands, a, b)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _merged(
    sizes: Sequence[int], strides: Sequence[Sequence[int]], most: int, name: str
) -> tuple[list[int], list[list[int]]]:
    """The same elements in the same order in `most` dimensions, as few of them as can be of a size above 1."""
    found: list[tuple[int, list[int]]] = []
    for d, size in enumerate(sizes):
        if size == 1:
            continue
        here = [s[d] for s in strides]
        if found and all(outer == inner * size for outer, inner in zip(found[-1][1], here, strict=True)):
            found[-1] = (found[-1][0] * size, here)
        else:
            found.append((size, here))
    if len(found) > most:
        raise Unsupported(f"{name} over {len(found)} dimensions")
    found = [(1, [0] * len(strides))] * (most - len(found)) + found
    return [size for size, _ in found], [[along[k] for _, along in found] for k in range(len(strides))]


Rule = Callable[[_Call], Iterator[bytes]]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def note(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return note


@_rule("exp", "log", "sqrt", "rsqrt", "abs", "sigmoid", "silu", "tanh", "sin", "cos", "expm1", "log1p")
def _unary(call: _Call) -> Iterator[bytes]:
    yield call.pointwise(call.name, call.result, call.args[0])


@_rule("mul", "div", "logaddexp", "maximum", "ge", "eq")
def _binary(call: _Call) -> Iterator[bytes]:
    if call.kwargs.get("rounding_mode") is not None:
        raise Unsupported("div with a rounding mode")
    yield call.pointwise(call.name, call.result, *call.args[:2])


@_rule("add", "sub")
def _add(call: _Call) -> Iterator[bytes]:
    alpha = call.option(2, "alpha", 1) * (1 if call.name == "add" else -1)
    yield call.pointwise("add", call.result, *call.args[:2], a=alpha)


@_rule("rsub")
def _rsub(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("add", call.result, call.args[1], call.args[0], a=-call.option(2, "alpha", 1))


@_rule("neg")
def _neg(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("mul", call.result, call.args[0], -1)


@_rule("relu")
def _relu(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("maximum", call.result, call.args[0], 0)


@_rule("pow")
def _pow(call: _Call) -> Iterator[bytes]:
    x, power = call.args[:2]
    if not isinstance(power, Tensor) and power == 2:
        yield call.pointwise("mul", call.result, x, x)
    else:
        yield call.pointwise("pow", call.result, x, power)


@_rule("gelu")
def _gelu(call: _Call) -> Iterator[bytes]:
    tanh = call.kwargs.get("approximate", "none") == "tanh"
    yield call.pointwise("gelu_tanh" if tanh else "gelu", call.result, call.args[0])


@_rule("softplus")
def _softplus(call: _Call) -> Iterator[bytes]:
    beta, threshold = call.option(1, "beta", 1), call.option(2, "threshold", 20)
    yield call.pointwise("softplus", call.result, call.args[0], a=beta, b=threshold)


@_rule("log_sigmoid_forward")
def _log_sigmoid(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("log_sigmoid", call.result, call.args[0])


@_rule("where")
def _where(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("where", call.result, *call.args[:3])


@_rule("clamp", "clamp_min")
def _clamp(call: _Call) -> Iterator[bytes]:
    low, high = call.option(1, "min"), call.option(2, "max")
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low != low or high != high:
        raise Unsupported("clamp by tensors, or by nan")
    ends = {"a": -math.inf if low is None else low, "b": math.inf if high is None else high}
    yield call.pointwise("clamp", call.result, call.args[0], **ends)


@_rule("clone", "_to_copy", "copy")
def _copy(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("copy", call.result, call.args[1 if call.name == "copy" else 0])


@_rule("ones_like")
def _ones(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("fill", call.result, a=1)


@_rule("cat")
def _cat(call: _Call) -> Iterator[bytes]:
    axis, at = call.option(1, "dim", 0), 0
    for part in call.args[0]:
        if part.numel():
            yield call.pointwise("copy", call.result.narrow(axis, at, part.shape[axis]), part)
            at += part.shape[axis]


@_rule("constant_pad_nd")
def _pad(call: _Call) -> Iterator[bytes]:
    given, padding, value = call.args[0], call.args[1], call.option(2, "value", 0)
    yield call.pointwise("fill", call.result, a=value)
    source, target = given, call.result
    for i in range(len(padding) // 2):
        before, after, axis = padding[2 * i], padding[2 * i + 1], given.ndim - 1 - i
        size = given.shape[axis] + min(before, 0) + min(after, 0)
        source = source.narrow(axis, max(-before, 0), size)
        target = target.narrow(axis, max(before, 0), size)
    if source.numel():
        yield call.pointwise("copy", target, source)


@_rule("sum", "mean")
def _reduction(call: _Call) -> Iterator[bytes]:
    x, dims = call.args[0], call.option(1, "dim") or []
    dims = [dims] if isinstance(dims, int) else list(dims)
    yield call.rows(call.name, _as_before(call.result, x, dims), x, dims)


@_rule("linalg_vector_norm")
def _norm(call: _Call) -> Iterator[bytes]:
    x, dims = call.args[0], call.option(2, "dim") or []
    if call.option(1, "ord", 2) != 2:
        raise Unsupported("a norm that is not Euclidean")
    dims = [dims] if isinstance(dims, int) else list(dims)
    yield call.rows("norm", _as_before(call.result, x, dims), x, dims)


def _as_before(out: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    """out of a reduction with the dimensions that went, of size 1."""
    if x.ndim == 0:
        raise Unsupported("a reduction of a number")
    which = {d % x.ndim for d in dims} or set(range(x.ndim))
    return out.reshape([1 if d in which else size for d, size in enumerate(x.shape)])


@_rule("_softmax")
def _softmax(call: _Call) -> Iterator[bytes]:
    yield call.rows("softmax", call.result, call.args[0], [call.args[1]])


@_rule("native_layer_norm")
def _layer_norm(call: _Call) -> Iterator[bytes]:
    x, shape, weight, bias, eps = call.args
    yield call.rows("layer_norm", call.result, x, range(-len(shape), 0), weight, bias, a=eps)


@_rule("mm", "bmm", "addmm", "baddbmm")
def _matmul(call: _Call) -> Iterator[bytes]:
    bias, out, alpha, beta = None, call.result, call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
    if call.name in ("addmm", "baddbmm"):
        bias, first, second = call.args[:3]
        bias = bias if beta else None  # torch does not look at it either
    else:
        first, second = call.args[:2]
    if {out.dtype, first.dtype, second.dtype} not in ({torch.float32}, {torch.bfloat16}):
        raise Unsupported(f"{call.name} of {_dtype(first)} and {_dtype(second)} in {_dtype(out)}")
    if first.ndim == 2:
        first, second, out = first[None], second[None], out[None]
    batch, rows, columns = out.shape
    strides = [
        [*out.stride(), 0],
        [first.stride(0), first.stride(1), 0, first.stride(2)],
        [second.stride(0), 0, second.stride(2), second.stride(1)],
    ]
    tensors = [out, first, second]
    if bias is not None:
        strides.append([*bias.expand(out.shape).stride(), 0])
        tensors.append(bias)
    yield call.step("matmul", (batch, rows, columns, first.shape[2]), strides, tensors, alpha, beta)
