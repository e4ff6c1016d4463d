"""What is particular to the delta rule: the models that it makes, grouped queries, strong decay, one token, errors."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from rnnzoo.kernels import native
from rnnzoo.kernels.delta_rule import delta_rule, delta_rule_step
from rnnzoo.kernels.errors import RnnzooError, ShapeError

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(native.compiler() is None, reason="no C compiler")),
    "chunked",
    "reference",
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def gated_inputs(batch: int = 2, time: int = 150, heads: int = 2, width: int = 64) -> dict[str, torch.Tensor]:
    """Keys of length 1, learning rates and decays of a Gated DeltaNet layer, float64 leaves."""
    torch.manual_seed(0)
    normal = torch.randn(3, batch, time, heads, width, dtype=torch.float64)
    beta, g = torch.rand(2, batch, time, heads, dtype=torch.float64)
    inputs = {"q": normal[0], "n": F.normalize(normal[1], dim=-1), "v": normal[2], "beta": beta, "g": -g}
    return {name: x.clone().requires_grad_() for name, x in inputs.items()}


def gated_delta_net(x, backend: str, initial_state=None):
    """Gated DeltaNet in the delta rule's arguments, as the docstring says."""
    beta, g = x["beta"][..., None], x["g"][..., None]
    a = -beta * g.exp() * x["n"]
    return delta_rule(x["q"], beta * x["n"], x["v"], a, x["n"], g, initial_state=initial_state, backend=backend)


def assert_near(left: torch.Tensor, right: torch.Tensor, tolerance: float) -> None:
    assert (left - right).norm() <= tolerance * right.norm()


@every_backend
@pytest.mark.parametrize("form", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_gated_delta_net_equals_transformers(backend, form):
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    theirs = inspect.unwrap(getattr(module, form))  # without what swaps in other packages' kernels
    single = {name: x.detach().float().requires_grad_() for name, x in gated_inputs().items()}
    start = torch.randn(2, 2, 64, 64)
    expected, expected_state = theirs(
        *(single[name] for name in ("q", "n", "v", "g", "beta")), initial_state=start, output_final_state=True
    )
    found, state = gated_delta_net(single, backend, start)
    assert_near(found, expected, 1e-5)
    assert_near(state, expected_state, 1e-5)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), list(single.values()))
    for left, right in zip(ours, torch.autograd.grad((expected * weights).sum(), list(single.values())), strict=True):
        assert_near(left, right, 1e-5)


def _matrix_loop(transition, k, v, q):
    """o_t = q_t S_t of S_t = transition_t S_{t-1} + k_t^T v_t, with the transition written out as a K x K matrix."""
    state, outputs = torch.zeros(k.shape[-1], v.shape[-1], dtype=k.dtype), []
    for t in range(len(k)):
        state = transition[t] @ state + torch.outer(k[t], v[t])
        outputs.append(q[t] @ state)
    return torch.stack(outputs)


@every_backend
@pytest.mark.parametrize("model", ["DeltaNet", "Gated DeltaNet", "KDA", "RWKV-7"])
def test_the_docstrings_arguments_make_the_published_models(backend, model):
    torch.manual_seed(1)
    q, n, v, eta, logs = torch.randn(5, 40, 12, dtype=torch.float64)
    n, eta, beta = F.normalize(n, dim=-1), eta.sigmoid(), torch.rand(40, 1, dtype=torch.float64)
    logs = -logs.abs() if model in ("KDA", "RWKV-7") else -logs[:, :1].abs()
    one, outer = torch.eye(12, dtype=torch.float64), n[:, :, None] * n[:, None, :]
    shrink, alpha = one - beta[..., None] * outer, logs.exp()
    transition, k, a, b, g = {
        "DeltaNet": (shrink, beta * n, -beta * n, n, None),
        "Gated DeltaNet": (alpha[..., None] * shrink, beta * n, -beta * alpha * n, n, logs),
        "KDA": (shrink * alpha[:, None, :], beta * n, -beta * n, alpha * n, logs),
        "RWKV-7": (torch.diag_embed(alpha) - eta[..., None] * outer, beta * n, -eta * n, n, logs),
    }[model]
    expected = _matrix_loop(transition.expand(40, 12, 12), k, v, q)
    dtype = torch.float32 if backend == "cpu" else torch.float64
    call = [None if x is None else x[None, :, None].to(dtype) for x in (q, k, v, a, b, g)]
    found, _ = delta_rule(*call, scale=1.0, backend=backend)
    assert_near(found[0, :, 0].double(), expected, 1e-5 if backend == "cpu" else 1e-12)


