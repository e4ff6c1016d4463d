"""Tapes: a replay does what the operations did, on the values that are there then."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnzoo.kernels.gated_linear_attention import gated_linear_attention_step
from rnnzoo.kernels.tape import Tape

UNARY = {
    "exp": torch.exp,
    "log": lambda x: torch.log(x.abs() + 0.1),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.1),
    "neg": torch.neg,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "softplus with options": lambda x: F.softplus(x, 2.0, 3.0),
    "logsigmoid": F.logsigmoid,
    "sin and cos": lambda x: x.sin() * x.cos(),
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(x.abs()),
    "square": torch.square,
    "power": lambda x: x.float().abs() ** 1.5,
    "by numbers": lambda x: 3 - (x * 2 + 1) / 4,
    "clamp": lambda x: x.clamp(-0.5, 0.7) + x.clamp(min=0.1) + x.clamp(max=0.2),
    "where": lambda x: torch.where(x.float() >= 0, x, x * 0.5) + (x.float() >= 0.3).to(x.dtype),
    "sum": lambda x: x.sum(-1, keepdim=True) + x.sum(),
    "mean": lambda x: x.mean(-1, keepdim=True) + x.mean((1, -1), keepdim=True),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True) + x.norm(dim=1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "softmax": lambda x: x.softmax(-1) + x.softmax(0),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "cat and split": lambda x: torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1),
    "pad": lambda x: F.pad(x, (1, 2)) + F.pad(x, (-1, 4)),
    "transpose": lambda x: x.transpose(0, 2).contiguous() + 1,
    "in place": lambda x: x.clone().mul_(2).add_(x, alpha=3).clamp_(max=4),
    "constants": lambda x: x + torch.ones_like(x),
    "outer": lambda x: torch.einsum("abd,ace->bcde", x, x),
    "to float and back": lambda x: (x.float() * 2).to(x.dtype),
    "a slice is written": lambda x: _with_a_slice_written(x),
}
BINARY = {
    "arithmetic": lambda x, y: (x + y) * y - x / (y.abs() + 1),
    "maximum": lambda x, y: torch.maximum(x, y) + torch.maximum(x, y[:, :1]),
    "logaddexp": torch.logaddexp,
    "comparisons": lambda x, y: ((x >= y).to(x.dtype) + (x == y).to(x.dtype) * 2) * x,
    "batched product": lambda x, y: x @ y.transpose(1, 2),
    "batched product of rows": lambda x, y: x @ y.transpose(1, 2).contiguous(),
    "baddbmm": lambda x, y: torch.baddbmm(x @ y.transpose(1, 2), x, y.transpose(1, 2), beta=0.5, alpha=2),
}


def _with_a_slice_written(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, :1] = 3 * x[:, :1]
    return y


def replayed(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a replay gives for `inputs`, having been recorded for others; and what the function gives."""
    held = [torch.randn_like(x) for x in inputs]
    with torch.no_grad():
        with Tape() as tape:
            out = function(*held)
        assert tape.problem is None, tape.problem
        expected = function(*inputs)
        for mine, given_ in zip(held, inputs, strict=True):
            mine.copy_(given_)
        out.fill_(torch.nan)
        tape.replay()
    return out, expected


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    half = out.dtype == torch.bfloat16
    scale = expected.abs().max().clamp(min=1).item()
    torch.testing.assert_close(out, expected, rtol=2e-2 if half else 1e-5, atol=(2e-2 if half else 2e-6) * scale)


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.sampled_from([2, 6, 16, 34, 130, 260]))


@pytest.mark.parametrize("name", UNARY)
@settings(derandomize=True, deadline=None, max_examples=8)
@given(shape=SHAPES, half=st.booleans(), seed=st.integers(0, 99))
def test_a_replay_gives_what_torch_gives(name, shape, half, seed):
    torch.manual_seed(seed)
    close(*replayed(UNARY[name], (2 * torch.randn(shape)).to(torch.bfloat16 if half else torch.float32)))


