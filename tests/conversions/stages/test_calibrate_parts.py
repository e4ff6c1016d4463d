"""The calibrate stage: its parts for every student, fits that are taken back where they do harm, fresh layers alone."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch
import yaml

from rnnzoo.conversions.context import StageRun
from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.fit.closed_form import Stream
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.recipes.load import load_recipe
from rnnzoo.conversions.recipes.prepare import prepare_recipe
from rnnzoo.conversions.stages import calibrate
from rnnzoo.conversions.stages.calibrate import Calibrate, loss_behind
from rnnzoo.conversions.student import build_student, layer_types, student_config, zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError

from ..tiny import tiny_teacher

STAGE = {"name": "fit", "kind": "calibrate"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return resolve_teacher(str(tiny_teacher("llama", tmp_path_factory.mktemp("t"), num_hidden_layers=4)))


def job_of(teacher, student: str, stage: Calibrate, rows: int = 4):
    ids = torch.randint(3, 310, (rows, 48), generator=torch.Generator().manual_seed(0))
    data = PackedTokens(ids, torch.zeros_like(ids), "test", TextHashes("test"))
    recipe = Recipe("test", student, [stage], calibration_tokens=ids.numel())
    model = teacher.load()
    config = student_config(teacher, recipe, layer_types(teacher, recipe, []))
    job = types.SimpleNamespace(
        recipe=recipe,
        teacher_model=zoo_teacher(teacher, model, torch.float32),
        folder=Path(),
        bf16=False,
        seed=0,
        calibration=lambda: data,
        progress=lambda *_: None,
    )
    return job, build_student(teacher, model, config, student, torch.float32, 0)


@pytest.mark.parametrize("weighting", ["norm", "gradient", "none"])
@pytest.mark.parametrize("student", ["gla", "rwkv7"])
def test_only_fresh_layers_change_and_the_record_says_what_it_brought(teacher, student, weighting):
    job, model = job_of(teacher, student, stage := Calibrate("fit", weighting=weighting, ridge=0.03))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after, report = stage.run(job, model, StageRun("fit", range(0), [1, 3]))
    assert report["tokens"] == 4 * 48 and report["parts"] == stage.chosen(job.recipe)
    assert report["error_after"] <= report["error_before"]
    changed = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before[name])}
    if report["fits_kept"]:
        assert report["loss_after"] <= report["loss_before"]
        assert {name.split(".")[2] for name in changed} == {"1", "3"}
    else:
        assert not [name for name in changed if ".proj." in name]


def test_a_fit_that_does_harm_is_taken_back(teacher, monkeypatch):
    job, model = job_of(teacher, "gla", stage := Calibrate("fit"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen, fit = {}, calibrate.fit_layer

    def harm(theirs, ours, how, teachers, students, weights):
        seen["rows"] = len(students)
        found = fit(theirs, ours, how, teachers, students, weights)
        ours.mixer.proj.o_proj.weight.data.mul_(-30)
        return found

    monkeypatch.setattr(calibrate, "fit_layer", harm)
    after, report = stage.run(job, model, StageRun("fit", range(0), [0, 1, 2, 3]))
    assert report["fits_kept"] is False and report["loss_after"] > report["loss_before"]
    assert seen["rows"] == 3  # the last row is for the judgement
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.state_dict().items())


@torch.no_grad()
def test_the_loss_is_that_of_the_model_within_documents(teacher):
    _, model = job_of(teacher, "gla", Calibrate("fit"))
    ids = torch.randint(3, 310, (1, 40), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(40)[None] >= 25).long()
    data = PackedTokens(ids, documents, "test", TextHashes("test"))
    parts = [model.eval()(part, labels=part, use_cache=False).loss for part in (ids[:, :25], ids[:, 25:])]
    expected = float((parts[0] * 24 + parts[1] * 14) / 38)
    stream = Stream.of(model, data[0])
    for block in model.model.layers:
        stream.advance(block)
    assert loss_behind(model, [stream], [data[0]], False) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("student", ["gla", "retnet", "rwkv7"])
def test_another_student_keeps_the_stage_without_its_windows(teacher, student):
    recipe = prepare_recipe("rnnzoo", teacher, student=student, tokens=0)
    stage = recipe.stages[0]
    assert isinstance(stage, Calibrate) and recipe.state_budget is None
    assert stage.chosen(recipe) == ["decay", "scale", "output"]


def test_default_parts_of_hedgehog_are_in_their_order():
    recipe = load_recipe("rnnzoo")
    stage = Calibrate("fit", parts=["output", "windows", "features"])
    assert stage.chosen(recipe) == ["windows", "features", "output"]
    recipe.state_budget = None
    assert "windows" not in Calibrate("fit").chosen(recipe)


def test_a_decay_that_the_student_lacks_is_refused_by_name_only(teacher, tmp_path):
    recipe = {"student": "retnet", "stages": [STAGE | {"parts": ["decay", "output"]}], "seq_len": 64}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(RnnzooError, match="retnet layers have no decay to set; leave the part decay out"):
        prepare_recipe(str(path), teacher)
    path.write_text(yaml.safe_dump(recipe | {"stages": [STAGE]}))
    prepare_recipe(str(path), teacher)


def test_a_recipe_of_this_stage_alone_converts_without_training_tokens(teacher, tmp_path):
    """Twice, to the same weights, and with a lower loss than the bare start."""
    text = tmp_path / "text.txt"
    words = ["the", "and", "of", "that", "with", "ing", "it was", "on in", "is for", "other"]
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(words[i] for i in torch.randint(0, 10, (30,), generator=generator)) for _ in range(400)]
    text.write_text("\n\n".join(lines))
    recipe = tmp_path / "mine.yaml"
    settings = {"student": "gated_delta_net", "stages": [STAGE], "seq_len": 64, "calibration_tokens": 512, "tokens": 0}
    recipe.write_text(yaml.safe_dump(settings))
    weights = []
    for out in (tmp_path / "one", tmp_path / "two"):
        convert(str(teacher.path), str(recipe), out, data=[str(text)], dtype="float32", evaluate=False)
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    fit = results["conversion"]["stages"][-1]
    assert fit["parts"] == ["decay", "scale", "output"] and fit["error_after"] < fit["error_before"]
