"""A kind of stage from outside the package: one class, registered, which recipes, plans and conversions then know."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import yaml

from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.plan import make_plan
from rnnzoo.conversions.recipes.load import load_recipe
from rnnzoo.conversions.stages import KINDS, TrainedStage, register_stage
from rnnzoo.conversions.stages.training import StageTrainer, final_hidden, train
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.sizes import causal_lm_class

from ..end_to_end.conftest import write_documents
from .tiny import tiny_teacher


@dataclass
class Mimic(TrainedStage):
    """All mixers learn the teacher's final hidden states. power: of the error."""

    kind: str = "mimic"
    power: float = 2.0

    def check(self, recipe):
        super().check(recipe)
        if self.power <= 0:
            raise RnnzooError(f"power is {self.power:g}; it must be positive.")

    def trainable(self):
        return "mixers"

    def run(self, context, student, part):
        report = train(
            context,
            MimicTrainer,
            student,
            self,
            part,
            lambda name: ".mixer." in name,
            teacher_model=context.teacher_model,
        )
        return student, report | {"power": self.power}


class MimicTrainer(StageTrainer):
    stage: Mimic

    def loss(self, model, ids, seq_ids, *others):
        with torch.no_grad():
            target = final_hidden(self.teacher_model, ids, seq_ids)
        return (final_hidden(model, ids, seq_ids) - target).abs().pow(self.stage.power).mean()


@pytest.fixture(autouse=True)
def registered():
    register_stage(Mimic)
    yield
    del KINDS["mimic"]


def recipe_file(folder, **stage) -> str:
    path = folder / "mine.yaml"
    stages = [{"name": "fit", "kind": "calibrate"}, {"name": "copy", "kind": "mimic", "share": 1.0} | stage]
    sizes = {"seq_len": 64, "batch_tokens": 64, "tokens": 12 * 64, "calibration_tokens": 3 * 64}
    path.write_text(yaml.safe_dump({"student": "gla", "keep": "0", "stages": stages} | sizes))
    return str(path)


def test_recipes_may_name_it_and_its_settings_are_checked(tmp_path):
    assert load_recipe(recipe_file(tmp_path, power=1)).stages[1] == Mimic("copy", share=1.0, power=1.0)
    for settings, words in (
        ({"power": -1}, "mine.yaml, stage copy: power is -1; it must be positive"),
        ({"power": "big"}, "mine.yaml, stage 2: power is 'big'; expected float"),
        ({"strength": 1}, "mine.yaml, stage 2 has the unknown key 'strength'"),
        ({"schedule": "steep"}, "stage copy: schedule is 'steep'"),
    ):
        with pytest.raises(RnnzooError, match=words):
            load_recipe(recipe_file(tmp_path, **settings))


def test_it_runs_in_a_conversion_and_goes_on_where_it_was_stopped(tmp_path):
    teacher, recipe = str(tiny_teacher("llama", tmp_path)), recipe_file(tmp_path)
    data = [str(write_documents(tmp_path / "text.jsonl", 200))]
    planned = make_plan(teacher, recipe).to_dict()["stages"][1]
    assert planned == {"stage": "copy", "kind": "mimic", "tokens": 12 * 64, "trains": "mixers"}
    own: dict[str, Any] = {"data": data, "dtype": "float32", "evaluate": False}
    results = convert(teacher, recipe, tmp_path / "whole", **own)
    with pytest.raises(RnnzooError, match="the stage copy of .* needs the whole model"):
        convert(teacher, recipe, tmp_path / "parts", **own, offload=True)

    class Stopped(BaseException):
        pass

    steps: list[int] = []

    def stop(stage, done, total, info):
        if stage == "copy" and done >= 7 * 64 and info:
            raise Stopped

    with pytest.raises(Stopped):
        convert(teacher, recipe, tmp_path / "stopped", **own, progress=stop)
    seen = lambda stage, done, total, info: steps.append(done // 64) if stage == "copy" and info else None  # noqa: E731
    again = convert(teacher, recipe, tmp_path / "stopped", **own, progress=seen)
    assert steps[0] > 1 and steps[-1] == 12
    reports = [found["conversion"]["stages"][-1] for found in (results, again)]
    for key in ("name", "power", "tokens", "loss_first", "loss_last"):
        assert reports[0][key] == reports[1][key]
    assert reports[0]["name"] == "copy" and reports[0]["power"] == 2.0 and reports[0]["loss_first"] > 0
    one, two = (causal_lm_class("gla").from_pretrained(tmp_path / out).state_dict() for out in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    request = json.loads((tmp_path / "whole" / ".rnnzoo" / "run.json").read_text())["request"]
    assert request["recipe"]["stages"][1]["kind"] == "mimic" and request["offload"] is False
