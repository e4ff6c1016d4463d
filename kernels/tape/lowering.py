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
TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float64: 2,
    torch.int64: 3,
    torch.int32: 4,
    torch.bool: 5,
}  # as in cpu.c
# As in cpu.c, in this order.
OPERATIONS = (
    *("copy", "fill", "exp", "log", "sqrt", "rsqrt", "reciprocal", "abs", "sigmoid", "silu", "tanh", "gelu"),
    *("gelu_tanh", "softplus", "log_sigmoid", "sin", "cos", "erf", "expm1", "log1p", "add", "mul", "div", "pow"),
    *("logaddexp", "maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne", "where", "lerp", "addcmul", "clamp"),
    *("sum", "mean", "amax", "norm", "softmax", "layer_norm", "rms_norm", "matmul"),
)
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

    def temporary(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.kept.append(torch.empty(tuple(shape), dtype=dtype))
        return self.kept[-1]

    def tensor(self, value: Any) -> Tensor:
        """A number as a tensor."""
        if isinstance(value, Tensor):
            return value
        if not isinstance(value, (int, float, bool)):
            raise Unsupported(f"{self.name} with {type(value).__name__}")
        self.kept.append(torch.tensor(value))
        return self.kept[-1]

    def pointwise(self, op: str, out: Tensor, *inputs: Any, a: float = 0.0, b: float = 0.0) -> bytes:
        tensors = [self.tensor(x) for x in inputs]
        if out.is_contiguous() and all(x.ndim == 0 or (x.shape == out.shape and x.is_contiguous()) for x in tensors):
            along = [(0, 0, 0, 0 if x.ndim == 0 < out.ndim else 1) for x in (out, *tensors)]
            return self.step(op, (1, 1, 1, out.numel()), along, [out, *tensors], a, b)
        try:
            strides = [out.stride(), *(x.expand(out.shape).stride() for x in tensors)]
        except RuntimeError:
            raise Unsupported(f"{self.name} whose output has another shape") from None
        sizes, strides = _merged(out.shape, strides, DIMS, self.name)
        return self.step(op, sizes, strides, [out, *tensors], a, b)

    def rows(self, op: str, out: Tensor, x: Tensor, dims: Sequence[int], *more: Tensor | None, a: float = 0.0) -> bytes:
        """Over the dimensions `dims` of x; `out` and `more` have as many dimensions as x, of size 1 or x's."""
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
                raise Unsupported(f"{self.name} of {str(tensor.dtype).removeprefix('torch.')}")
            operands += (tensor.data_ptr(), *along, TYPES[tensor.dtype])
        operands += NO_OPERAND * (1 + INPUTS - len(tensors))
        self.kept.append(tensors)
        return STEP.pack(CODES[op], len(tensors) - 1, *sizes, *operands, a, b)


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


@_rule(
    "exp", "log", "sqrt", "rsqrt", "reciprocal", "abs", "sigmoid", "silu", "tanh", "sin", "cos", "erf", "expm1", "log1p"
)
def _unary(call: _Call) -> Iterator[bytes]:
    yield call.pointwise(call.name, call.result, call.args[0])


@_rule("mul", "div", "logaddexp", "maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne")
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
    if power == 2 and isinstance(power, (int, float)):
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


@_rule("masked_fill")
def _masked_fill(call: _Call) -> Iterator[bytes]:
    x, mask, value = call.args[:3]
    yield call.pointwise("where", call.result, mask, value, x)


@_rule("lerp")
def _lerp(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("lerp", call.result, *call.args[:3])


@_rule("addcmul")
def _addcmul(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("addcmul", call.result, *call.args[:3], a=call.option(3, "value", 1))


@_rule("clamp", "clamp_min", "clamp_max")
def _clamp(call: _Call) -> Iterator[bytes]:
    if call.name == "clamp":
        low, high = call.option(1, "min"), call.option(2, "max")
    else:
        low, high = (call.args[1], None) if call.name == "clamp_min" else (None, call.args[1])
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        raise Unsupported("clamp by tensors")
    whole = not call.result.dtype.is_floating_point
    most = 2.0**62 if whole else math.inf  # what a double holds of int64 without rounding up
    ends = {"a": -most if low is None else low, "b": most if high is None else high}
    yield call.pointwise("clamp", call.result, call.args[0], **ends)


@_rule("clone", "_to_copy", "copy", "contiguous", "lift_fresh_copy")
def _copy(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("copy", call.result, call.args[1 if call.name == "copy" else 0])


@_rule("fill", "full", "full_like", "new_full")
def _fill(call: _Call) -> Iterator[bytes]:
    value = call.option(2, "fill_value") if call.name == "new_full" else call.args[1]
    if isinstance(value, Tensor):
        yield call.pointwise("copy", call.result, value)
    else:
        yield call.pointwise("fill", call.result, a=value)


@_rule("zero", "zeros", "zeros_like", "new_zeros")
def _zeros(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("fill", call.result, a=0)


@_rule("ones", "ones_like", "new_ones")
def _ones(call: _Call) -> Iterator[bytes]:
    yield call.pointwise("fill", call.result, a=1)


@_rule("arange", "scalar_tensor")
def _constant(call: _Call) -> Iterator[bytes]:
    """The same at every replay, and kept: nothing to do."""
    return iter(())


@_rule("cat")
def _cat(call: _Call) -> Iterator[bytes]:
    axis, at = call.option(1, "dim", 0), 0
    for part in call.args[0]:
        if part.numel():
            yield call.pointwise("copy", call.result.narrow(axis, at, part.shape[axis]), part)
            at += part.shape[axis]


@_rule("stack")
def _stack(call: _Call) -> Iterator[bytes]:
    for part, target in zip(call.args[0], call.result.unbind(call.option(1, "dim", 0)), strict=True):
        yield call.pointwise("copy", target, part)


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


@_rule("repeat")
def _repeat(call: _Call) -> Iterator[bytes]:
    x, counts = call.args[0], call.args[1]
    x = x.reshape([1] * (len(counts) - x.ndim) + list(x.shape))
    pairs = [n for count, size in zip(counts, x.shape, strict=True) for n in (count, size)]
    once = x.reshape([n for size in x.shape for n in (1, size)])
    yield call.pointwise("copy", call.result.view(pairs), once)


@_rule("glu")
def _glu(call: _Call) -> Iterator[bytes]:
    first, second = call.args[0].chunk(2, call.option(1, "dim", -1))
    gate = call.temporary(second.shape, torch.float32)
    yield call.pointwise("sigmoid", gate, second)
    yield call.pointwise("mul", call.result, first, gate)


@_rule("sum", "mean", "amax")
def _reduction(call: _Call) -> Iterator[bytes]:
    x, dims = call.args[0], call.option(1, "dim") or []
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not x.dtype.is_floating_point:
        raise Unsupported(f"{call.name} of integers")
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
    which = {d % x.ndim for d in dims} or set(range(x.ndim))
    return out.reshape([1 if d in which else size for d, size in enumerate(x.shape)])


@_rule("_softmax")
def _softmax(call: _Call) -> Iterator[bytes]:
    yield call.rows("softmax", call.result, call.args[0], [call.args[1]])


@_rule("native_layer_norm", "_fused_rms_norm")
def _row_norm(call: _Call) -> Iterator[bytes]:
    x, shape, weight = call.args[:3]
    bias, eps = (call.args[3], call.args[4]) if call.name == "native_layer_norm" else (None, call.option(3, "eps"))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    op = "layer_norm" if call.name == "native_layer_norm" else "rms_norm"
    yield call.rows(op, call.result, x, range(-len(shape), 0), weight, bias, a=eps)


@_rule("native_group_norm")
def _group_norm(call: _Call) -> Iterator[bytes]:
    x, weight, bias, batch, channels, length, groups, eps = call.args
    shape = (batch, groups, channels // groups, length)
    parts = [None if p is None else p.view(1, groups, -1, 1) for p in (weight, bias)]
    yield call.rows("layer_norm", call.result.view(shape), x.view(shape), [2, 3], *parts, a=eps)


@_rule("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "linear")
def _matmul(call: _Call) -> Iterator[bytes]:
    name, bias, alpha, beta = call.name, None, 1.0, 1.0
    first, second = call.args[:2]
    if name in ("addmm", "baddbmm", "addmv"):
        bias, first, second = call.args[:3]
        alpha, beta = call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
    out = call.result
    if name == "linear":
        bias = call.option(2, "bias")
        first, second, out = first.flatten(0, -2), second.t(), out.flatten(0, -2)
    elif name in ("mv", "addmv"):
        second, out = second.unsqueeze(1), out.unsqueeze(1)
        bias = None if bias is None else bias.expand(out.shape[:1]).unsqueeze(1)
    elif name == "dot":
        first, second, out = first.unsqueeze(0), second.unsqueeze(1), out.view(1, 1)
    if second.dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"{name} of {str(second.dtype).removeprefix('torch.')}")
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
