"""The selective scan: against transformers' Mamba, widths of the state, the one-token step, memory, errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers.models.mamba import modeling_mamba

from rnnzoo.kernels import native
from rnnzoo.kernels.dispatch import backends, use_backend
from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.kernels.selective_scan import selective_scan, selective_scan_step

RUNNABLE = [status.backend for status in backends("selective_scan") if status.reason is None]
GRADIENTS = ["x", "dt", "a", "b", "c", "d"]


def make(batch, time, channels, states, dtype=torch.float32):
    torch.manual_seed(0)
    rows = batch, time
    inputs = {
        "x": torch.randn(*rows, channels),
        "dt": torch.rand(*rows, channels),
        "a": -4 * torch.rand(channels, states),
        "b": torch.randn(*rows, states),
        "c": torch.randn(*rows, states),
        "d": torch.randn(channels),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}


def mamba_scan(x, dt, a, b, c, d):
    """Mamba's sequential scan, written down a second time, with the channels first as transformers has them."""
    x, dt = x.transpose(1, 2), dt.transpose(1, 2)
    decays = torch.exp(a[None, :, None] * dt[..., None])
    inputs = dt[..., None] * b[:, None] * x[..., None]
    state, outputs = torch.zeros_like(decays[:, :, 0]), []
    for t in range(x.shape[2]):
        state = decays[:, :, t] * state + inputs[:, :, t]
        outputs.append((state @ c[:, t, :, None])[..., 0])
    return (torch.stack(outputs, dim=-1) + x * d[None, :, None]).transpose(1, 2), state


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("states", [1, 4, 16, 24, 64])
def test_it_is_mambas_scan(backend, states):
    inputs = make(2, 37, 20, states)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    results = []
    for outputs, call in ((selective_scan(**inputs, backend=backend), inputs), (mamba_scan(**exact), exact)):
        loss = outputs[0].sin().sum() + outputs[1].cos().sum()
        results.append([*outputs, *torch.autograd.grad(loss, [call[name] for name in GRADIENTS])])
    for name, found, expected in zip(["y", "state", *GRADIENTS], *results, strict=True):
        assert relative(found, expected) < 1e-5, name


@pytest.mark.skipif(not hasattr(modeling_mamba, "mamba_selective_scan"), reason="another version of transformers")
def test_it_is_what_transformers_computes():
    inputs = {name: value.detach() for name, value in make(2, 19, 24, 16).items()}
    x, dt, b, c = (inputs[name].transpose(1, 2) for name in ("x", "dt", "b", "c"))
    expected, state = modeling_mamba.mamba_selective_scan(x, dt, inputs["a"], b, c, inputs["d"], return_last_state=True)
    found, found_state = selective_scan(**inputs)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_state, state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "states"), [(24, 16), (33, 1), (60, 4), (48, 24), (2304, 16), (32, 64)])
