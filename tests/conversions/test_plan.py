"""`plan` loads no weights, and says what the conversion then does."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rnnzoo.conversions.plan import make_plan
from rnnzoo.conversions.recipes import list_recipes, parse_keep
from rnnzoo.conversions.teachers import TeacherRef
from rnnzoo.kernels.errors import RnnzooError

from .tiny import TINY_FAMILIES, tiny_model, tiny_teacher


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {f: str(tiny_teacher(f, tmp_path_factory.mktemp("t"), num_hidden_layers=4)) for f in TINY_FAMILIES}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("plan loads weights")

    monkeypatch.setattr(TeacherRef, "load", refuse)


def plan(*args, **options) -> dict:
    return make_plan(*args, **options).to_dict()


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("recipe", list_recipes())
def test_every_family_and_recipe_can_be_planned(teachers, family, recipe):
    options = {"state_budget": 60_000} if recipe == "rnnzoo" else {}
    said = plan(teachers[family], recipe, keep="1/4", **options)
    assert said["parameters"] == tiny_model(family, num_hidden_layers=4).num_parameters()
    assert said["teacher"]["family"] == family and said["teacher"]["licence"] == "not stated"
    assert said["kept_attention"] == [3] == parse_keep("1/4", 4)
    assert [layer["mixer"] for layer in said["layers"]] == [said["recipe"]["student"]] * 3 + ["full_attention"]
    assert [layer["state"] for layer in said["layers"]] == ["constant"] * 3 + ["grows with the text"]
    assert said["time_seconds"] > 0 and said["memory_bytes"] > 4 * said["parameters"]
    if recipe == "rnnzoo":
        assert said["state_bytes"] == 60_000


@pytest.mark.parametrize("student", ["gated_delta_net", "rwkv7", "gla"])
def test_a_recipe_takes_another_student(teachers, student):
    said = plan(teachers["llama"], "rnnzoo", student=student)
    assert {layer["mixer"] for layer in said["layers"]} == {student}
    assert [stage["stage"] for stage in said["stages"]] == ["calibrate", "align", "distill"]
    assert plan(teachers["llama"], "supra", student="supra") == plan(teachers["llama"], "supra")


@pytest.mark.parametrize("student", ["based", "tova"])
def test_a_student_in_which_nothing_is_new_is_not_aligned(teachers, student, tmp_path):
    said = plan(teachers["llama"], "rnnzoo", student=student)
    assert [stage["stage"] for stage in said["stages"]] == ["calibrate", "distill"]
    recipe = tmp_path / "own.yaml"
    stages = "[{name: align, kind: align, share: 1.0}]"
    recipe.write_text(f"student: {student}\ntokens: 1000\nseq_len: 64\nbatch_tokens: 64\nstages: {stages}\n")
    with pytest.raises(RnnzooError, match=f"nothing in a '{student}' layer is new .* trains: mixers"):
        plan(teachers["llama"], str(recipe))


class NothingLarge(TorchDispatchMode):
    """Fails where a tensor of more than a million numbers is in memory: weights and text are not needed for a plan."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta" or x.numel() < 10**6, function
        return result


def test_the_embedded_teacher_is_planned_without_its_weights():
    with NothingLarge():
        said = plan(None, "rnnzoo")
    assert said["parameters"] == 134_515_008 and said["state_bytes"] == 4_000_000
    assert said["teacher"]["licence"] == "apache-2.0" and len(said["layers"]) == 30


def test_cached_bytes_are_those_of_keys_and_values_in_bfloat16(teachers):
    said = plan(teachers["llama"], "supra", keep="1/2")
    token = 2 * 2 * 8 * 2  # keys and values, 2 kv heads of 8, 2 bytes
    assert said["kept_attention_bytes_per_1k_tokens"] == 1024 * token * 2
    assert said["teacher_kv_bytes"] == {
        "at_2k": 2048 * token * 4,
        "at_32k": 32768 * token * 4,
        "at_128k": 131072 * token * 4,
    }


def test_more_tokens_take_more_time(teachers):
    short, long = (plan(teachers["llama"], "supra", tokens=n)["time_seconds"] for n in (10_000, 40_000))
    assert long == pytest.approx(4 * short)


def test_progressive_steps_are_told(teachers):
    assert plan(teachers["llama"], "mamba-in-llama", keep="none")["recipe"]["steps"] == ["1,2,3", "1/2", "1/4", "none"]


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("rnnzoo", {"state_budget": 100}, "too small"),
        ("supra", {"keep": "4"}, "no layer 4"),
        ("supra", {"seq_len": 4096}, "positions up to 512"),
        ("lolkats", {}, "no recipe"),
        ("supra", {"student": "quantum"}, "not a layer type"),
        ("supra", {"student": "s4"}, "cannot be started from an attention layer"),
    ],
)
def test_what_convert_refuses_plan_refuses(teachers, recipe, options, message):
    with pytest.raises(RnnzooError, match=message):
        plan(teachers["llama"], recipe, **options)
