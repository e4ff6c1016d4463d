"""What every recurrence promises on every backend; the loop in float64 (`reference`) is the truth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from rnnzoo.kernels.dispatch import backends

from .recurrences import (
    Recurrence,
    Shape,
    assert_close,
    cases,
    cast,
    cut,
    gradient_sizes,
    inputs_of,
    random_steps,
    rounded,
    run,
)


def parameters() -> list:
    """Every case; Triton's interpreter takes seconds for a call, so there the default suite tries one variant."""
    found = []
    for recurrence, backend, variant in cases():
        slow = backend == "triton" and variant != recurrence.variants[0]
        name = "-".join(filter(None, (recurrence.name, backend, variant)))
        found.append(pytest.param(recurrence, backend, variant, id=name, marks=[pytest.mark.slow] if slow else []))
    return found


every_case = pytest.mark.parametrize(("recurrence", "backend", "variant"), parameters())
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def skip_if_unavailable(recurrence: Recurrence, backend: str) -> None:
    reason = {status.backend: status.reason for status in backends(recurrence.name)}[backend]
    if reason:
        pytest.skip(f"{backend}: {reason}")


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float64, torch.float32] if backend == "chunked" else [torch.float32, torch.bfloat16]


def shapes_for(recurrence: Recurrence, backend: str, thorough: bool) -> st.SearchStrategy[Shape]:
    times, batches, heads, widths = [1, 2, 63, 65, 130], [1, 3], [1, 9], [24, 60, 64, 128]
    if backend == "triton":
        widths = [width for width in widths if width <= recurrence.small[0]] if thorough else [24]
        times, batches = ([1, 63, 65], [1, 2]) if thorough else ([35], [1])
        heads = [1, recurrence.small[1]]
    sampled = st.sampled_from
    return st.builds(Shape, sampled(batches), sampled(times), sampled(heads), sampled(widths))


