"""Which backend runs, who decides, and what is said about the others."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rnnzoo.kernels import dispatch as module
from rnnzoo.kernels.dispatch import backends, dispatch, dispatch_alike, explain, register, use_backend
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.kernels.gated_linear_attention import gated_linear_attention


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """An operation `double` with a slow backend, a fast one for even numbers, and one that this machine cannot run."""
    monkeypatch.setattr(module, "_REGISTRY", {name: dict(table) for name, table in module._REGISTRY.items()})
    monkeypatch.delenv("RNNZOO_BACKEND", raising=False)
    register("double", "slow", lambda: lambda x: ("slow", 2 * x), priority=0)
    register("double", "gone", lambda: pytest.fail("imported"), priority=30, available=lambda: "no compiler found")
    register(
        "double",
        "even",
        lambda: lambda x: ("even", 2 * x),
        priority=20,
        supports=lambda x: None if x % 2 == 0 else "x is odd",
    )


def test_the_fastest_backend_that_supports_the_call_runs():
    assert dispatch("double", {"x": 2}) == ("even", 4)
    assert dispatch("double", {"x": 3}) == ("slow", 6)


def test_argument_beats_context_beats_environment(monkeypatch):
    monkeypatch.setenv("RNNZOO_BACKEND", "slow")
    assert dispatch("double", {"x": 2})[0] == "slow"
    with use_backend("even"):
        assert dispatch("double", {"x": 2})[0] == "even"
        assert dispatch("double", {"x": 2}, backend="slow")[0] == "slow"
        with use_backend("slow"):
            assert dispatch("double", {"x": 2})[0] == "slow"
        assert dispatch("double", {"x": 2})[0] == "even"
    assert dispatch("double", {"x": 2})[0] == "slow"


def test_what_is_asked_for_the_whole_process_is_a_preference_and_what_serves_instead_is_said_once(caplog, monkeypatch):
    module._say_fallback.cache_clear()
    monkeypatch.setenv("RNNZOO_BACKEND", "gone")
    with caplog.at_level(logging.WARNING, logger="rnnzoo.kernels"):
        assert [dispatch("double", {"x": x})[0] for x in (2, 2, 4)] == ["even"] * 3
        with use_backend("even"):
            assert [dispatch("double", {"x": x})[0] for x in (2, 3, 3)] == ["even", "slow", "slow"]
        with use_backend("triton"):
            assert dispatch("double", {"x": 2})[0] == "even"
    assert [record.message for record in caplog.records] == [
        "gone was asked for, but double runs on even (not gone: no compiler found)",
        "even was asked for, but double runs on slow (not even: x is odd)",
        "triton was asked for, but double runs on even (double has no backend triton)",
    ]


def test_blocks_of_two_threads_that_overlap_leave_no_choice_behind():
    first, second = use_backend("slow"), use_backend("even")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert module.chosen_backend() == "even"
    second.__exit__(None, None, None)
    assert module.chosen_backend() is None


def test_autocast_is_off_inside_for_every_device_of_the_call():
    register(
        "devices", "all", lambda: lambda **call: tuple(map(torch.is_autocast_enabled, ("cpu", "cuda"))), priority=0
    )
    with FakeTensorMode():
        call = {"x": torch.empty(1), "y": torch.empty(1, device="cuda")}
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu"):
            assert dispatch("devices", call) == (False, False)
            assert dispatch("devices", {"x": call["x"]}) == (False, True)
            assert dispatch_alike("devices", {"y": call["y"]}, ()) == (True, False)
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_use_backend_is_undone_after_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("slow"):
        raise ZeroDivisionError
    assert dispatch("double", {"x": 2})[0] == "even"


@pytest.mark.parametrize("how", ["argument", "environment", "context"])
def test_an_unknown_backend_names_the_known_ones(monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("RNNZOO_BACKEND", "warp")
    with pytest.raises(RnnzooError, match=r"'warp'.*even.*slow"):
        if how == "context":
            with use_backend("warp"):
                pass
        dispatch("double", {"x": 2}, backend="warp" if how == "argument" else None)


def test_a_chosen_backend_that_cannot_do_the_call_says_why():
    with pytest.raises(RnnzooError, match="x is odd"):
        dispatch("double", {"x": 3}, backend="even")
    with pytest.raises(RnnzooError, match="no compiler found"):
        dispatch("double", {"x": 3}, backend="gone")


def test_a_call_that_nobody_supports_lists_every_reason():
    register("triple", "a", lambda: None, priority=1, supports=lambda x: "too wide")
    register("triple", "b", lambda: None, priority=0, available=lambda: "no GPU")
    with pytest.raises(RnnzooError, match="a: too wide; not b: no GPU"):
        dispatch("triple", {"x": 1})


def test_the_debug_log_says_what_was_rejected_and_why(caplog):
    with caplog.at_level(logging.DEBUG, logger="rnnzoo.kernels"):
        dispatch("double", {"x": 3})
    assert "double runs on slow" in caplog.text
    assert "not gone: no compiler found" in caplog.text and "not even: x is odd" in caplog.text


def test_every_backend_is_listed_with_the_reason_it_is_not_available():
    assert [(s.backend, s.reason) for s in backends("double")] == [
        ("gone", "no compiler found"),
        ("even", None),
        ("slow", None),
    ]
    assert {"gated_linear_attention", "double"} <= {s.operation for s in backends()}
    assert explain("double", {"x": 3}) == {"gone": "no compiler found", "even": "x is odd", "slow": None}


def test_a_new_backend_of_a_real_operation_needs_one_registration():
    def fake(**call):
        return call["v"], None

    register("gated_linear_attention", "fake", lambda: fake, priority=99)
    q = torch.zeros(1, 2, 1, 1)
    assert gated_linear_attention(q, q, q + 7)[0].unique() == 7
    with use_backend("reference"):
        assert gated_linear_attention(q, q, q + 7)[0].unique() == 0


def test_operations_compile_without_graph_breaks():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        return gated_linear_attention(x, x, x)[0]

    x = torch.randn(1, 5, 1, 2)
    torch.testing.assert_close(compiled(x), gated_linear_attention(x, x, x)[0])
    with use_backend("reference"):
        torch.testing.assert_close(compiled(x), gated_linear_attention(x, x, x)[0])