def test_steps_equal_the_whole(backend, dtype, channels, states):
    if backend == "cpu" and (reason := native.problem("selective_scan")):
        pytest.skip(reason)
    inputs = {name: value.detach() for name, value in make(3, 6, channels, states, dtype).items()}
    inputs["a"] = inputs["a"].float()
    inputs["dt"][:, 3] = 200.0  # decays outside of the quick exponential's range
    state = torch.randn(3, channels, states)
    expected, last = selective_scan(
        **{name: value.double() for name, value in inputs.items()}, initial_state=state.double(), backend="reference"
    )
    timed = [inputs[name].unbind(1) for name in ("x", "dt", "b", "c")]
    outputs = [
        selective_scan_step(x, dt, inputs["a"], b, c, inputs["d"], state, backend=backend)
        for x, dt, b, c in zip(*timed, strict=True)
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert outputs[0].dtype == dtype
    assert relative(torch.stack(outputs, dim=1), expected) < tolerance
    assert relative(state, last) < tolerance


def test_a_step_obeys_the_chosen_backend_and_reads_strided_tensors():
    inputs = {name: value.detach() for name, value in make(4, 1, 24, 16).items()}
    x, dt, b, c = (inputs[name][:, 0] for name in ("x", "dt", "b", "c"))
    state = torch.randn(4, 24, 16)
    expected, strided = state.clone(), state.transpose(0, 2).contiguous().transpose(0, 2)
    with use_backend("chunked"):
        y = selective_scan_step(x, dt, inputs["a"], b, c, None, expected)
    found = selective_scan_step(x.T.contiguous().T, dt, inputs["a"].T.contiguous().T, b, c, None, strided)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(strided, expected)
    with pytest.raises(RnnzooError, match="does not have"):
        selective_scan_step(x, dt, inputs["a"], b, c, None, state, backend="triton")


@pytest.mark.parametrize("backend", RUNNABLE)
def test_growing_and_vanishing_states_are_exact(backend):
    inputs = {name: value.detach() for name, value in make(1, 20, 16, 4).items()}
    inputs["a"] = torch.tensor([1.0, 0.0, -90.0, -3e4]).expand(16, 4)
    exact = {name: value.double() for name, value in inputs.items()}
    for found, expected in zip(selective_scan(**inputs, backend=backend), mamba_scan(**exact), strict=True):
        assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("backend", [name for name in RUNNABLE if name != "reference"])
def test_nan_stays_visible(backend):
    for name in GRADIENTS:
        inputs = {key: value.detach().clone() for key, value in make(1, 5, 16, 4).items()}
        inputs[name].flatten()[-1] = torch.nan
        y, _ = selective_scan(**inputs, backend=backend)
        assert y[0, -1, -1].isnan(), name


def test_wrong_shapes_are_named():
    inputs = make(2, 5, 8, 4)
    for name, wrong in (
        ("x", inputs["x"][0]),
        ("dt", inputs["dt"][:, :4]),
        ("a", inputs["a"][:5]),
        ("b", inputs["b"][..., :3]),
        ("c", inputs["c"][:1]),
        ("d", inputs["d"][:3]),
    ):
        with pytest.raises(ShapeError, match=rf"^{'a|dt' if name == 'x' else name} (has|is)|^x has"):
            selective_scan(**(inputs | {name: wrong}))
    with pytest.raises(ShapeError, match="initial_state has shape"):
        selective_scan(**inputs, initial_state=torch.zeros(2, 4, 8))
    with pytest.raises(ShapeError, match="expected real numbers"):
        selective_scan(**(inputs | {"a": inputs["a"] + 0j}))
    with pytest.raises(ShapeError, match="state have shapes"):
        selective_scan_step(*(inputs[name][:, 0] for name in ("x", "dt")), inputs["a"], *[inputs["b"][:, 0]] * 2, None,
                            torch.zeros(2, 4, 8))  # fmt: skip


def test_outputs_larger_than_the_caches_are_written_past_them_alike():
    """In one call the outputs and the kept states are; in parts of 5,000 steps they are not."""
    if reason := native.problem("selective_scan"):
        pytest.skip(reason)
    inputs = {name: value.detach().requires_grad_() for name, value in make(1, 17_001, 512, 16, torch.float32).items()}

    mask = torch.rand(1, 17_001) < 0.8

    def outcome(edges, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            state, outputs = None, []
            for first, stop in pairwise(edges):
                part = {name: inputs[name][:, first:stop] for name in ("x", "dt", "b", "c")}
                call = part | {"a": inputs["a"], "d": inputs["d"], "initial_state": state, "backend": "cpu"}
                call["mask"] = mask[:, first:stop]
                y, state = selective_scan(**call)
                outputs.append(y)
            y = torch.cat(outputs, dim=1)
            return [y, state, *torch.autograd.grad(y.cos().sum() + state.sum(), list(inputs.values()))]
        finally:
            torch.set_num_threads(before)

    whole = outcome([0, 17_001], 2)
    for found, expected in zip(whole, outcome([0, 5000, 10_000, 15_000, 17_001], 2), strict=True):
        assert relative(found, expected) < 1e-5
    assert all(torch.equal(x, y) for x, y in zip(whole, outcome([0, 17_001], 1), strict=True))