@pytest.mark.parametrize("name", BINARY)
@settings(derandomize=True, deadline=None, max_examples=8)
@given(shape=SHAPES, half=st.booleans(), seed=st.integers(0, 99))
def test_a_replay_of_two_tensors_gives_what_torch_gives(name, shape, half, seed):
    torch.manual_seed(seed)
    x, y = (torch.randn(shape).to(torch.bfloat16 if half else torch.float32) for _ in range(2))
    close(*replayed(BINARY[name], x, y))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    depth=st.sampled_from([1, 7, 16, 33, 64, 200, 257]),
    outs=st.sampled_from([1, 5, 16, 100, 300]),
    bias=st.booleans(),
    half=st.booleans(),
    across=st.booleans(),
)
def test_linear_layers_of_any_size(rows, depth, outs, bias, half, across):
    torch.manual_seed(rows * depth + outs)
    dtype = torch.bfloat16 if half else torch.float32
    weight = torch.randn(depth, outs, dtype=dtype).t() if across else torch.randn(outs, depth, dtype=dtype)
    added = torch.randn(outs, dtype=dtype) if bias else None
    out, expected = replayed(lambda x: F.linear(x, weight, added), torch.randn(rows, 1, depth, dtype=dtype))
    exact = torch.float32
    torch.testing.assert_close(
        out.to(exact), expected.to(exact), rtol=2e-2 if half else 1e-4, atol=(5e-2 if half else 1e-5) * depth**0.5
    )


def test_integers_are_exact_and_index_angles():
    frequencies = torch.rand(8)

    def angles(position: torch.Tensor) -> torch.Tensor:
        later = (position + 1 - torch.tensor([3, 5])).clamp(max=2**40)
        return (later.float()[:, None] * frequencies).cos()

    position = torch.tensor([7])
    with torch.no_grad():
        with Tape() as tape:
            out = angles(position)
            count = position * 3 + 2**40
        assert tape.problem is None
        position.fill_(123_456_789)
        tape.replay()
    assert count.item() == 3 * 123_456_789 + 2**40
    torch.testing.assert_close(out, angles(position), rtol=1e-5, atol=1e-5)


def test_kernels_in_c_are_replayed_on_their_state():
    state, mine = torch.randn(1, 2, 8, 8), None
    q, k, v = torch.randn(3, 1, 2, 8)
    with torch.no_grad():
        mine = state.clone()
        with Tape() as tape:
            out = gated_linear_attention_step(q * 2, k, v, None, mine)
        assert tape.problem is None
        for _ in range(2):
            tape.replay()
        for _ in range(3):
            expected = gated_linear_attention_step(q * 2, k, v, None, state)
    torch.testing.assert_close(mine, state)
    torch.testing.assert_close(out, expected)


def test_what_cannot_be_replayed_is_named_and_results_stay_right():
    x = torch.randn(5, 5)
    with torch.no_grad(), Tape() as tape:
        y = x.cumsum(0) * 2
    assert tape.problem is not None and "cumsum" in tape.problem
    torch.testing.assert_close(y, x.cumsum(0) * 2)
    with torch.no_grad(), Tape() as tape:
        assert bool((x == x).all())
    assert tape.problem is not None


def test_a_second_result_is_not_replayed():
    x = torch.randn(3, 8)
    with torch.no_grad(), Tape() as tape:
        _, mean, _ = torch.native_layer_norm(x, [8], None, None, 1e-5)
        mean + 1
    assert tape.problem is not None and "second result" in tape.problem


def test_a_second_result_is_not_replayed_inside_a_list_or_in_part_either():
    x = torch.randn(3, 8)
    for use in (lambda mean: torch.cat([mean, mean]), lambda mean: mean[1:] + 1):
        with torch.no_grad(), Tape() as tape:
            use(torch.native_layer_norm(x, [8], None, None, 1e-5)[1])
        assert tape.problem is not None and "second result" in tape.problem


