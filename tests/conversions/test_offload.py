"""`--offload`: one layer at a time ends where the whole model in memory does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import rnnzoo  # noqa: F401  (registers the Auto classes)
from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.mapped import MappedTeacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError

from ..end_to_end.conftest import write_documents
from .tiny import TINY_FAMILIES, tiny_teacher

RECIPE = {
    "student": "hedgehog",
    "student_options": {"window_size": 4, "num_sinks": 2},  # maps that start as the identity, whatever the seed
    "keep": "1",
    "seq_len": 64,
    "batch_tokens": 2 * 64,
    "tokens": 12 * 64,
    "calibration_tokens": 5 * 64,
    "stages": [
        {"name": "calibrate", "kind": "calibrate", "parts": ["scale", "output"]},
        # Clipped layer by layer in the one case, over all layers in the other: so not at all here.
        {"name": "align", "kind": "align", "share": 1.0, "new_lr": 1e-2, "lr": 1e-3, "trains": "mixers",
         "max_grad_norm": 1e9},
    ],
}  # fmt: skip
OWN: dict[str, Any] = {"dtype": "float32", "evaluate": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return [str(write_documents(tmp_path_factory.mktemp("data") / "text.jsonl", 200))]


def recipe_file(folder: Path, **changes) -> str:
    path = folder / f"layers-{len(list(folder.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()


@pytest.mark.parametrize(
    ("family", "student"),
    [
        ("llama", "hedgehog"),
        pytest.param("gpt_neox", "hedgehog", marks=pytest.mark.slow),
        pytest.param("qwen3", "gla", marks=pytest.mark.slow),
    ],
)
def test_it_ends_at_the_weights_of_a_run_in_memory(data, tmp_path, family, student):
    teacher = str(tiny_teacher(family, tmp_path, num_hidden_layers=3))
    same = student == "hedgehog"  # in gla parts are drawn at random, in another order
    changes = {} if same else {"student": student, "student_options": {}}
    recipe = recipe_file(tmp_path, **changes)
    whole = convert(teacher, recipe, tmp_path / "whole", data=data, **OWN)
    parts = convert(teacher, recipe, tmp_path / "parts", data=data, **OWN, offload=True)
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert set(ours) == set(theirs)
    for name in ours:
        if ".mixer." not in name:
            assert torch.equal(ours[name], theirs[name]), name
        elif same:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-3, atol=2e-3, msg=name)
        else:
            assert ours[name].shape == theirs[name].shape and ours[name].isfinite().all()
    stages = [{s["name"]: s for s in found["conversion"]["stages"]} for found in (parts, whole)]
    for stage, keys in {
        "calibrate": ("error_before", "error_after", "loss_before", "loss_after"),
        "align": ("loss_first", "loss_last"),
    }.items():
        for key in keys if same else ():
            assert stages[0][stage][key] == pytest.approx(stages[1][stage][key], rel=1e-2)
    assert stages[0]["align"]["tokens"] == stages[1]["align"]["tokens"] == 12 * 64
    assert (tmp_path / "parts" / "config.json").read_text() == (tmp_path / "whole" / "config.json").read_text()
    assert not (tmp_path / "parts" / ".rnnzoo" / "layers").exists()


class Stopped(BaseException):
    pass


@pytest.mark.parametrize(
    ("stage", "done"),
    [
        pytest.param("calibrate", 2, marks=pytest.mark.slow),
        ("align", 18 * 64),
        pytest.param("align", 30 * 64, marks=pytest.mark.slow),
    ],
)
def test_stopped_in_the_middle_of_a_stage_it_goes_on_with_that_layer(data, tmp_path, stage, done):
    teacher, recipe = str(tiny_teacher("llama", tmp_path, num_hidden_layers=3)), recipe_file(tmp_path)
    convert(teacher, recipe, tmp_path / "whole", data=data, **OWN, offload=True)

    def stop(name, so_far, total, info):
        if name == stage and so_far >= done:
            raise Stopped

    own: dict[str, Any] = OWN | {"offload": True}
    with pytest.raises(Stopped):
        convert(teacher, recipe, tmp_path / "stopped", data=data, **own, progress=stop)
    seen = []
    convert(
        teacher, recipe, tmp_path / "stopped", data=data, **own,
        progress=lambda name, so_far, *_: seen.append((name, so_far)),
    )  # fmt: skip
    assert "initialise" not in dict(seen) and all(so_far > done - 12 * 64 for name, so_far in seen if name == stage)
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_shipped_recipe_runs_so(data, tmp_path):
    teacher = str(tiny_teacher("llama", tmp_path))
    own: dict[str, Any] = {"tokens": 1024, "seq_len": 128, "batch_tokens": 256, "offload": True}
    results = convert(teacher, "layerwise", tmp_path / "model", data=data, **own)
    stages = {stage["name"]: stage for stage in results["conversion"]["stages"]}
    assert stages["calibrate"]["error_after"] <= stages["calibrate"]["error_before"]
    assert stages["align"]["loss_last"] < 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["metadata"]["total_size"] > 0
    assert "evaluation" not in results or not results["evaluation"]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_layers_from_disk_are_those_of_the_model_and_are_let_go(tmp_path, family):
    ref = resolve_teacher(str(tiny_teacher(family, tmp_path)))
    model, mapped = ref.load(), MappedTeacher(ref)
    shared = ref.family.shared_tensors(model)
    ends = mapped.ends()
    assert set(ends) == {name for name in shared if ".layers." not in name}
    assert all(torch.equal(ends[name], shared[name]) for name in ends)
    for number in (1, 0):
        weights, rest = mapped.layer(number)
        expected = ref.family.attention_weights(model, number)
        for name in ("q", "k", "v", "o", "q_bias", "o_bias", "q_norm"):
            one, two = getattr(weights, name), getattr(expected, name)
            assert (one is None) == (two is None) and (one is None or torch.equal(one, two))
        prefix = f"model.layers.{number}."
        assert {prefix + name for name in rest} == {name for name in shared if name.startswith(prefix)}
        assert all(torch.equal(tensor, shared[prefix + name]) for name, tensor in rest.items())
    assert all(parameter.is_meta for parameter in mapped.model.parameters())


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("rnnzoo", {"state_budget": 40_000}, "the stage calibrate of the recipe rnnzoo divides a state budget"),
        ("supra", {}, "the stage uptrain of the recipe supra needs the whole model; use a recipe such as layerwise"),
        ("layerwise", {"student": "hgrn2"}, "Layers of hgrn2 share parameters"),
        ("layerwise", {"data": None}, "--offload needs --data"),
        ("layerwise", {"keep": "best 1"}, "ranks the layers with the whole model; with --offload give --ranking"),
    ],
)
def test_what_needs_the_whole_model_is_refused_before_anything_is_written(data, tmp_path, recipe, changes, words):
    teacher = str(tiny_teacher("llama", tmp_path))
    with pytest.raises(RnnzooError, match=words):
        convert(teacher, recipe, tmp_path / "model", **({"data": data, "seq_len": 64, "offload": True} | changes))
    assert not (tmp_path / "model").exists()
