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

RECIPE: dict[str, Any] = {
    "student": "hedgehog",
    "student_options": {"feature_map": "prototype", "feature_width": 4, "window_size": 4, "num_sinks": 2},
    "keep": "1",
    "seq_len": 64,
    "batch_tokens": 2 * 64,
    "tokens": 12 * 64,
    "calibration_tokens": 5 * 64,
    "stages": [
        {"name": "calibrate", "kind": "calibrate", "parts": ["features", "scale", "output"]},
        {"name": "align", "kind": "align", "share": 1.0, "new_lr": 1e-2, "lr": 1e-3, "trains": "mixers"},
    ],
}
OTHERS = {
    "student_options": {},
    "stages": [RECIPE["stages"][0] | {"parts": ["scale", "values", "output"]}, RECIPE["stages"][1]],
}
OWN: dict[str, Any] = {"dtype": "float32", "evaluate": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return [str(write_documents(tmp_path_factory.mktemp("data") / "text.jsonl", 200))]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A teacher, a recipe, and the weights at which it ends in memory, without a stop."""
    folder = tmp_path_factory.mktemp("finished")
    teacher, recipe = str(tiny_teacher("llama", folder, num_hidden_layers=3)), recipe_file(folder)
    convert(teacher, recipe, folder / "whole", data=data, **OWN)
    return teacher, recipe, weights(folder / "whole")


def recipe_file(folder: Path, **changes) -> str:
    path = folder / f"layers-{len(list(folder.iterdir()))}.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "student", "dtype", "align"),
    [
        ("llama", "hedgehog", "float32", {}),  # its head is tied to the embeddings
        ("mistral", "gated_delta_net", "bfloat16", {"target": "heads", "loss": "mse", "trains": "new"}),  # its own
        pytest.param("gpt_neox", "hedgehog", "bfloat16", {}, marks=SLOW),
        pytest.param("qwen2", "gla", "float32", {"target": "matrices", "loss": "norm"}, marks=SLOW),
        pytest.param("qwen3", "rwkv7", "bfloat16", {"max_grad_norm": 0.01}, marks=SLOW),
        pytest.param("llama", "mamba2", "bfloat16", {"trains": "features"}, marks=SLOW),
        pytest.param("qwen3", "mamba2", "float32", {"weight": 3.0}, marks=SLOW),
    ],
)
def test_it_ends_at_the_weights_of_a_run_in_memory(data, tmp_path, family, student, dtype, align):
    teacher = str(tiny_teacher(family, tmp_path, num_hidden_layers=3))
    changes: dict[str, Any] = {} if student == "hedgehog" else OTHERS | {"student": student}
    calibrate, aligned = (RECIPE | changes)["stages"]
    recipe = recipe_file(tmp_path, **changes | {"stages": [calibrate, aligned | align]})
    settings = {"eos_token_id": [2, 7], "do_sample": True, "top_k": 20, "repetition_penalty": 1.05}
    (Path(teacher) / "generation_config.json").write_text(json.dumps(settings))
    own = OWN | {"dtype": dtype}
    whole = convert(teacher, recipe, tmp_path / "whole", data=data, **own)
    parts = convert(teacher, recipe, tmp_path / "parts", data=data, **own, offload=True)
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert set(ours) == set(theirs)
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    stages = [{s["name"]: s for s in found["conversion"]["stages"]} for found in (parts, whole)]
    for stage in ("calibrate", "align"):
        one, two = ({key: value for key, value in found[stage].items() if key != "seconds"} for found in stages)
        assert one.keys() - {"student"} == two.keys() - {"student"}
        for key in one:
            assert one[key] == (pytest.approx(two[key]) if isinstance(one[key], float) else two[key])
    assert stages[0]["align"]["tokens"] == 12 * 64
    assert (tmp_path / "parts" / "config.json").read_text() == (tmp_path / "whole" / "config.json").read_text()
    for out in ("whole", "parts"):
        assert json.loads((tmp_path / out / "generation_config.json").read_text()).items() >= settings.items()
    assert not (tmp_path / "parts" / ".rnnzoo" / "layers").exists()


class Stopped(BaseException):
    pass


@pytest.mark.parametrize(
    ("offload", "stage", "share"),
    [
        (True, "initialise", 0.6),
        (True, "calibrate", 0.6),
        (True, "align", 0.25),  # in the first layer; the second is kept
        pytest.param(True, "align", 0.9, marks=SLOW),
        pytest.param(False, "calibrate", 0.6, marks=SLOW),
        (False, "align", 0.5),
    ],
)
def test_stopped_in_the_middle_of_a_stage_it_ends_at_the_same_weights(data, tmp_path, finished, offload, stage, share):
    teacher, recipe, expected = finished

    stopped, seen = [], []

    def stop(name, so_far, total, info):
        if name == stage and so_far >= share * total:
            stopped.append(so_far)
            raise Stopped

    def see(name, so_far, total, info):
        seen.append((name, so_far))

    own: dict[str, Any] = OWN | {"offload": offload}
    with pytest.raises(Stopped):
        convert(teacher, recipe, tmp_path / "stopped", data=data, **own, progress=stop)
    convert(teacher, recipe, tmp_path / "stopped", data=data, **own, progress=see)
    told = [so_far for name, so_far in seen if name == stage]
    if stage == "initialise":
        assert told == [0, 3, 1]  # the stage, its last layer, the stage
    elif stage == "align":
        assert min(told) >= stopped[0] - 2 * 128  # a step that was told may not be in a checkpoint yet
    elif offload:
        assert min(told) > stopped[0]
    assert stage == "initialise" or "initialise" not in dict(seen)
    ours = weights(tmp_path / "stopped")
    assert not [name for name in expected if not torch.equal(ours[name], expected[name])]


def test_the_shipped_recipe_runs_so(data, tmp_path):
    teacher = str(tiny_teacher("llama", tmp_path))
    own: dict[str, Any] = {"tokens": 1024, "seq_len": 128, "batch_tokens": 256, "offload": True}
    results = convert(teacher, "layerwise", tmp_path / "model", data=data, **own)
    stages = {stage["name"]: stage for stage in results["conversion"]["stages"]}
    assert stages["calibrate"]["parts"] == ["features"] and stages["calibrate"]["tokens"] > 0
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


@pytest.mark.parametrize("offload", [True, False])
def test_a_run_goes_on_as_it_was_begun_or_not_at_all(data, tmp_path, finished, offload):
    teacher, recipe, expected = finished

    def stop(name, so_far, total, info):
        if name == "calibrate":
            raise Stopped

    with pytest.raises(Stopped):
        convert(teacher, recipe, tmp_path / "out", data=data, **OWN, offload=offload, progress=stop)
    begun = "with" if offload else "without"
    with pytest.raises(RnnzooError, match=f"begun {begun} --offload; go on {begun} it, .* --restart"):
        convert(teacher, recipe, tmp_path / "out", data=data, **OWN, offload=not offload)
    convert(teacher, recipe, tmp_path / "out", data=data, **OWN, offload=not offload, restart=True)
    ours = weights(tmp_path / "out")
    assert not [name for name in expected if not torch.equal(ours[name], expected[name])]
    convert(teacher, recipe, tmp_path / "out", data=data, **OWN, offload=offload)  # finished: there is nothing to do