# Programs: any operation that tapes know, and some that they do not, of operands of any type. Each is a function whose
# result is new memory; "copied" is what works in place, on a copy of its first operand.
NUMBERS = (0, 1, 3, -2, 2**40, 0.5, 0.3, -1.7, True)
CASTS = (torch.int64, torch.float32, torch.bool, torch.bfloat16, torch.float64)
OF_ONE: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in ("exp", "log", "sqrt", "rsqrt", "abs", "sigmoid", "tanh", "sin", "cos")},
    **{name: getattr(torch, name) for name in ("expm1", "log1p", "neg", "square", "relu", "clone", "ones_like", "erf")},
    **{name: getattr(F, name) for name in ("silu", "gelu", "softplus", "logsigmoid")},
    "gelu tanh": partial(F.gelu, approximate="tanh"),
    **{f"{f.__name__} {n}": lambda x, f=f, n=n: f(x, n) for f in (operator.add, operator.mul) for n in NUMBERS},
    **{f"{f.__name__} {n}": lambda x, f=f, n=n: f(x, n) for f in (operator.pow, operator.ge) for n in NUMBERS},
    **{f"{n} {f.__name__}": lambda x, f=f, n=n: f(n, x) for f in (operator.sub, operator.pow) for n in NUMBERS},
    **{f"clamp {n}": lambda x, n=n: x.clamp(min=n) for n in NUMBERS},
    "clamp": lambda x: x.clamp(-1, 2),
    "clamp below": lambda x: x.clamp(max=1),
    **{f"to {dtype}": lambda x, dtype=dtype: x.to(dtype, copy=True) for dtype in CASTS},
    **{f"sum {d}": lambda x, d=d: x.sum(d) for d in (0, -1)},
    **{f"mean {d}": lambda x, d=d: x.mean(d) for d in (0, -1)},
    **{f"softmax {d}": lambda x, d=d: x.softmax(d) for d in (0, -1)},
    "sum in float32": lambda x: x.sum(-1, dtype=torch.float32),
    "mean in bfloat16": lambda x: x.mean(-1, dtype=torch.bfloat16),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "pad": lambda x: F.pad(x, (1, 2), value=3),
    "where of a number": lambda x: torch.where(x.bool(), x, 0.3),
}
OF_TWO: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "pow", "ge", "eq", "maximum", "logaddexp")},
    "add alpha": partial(torch.add, alpha=3),
    "sub alpha": partial(torch.sub, alpha=3),
    "floor division": partial(torch.div, rounding_mode="floor"),
    "where": lambda x, y: torch.where(x.bool(), x, y),
    "add copied": lambda x, y: x.clone().add_(y),
    "mul copied": lambda x, y: x.clone().mul_(y),
    "copy copied": lambda x, y: x.clone().copy_(y),
    "addcmul": lambda x, y: torch.addcmul(x, y, y, value=2),
    "matmul": lambda x, y: x @ y.t(),
    "addmm": lambda x, y: torch.addmm(x, x, x.t() @ y, beta=0, alpha=2),
    "cat": lambda x, y: torch.cat([x, y], -1),
}
PROGRAM = OF_ONE | OF_TWO
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool) * 3 + (torch.float64, torch.int32, torch.uint8)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x > 0) if dtype == torch.bool else x.abs().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def random_program(seed: int, first: list[torch.Tensor]) -> list[tuple[str, list[int]]]:
    """Up to five operations, with the numbers of their operands among `first` and the results before them."""
    draw, steps, held = random.Random(seed), [], list(first)
    for _ in range(draw.randint(1, 5)):
        name = draw.choice(list(PROGRAM))
        operands = [draw.randrange(len(held)) for _ in range(1 if name in OF_ONE else 2)]
        try:
            held.append(PROGRAM[name](*(held[i] for i in operands)))
        except (RuntimeError, TypeError, IndexError):  # torch has no such operation
            continue
        steps.append((name, operands))
    return steps