@pytest.mark.parametrize("examples", [pytest.param(6, id=""), pytest.param(30, id="many", marks=pytest.mark.slow)])
@every_case
def test_it_equals_the_loop(recurrence, backend, variant, examples):
    skip_if_unavailable(recurrence, backend)
    thorough = examples > 6

    @settings(derandomize=True, deadline=None, max_examples=examples // 3 if backend == "triton" else examples)
    @given(
        seed=st.integers(0, 1000),
        shape=shapes_for(recurrence, backend, thorough),
        dtype=st.sampled_from(dtypes_of(backend)),
        packed=st.sampled_from([0.0, 0.05, 0.5]),
        masked=st.sampled_from([0.0, 0.3]),
        state=st.booleans(),
    )
    def check(seed, shape, dtype, packed, masked, state):
        inputs = inputs_of(recurrence, shape, variant, seed, state)
        steps = random_steps(shape.batch, shape.time, packed, masked)
        exact = rounded(recurrence, inputs, dtype)
        expected = run(recurrence, exact, variant, "reference", **steps)
        found = run(recurrence, cast(recurrence, inputs, dtype), variant, backend, **steps)
        sizes = gradient_sizes(recurrence, exact, shape, variant, **steps)
        assert_close(found, expected, TOLERANCE[dtype], sizes)

    check()


@every_case
def test_gradients_are_those_of_finite_differences(recurrence, backend, variant):
    if backend != "chunked":
        pytest.skip("in float64 only")
    inputs = inputs_of(recurrence, Shape(1, 5, 1, 2), variant, 0)
    steps = {"seq_ids": torch.tensor([[0, 0, 0, 1, 1]]), "mask": torch.tensor([[True, False, True, True, True]])}
    leaves, spec = pytree.tree_flatten(inputs)
    for name in ("chunked", "reference"):

        def call(*tensors, name=name):
            arguments = pytree.tree_unflatten(list(tensors), spec)
            output, state = recurrence.function(**arguments, **recurrence.options(variant), **steps, backend=name)
            return output, *pytree.tree_leaves(state)

        assert torch.autograd.gradcheck(call, tuple(x.requires_grad_() for x in leaves))


@every_case
def test_whole_equals_its_parts(recurrence, backend, variant):
    skip_if_unavailable(recurrence, backend)
    shape = Shape(2, 70, 2, 24)
    inputs = cast(recurrence, inputs_of(recurrence, shape, variant, 0), torch.float32)
    steps = random_steps(shape.batch, shape.time, 0.05, 0.2)
    whole = run(recurrence, inputs, variant, backend, gradients=False, **steps)
    cuts = [[0, 1, 70], [0, 31, 33, 70], [0, 64, 70], [0, *range(60, 71)]]
    for edges in cuts[:2] if backend == "triton" else cuts:
        state, outputs = inputs["initial_state"], []
        for first, stop in zip(edges, edges[1:], strict=False):
            part = slice(first, stop)
            ids, mask = steps["seq_ids"][:, part], steps["mask"][:, part]
            # A part knows nothing of the ids before it: where a document begins with it, the state is emptied here.
            call = cut(recurrence, inputs, part) | {"initial_state": _emptied(state, steps, first, stop)}
            output, state = recurrence.function(
                **call, **recurrence.options(variant), seq_ids=ids, mask=mask, backend=backend
            )
            outputs.append(output)
        parts = {"output": torch.cat(outputs, dim=1)}
        parts |= {f"state {i}": x for i, x in enumerate(pytree.tree_leaves(state))}
        assert_close(parts, whole, 1e-5)


def _emptied(state, steps, first, stop):
    """`state` with the rows emptied whose first valid step of [first, stop) begins a document."""
    ids, mask = steps["seq_ids"], steps["mask"]
    begins = torch.zeros(len(ids), dtype=torch.bool)
    for b in range(len(ids)):
        before, own = mask[b, :first].nonzero(), mask[b, first:stop].nonzero()
        if len(before) and len(own):
            begins[b] = ids[b, before[-1, 0]] != ids[b, first + own[0, 0]]

    def empty(x: torch.Tensor, number: int) -> torch.Tensor:
        blank = float("-inf") if isinstance(state, tuple) and number == 0 else 0.0  # the maximum of no score
        return torch.where(begins.view(-1, *[1] * (x.ndim - 1)), blank, x)

    leaves, spec = pytree.tree_flatten(state)
    return pytree.tree_unflatten([empty(x, i) for i, x in enumerate(leaves)], spec)


@every_case
def test_packed_equals_separate_and_masked_equals_removed(recurrence, backend, variant):
    skip_if_unavailable(recurrence, backend)
    shape = Shape(1, 67, 2, 24)
    inputs = cast(recurrence, inputs_of(recurrence, shape, variant, 0, state=False), torch.float32)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([2, 41, 24]))[None]
    mask = torch.ones(1, 67, dtype=torch.bool)
    mask[:, [0, 4, 5, 6, 40, 41, 42, 66]] = False
    hidden = {
        name: torch.where(mask.view(1, -1, *[1] * (x.ndim - 2)), x, torch.nan) if name in recurrence.timed else x
        for name, x in inputs.items()
    }
    found = run(recurrence, hidden, variant, backend, seq_ids=ids, mask=mask)
    assert (found["output"][~mask] == 0).all()
    for name in recurrence.timed:
        gradient = found[f"gradient of ['{name}']"]
        assert gradient.isfinite().all() and (gradient[~mask] == 0).all(), name
    for document in range(3):
        own = (mask & (ids == document))[0].nonzero()[:, 0]
        alone = {name: x[:, own] if name in recurrence.timed else x for name, x in inputs.items()}
        expected = run(recurrence, alone, variant, backend, gradients=False)
        part = {"output": found["output"][:, own]}
        if document == 2:
            part |= {name: x for name, x in found.items() if name.startswith("state")}
        else:
            expected = {"output": expected["output"]}
        assert_close(part, expected, 1e-5)