@every_backend
def test_grouped_queries_read_the_state_of_their_group(backend):
    torch.manual_seed(2)
    k, a, b = 0.3 * torch.randn(3, 2, 40, 3, 20)
    q, v = torch.randn(2, 40, 6, 20), torch.randn(2, 40, 3, 28)
    found, state = delta_rule(q, k, v, a, b, backend=backend)
    twice = (x.repeat_interleave(2, dim=2) for x in (k, v, a, b))
    expected, repeated = delta_rule(q, *twice, backend=backend)
    assert_near(found, expected, 1e-6)
    assert_near(state, repeated[:, ::2], 1e-6)


@every_backend
def test_weak_decays_beside_strong_ones_are_exact(backend):
    """And so is the gradient of a decay that leaves next to nothing."""
    inputs = gated_inputs(1, 70, 1, 16)
    strong = torch.rand(1, 70, 1) < 0.5
    with torch.no_grad():
        inputs["g"].copy_(torch.where(strong, -50.0, -1e-3))
    dtype = torch.float32 if backend == "cpu" else torch.float64
    results = []
    for name, kind in (("reference", torch.float64), (backend, dtype)):
        x = {key: value.detach().to(kind).requires_grad_() for key, value in inputs.items()}
        beta, g = x["beta"][..., None], x["g"][..., None]
        output, _ = delta_rule(x["q"], beta * x["n"], x["v"], -beta * x["n"], x["n"], g, backend=name)
        gradient = torch.autograd.grad(output.sum(), x["g"])[0].double()
        results.append((output.double(), gradient[strong], gradient[~strong]))
    for left, right in zip(results[1], results[0], strict=True):
        assert right.norm() > 0
        assert_near(left, right, 1e-4)


@pytest.mark.parametrize("backend", [None, *BACKENDS[:2], "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "heads", "groups", "keys", "values"), [(1, 9, 1, 64, 64), (3, 2, 2, 24, 60)])
@pytest.mark.parametrize("decay", ["none", "per head", "per channel"])
def test_steps_are_the_whole(backend, dtype, batch, heads, groups, keys, values, decay):
    torch.manual_seed(3)
    k, a, b = (0.3 * torch.randn(3, batch, 5, heads, keys)).to(dtype)
    q, v = torch.randn(batch, 5, heads * groups, keys, dtype=dtype), torch.randn(batch, 5, heads, values, dtype=dtype)
    g = None if decay == "none" else -torch.rand(batch, 5, heads, 1 if decay == "per head" else keys)
    state = torch.randn(batch, heads, keys, values)
    wide = [None if x is None else x.double() for x in (q, k, v, a, b, g)]
    expected, final = delta_rule(*wide, initial_state=state.double(), backend="reference")
    for t in range(5):
        step = [None if x is None else x[:, t] for x in (q, k, v, a, b, g)]
        output = delta_rule_step(*step, state, backend=backend)
        assert output.dtype == dtype
        assert_near(output.double(), expected[:, t], 1e-5 if dtype == torch.float32 else 1e-2)
    assert_near(state.double(), final, 1e-5)


def test_a_step_obeys_the_chosen_backend_and_serves_any_state():
    vectors, state = torch.randn(5, 1, 2, 8), torch.randn(1, 2, 8, 8)
    with pytest.raises(RnnzooError, match="does not have"):
        delta_rule_step(*vectors, None, state, backend="triton")
    expected = state.clone()
    output = delta_rule_step(*vectors, None, expected, backend="chunked")
    strided = state.transpose(2, 3).contiguous().transpose(2, 3)
    assert_near(delta_rule_step(*vectors, None, strided), output, 1e-5)
    assert_near(strided, expected, 1e-5)


def test_wrong_shapes_are_named():
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8)
    v = torch.randn(1, 4, 2, 6)
    with pytest.raises(ShapeError, match=r"a has shape \(1, 4, 2, 6\); expected \(1, 4, 2, 8\)"):
        delta_rule(q, k, v, v, k)
    with pytest.raises(ShapeError, match="3 heads"):
        delta_rule(q[:, :, :1].expand(-1, -1, 3, -1), k, v, k, k)
    with pytest.raises(ShapeError, match="initial_state has shape"):
        delta_rule(q, k, v, k, k, initial_state=torch.zeros(1, 2, 6, 8))
    with pytest.raises(ShapeError, match="do not fit the state"):
        delta_rule_step(q[:, 0], k[:, 0], v[:, 0], v[:, 0], k[:, 0], None, torch.zeros(1, 2, 8, 6))