def test_random_programs_of_random_types_are_replayed_as_torch_runs_them_or_refused():
    """Each step is compared with torch's on what the replay gave it, so that only what one step rounds counts."""
    replays = 0
    for seed in range(1500):
        draw = random.Random(-seed)
        shapes = [draw.choice([(3, 4), (3, 4), (1, 4), (3, 1), ()]) for _ in range(3)]
        first = [values(shape, draw.choice(DTYPES), i) for i, shape in enumerate(shapes)]
        with torch.no_grad():
            steps, held = random_program(seed, first), list(first)
            with Tape() as tape:
                for name, operands in steps:
                    held.append(PROGRAM[name](*(held[i] for i in operands)))
            if tape.problem is not None:
                continue
            replays += 1
            for i, x in enumerate(first):
                x.copy_(values(tuple(x.shape), x.dtype, i + 10))
            tape.replay()
            for (name, operands), out in zip(steps, held[len(first) :], strict=True):
                given_ = [held[i] for i in operands]
                assert_as_torch(out, PROGRAM[name](*given_), given_, f"{name} in {steps} of {first}")
    assert replays > 300


def assert_as_torch(out: torch.Tensor, expected: torch.Tensor, given_: list[torch.Tensor], words: str) -> None:
    """Integers are equal; floating numbers are up to the rounding of their type, of operands as large as `given_`."""
    assert out.dtype == expected.dtype, words
    if not out.is_floating_point():
        assert torch.equal(out, expected), words
        return
    rounding = 2**-7 if out.dtype == torch.bfloat16 else 1e-5
    largest = max(1.0, *(x.double().nan_to_num(0, 0, 0).abs().max().item() for x in given_))
    huge = expected.abs() > 1e30  # where one of the two may be infinite
    out, expected = (x.double().masked_fill(huge, 0) for x in (out, expected))
    torch.testing.assert_close(
        *(out, expected), rtol=rounding, atol=rounding * largest, equal_nan=True, msg=lambda m: f"{words}: {m}"
    )


REFUSED = {
    "powers of integers": lambda: torch.tensor([2, 3]) ** 3,
    "addcmul of integers": lambda: torch.addcmul(*[torch.tensor([2, 3])] * 3),
    "float64": lambda: torch.ones(2, dtype=torch.float64) * 3,
    "int32": lambda: torch.ones(2, dtype=torch.int32) * 3,
    "floating numbers as integers": lambda: torch.ones(2).long(),
    "a sum of integers": lambda: torch.tensor([2, 3]).sum(),
    "a mean that is rounded before": lambda: torch.ones(2, 3).mean(-1, dtype=torch.bfloat16),
    "a limit that no double holds": lambda: torch.tensor([2, 3]).clamp(min=2**60 + 1),
    "bfloat16 compared with a number that it rounds": lambda: torch.ones(2).bfloat16() >= 0.302,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_tapes_do_not_do_exactly_they_refuse(name):
    with torch.no_grad(), Tape() as tape:
        REFUSED[name]()
    assert tape.problem is not None


def test_a_number_to_the_power_of_a_tensor_is_replayed():
    close(*replayed(lambda x: 2.5**x, torch.randn(3, 5)))


def test_integers_are_exact_up_to_the_last_bit_and_limits_beyond_doubles_are_none():
    x = torch.tensor([1, 2])
    with torch.no_grad(), Tape() as tape:
        y = x.clamp(min=0) + torch.tensor(1)
    assert tape.problem is None
    x.copy_(torch.tensor([2**62 + 5, 2**63 - 1]))
    tape.replay()
    assert y.tolist() == [2**62 + 6, -(2**63)]


def test_what_lies_outside_is_called_again():
    x, seen = torch.randn(3), []

    def grows(y: torch.Tensor) -> torch.Tensor:
        seen.append(y.clone())
        return torch.stack(seen).cumsum(0)[-1]

    with torch.no_grad():
        with Tape() as tape:
            out = tape.outside(grows, x * 2) + 1
        first = x.clone()
        x.copy_(torch.randn(3))
        tape.replay()
    assert tape.problem is None
    torch.testing.assert_close(out, 2 * first + 2 * x + 1)


def test_one_thread_or_two_give_the_same_bits():
    threads, results = torch.get_num_threads(), []
    weight = torch.randn(600, 300, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(replayed(lambda x: F.linear(x, weight).softmax(-1), x)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