@every_case
def test_strong_decay_and_none_are_exact(recurrence, backend, variant):
    skip_if_unavailable(recurrence, backend)
    if recurrence.decayed is None:
        pytest.skip("it has no decay")
    for log in (-50.0, 0.0) if backend == "triton" else (-50.0, -1e4, -1e-6, 0.0):
        inputs = recurrence.decayed(inputs_of(recurrence, Shape(1, 65, 1, 24), variant, 3), log)
        expected = run(recurrence, rounded(recurrence, inputs, torch.float32), variant, "reference")
        found = run(recurrence, cast(recurrence, inputs, torch.float32), variant, backend)
        assert all(x.isfinite().all() for x in found.values())
        if log <= -50:  # the decay's own gradient is some exp(-50) of the others, below float32's resolution of them
            names = [name for name, x in expected.items() if x.norm() > 1e-15]
            found, expected = ({name: results[name] for name in names} for results in (found, expected))
        assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("steps", [5000, pytest.param(100_000, marks=pytest.mark.slow)])
@every_case
def test_a_hundred_thousand_steps_stay_accurate(recurrence, backend, variant, steps):
    if backend != "cpu":
        pytest.skip("the compiled backends; interpreted ones take minutes")
    skip_if_unavailable(recurrence, backend)
    inputs = inputs_of(recurrence, Shape(1, steps, 1, 8), variant, 0)
    expected = run(recurrence, rounded(recurrence, inputs, torch.float32), variant, "chunked")
    found = run(recurrence, cast(recurrence, inputs, torch.float32), variant, backend)
    assert_close(found, expected, 1e-5)


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """torch fills what it allocates without initialising it."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@every_case
def test_every_output_is_written_and_the_same_each_time_with_one_thread_or_two(recurrence, backend, variant):
    skip_if_unavailable(recurrence, backend)
    shape = Shape(1, 33, 2, 24) if backend == "triton" else Shape(2, 129, 3, 60)
    inputs = cast(recurrence, inputs_of(recurrence, shape, variant, 0), torch.float32)
    steps = random_steps(shape.batch, shape.time, 0.05, 0.2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            with nan_filled_memory():
                results.append(run(recurrence, inputs, variant, backend, **steps))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, x in results[0].items():
            assert x.isfinite().all(), name
            # chunked stands on torch's own operators, which divide their work by the number of threads
            assert torch.equal(x, other[name]) or (backend == "chunked" and torch.allclose(x, other[name], rtol=1e-5))


@every_case
def test_strided_and_expanded_inputs_are_read_right(recurrence, backend, variant):
    skip_if_unavailable(recurrence, backend)
    inputs = cast(recurrence, inputs_of(recurrence, Shape(2, 17, 2, 24), variant, 0), torch.float32)
    inputs = {name: x[:1].expand_as(x) if name in recurrence.timed else x for name, x in inputs.items()}
    strided = {
        name: x.transpose(1, -1).contiguous().transpose(1, -1) if name in recurrence.timed else x
        for name, x in inputs.items()
    }
    plain = {name: x.contiguous() if name in recurrence.timed else x for name, x in inputs.items()}
    expected = run(recurrence, plain, variant, backend)
    assert_close(run(recurrence, strided, variant, backend), expected, 1e-6)
    assert_close(run(recurrence, inputs, variant, backend), expected, 1e-6)


@every_case
def test_torch_compile_sees_one_graph(recurrence, backend, variant):
    skip_if_unavailable(recurrence, backend)
    inputs = cast(recurrence, inputs_of(recurrence, Shape(1, 20, 2, 24), variant, 0), torch.float32)
    expected = run(recurrence, inputs, variant, backend)

    def function(**call):
        return recurrence.function(**call)

    torch._dynamo.reset()
    compiled = Recurrence(
        **{**vars(recurrence), "function": torch.compile(function, backend="aot_eager", fullgraph=True)}
    )
    assert_close(run(compiled, inputs, variant, backend), expected, 1e-5)


@every_case
def test_gradient_checkpointing_changes_nothing(recurrence, backend, variant):
    skip_if_unavailable(recurrence, backend)
    inputs = cast(recurrence, inputs_of(recurrence, Shape(1, 20, 2, 24), variant, 0), torch.float32)

    def function(**call):
        return checkpoint(recurrence.function, use_reentrant=False, **call)

    again = Recurrence(**{**vars(recurrence), "function": function})
    assert_close(run(again, inputs, variant, backend), run(recurrence, inputs, variant, backend), 1e-6)
