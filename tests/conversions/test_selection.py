"""A ranking finds the layers that matter, and a conversion keeps these."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import yaml

from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.ranking import default_path, load_ranking, measure_layers, save_ranking
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.student import build_student, layer_types, student_config, zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.sizes import causal_lm_class

from .tiny import tiny_model, tiny_teacher, tiny_tokenizer

WORDS = "the tide of the north wind carried ships to an old harbour where people sang that it was morning ".split()
HEDGEHOG = {"feature_map": "prototype", "feature_width": 4, "window_size": 3, "num_sinks": 1}


def text(seed: int) -> str:
    order = torch.randint(0, len(WORDS), (300,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in order)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Many documents, so that there are some to calibrate on and some to evaluate on."""
    path = tmp_path_factory.mktemp("d") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text(seed)}) for seed in range(60)))
    return [str(path)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Of four layers, only the attention of layer 2 does anything, and that of layer 0 a little."""
    folder = tmp_path_factory.mktemp("t") / "planted"
    model = tiny_model("llama", num_hidden_layers=4)
    for i, factor in enumerate((0.003, 0.0, 1.0, 0.0)):
        model.model.layers[i].self_attn.o_proj.weight.data *= factor
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def recipe_file(tmp_path, **changes):
    recipe = {"name": "mine", "student": "hedgehog", "student_options": HEDGEHOG, "calibration_tokens": 128}
    recipe |= {"stages": [{"name": "calibrate", "kind": "calibrate"}], "tokens": 0, "seq_len": 64} | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_figures_are_those_of_whole_models_with_another_mixer(family, tmp_path):
    ref = resolve_teacher(str(tiny_teacher(family, tmp_path, num_hidden_layers=3)))
    model = ref.load()
    teacher_model = zoo_teacher(ref, model, torch.float32)
    recipe = Recipe("test", "hedgehog", [], student_options=HEDGEHOG)
    config = student_config(ref, recipe, layer_types(ref, recipe, []))
    student = build_student(ref, model, config, "hedgehog", torch.float32, 0).eval()
    ids = torch.randint(3, 310, (2, 24), generator=torch.Generator().manual_seed(0))
    seq_ids = torch.tensor([[0] * 10 + [1] * 14, [0] * 24])
    found = measure_layers(teacher_model, student, PackedTokens(ids, seq_ids, "test", TextHashes("test")))
    with torch.no_grad():
        true = teacher_model(ids, seq_ids=seq_ids).logits.double().log_softmax(-1)
    for i in range(3):
        bypassed, swapped = copy.deepcopy(teacher_model), copy.deepcopy(teacher_model)
        for parameter in bypassed.model.layers[i].mixer.proj.o_proj.parameters():
            parameter.zero_()
        swapped.model.layers[i].mixer = student.model.layers[i].mixer
        for name, changed in (("bypass_kl", bypassed), ("swap_kl", swapped)):
            with torch.no_grad():
                said = changed(ids, seq_ids=seq_ids).logits.double().log_softmax(-1)
            kl = float((true.exp() * (true - said)).sum(-1)[:, 3::4].mean())
            assert found[i][name] == pytest.approx(kl, rel=1e-3, abs=1e-6)


def test_a_conversion_keeps_the_layers_that_matter(planted, data, tmp_path):
    out = tmp_path / "out"
    calls = dict(data=data, keep="best 25%", evaluate=False, dtype="float32")
    results = convert(planted, recipe_file(tmp_path), out, **calls)
    kinds = ["hedgehog", "hedgehog", "full_attention", "hedgehog"]
    assert results["model"]["layer_types"] == kinds
    ranking = results["conversion"]["ranking"]
    assert ranking["order"][:2] == [2, 0] and ranking["tokens"] == 128
    by_layer = {entry["layer"]: entry for entry in ranking["layers"]}
    for i in (1, 3):
        assert by_layer[i]["bypass_kl"] == pytest.approx(0, abs=1e-6) == by_layer[i]["swap_kl"]
    assert by_layer[2]["bypass_kl"] > by_layer[0]["bypass_kl"] > 0 and by_layer[2]["rank"] == 1
    assert json.loads((out / ".rnnzoo" / "ranking.json").read_text()) == ranking
    again = convert(planted, recipe_file(tmp_path), out, **calls)
    assert again["recipe"] == results["recipe"] and "ranking:" in again["recipe"]["yaml"]
    # From the file, the same without measuring.
    file = tmp_path / "ranking.json"
    save_ranking(file, ranking)
    other = convert(planted, recipe_file(tmp_path), tmp_path / "other", ranking=str(file), **calls)
    assert other["model"]["layer_types"] == kinds and "ranking" not in other["conversion"]
    one, two = (
        causal_lm_class("hedgehog").from_pretrained(folder).state_dict() for folder in (out, tmp_path / "other")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_stopped_goes_on_with_its_ranking(planted, data, tmp_path, monkeypatch):
    """Killed right after the ranking; the second time, nothing is measured."""
    from rnnzoo.conversions import pipeline
    from rnnzoo.conversions.context import StageContext

    calls = dict(data=data, keep="best 1", evaluate=False, dtype="float32")
    whole = convert(planted, recipe_file(tmp_path), tmp_path / "whole", **calls)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageContext, "initialise", _at_call(StageContext.initialise, 2, killed))
        convert(planted, recipe_file(tmp_path), tmp_path / "out", **calls)
    monkeypatch.setattr(pipeline, "rank_layers", killed)
    results = convert(planted, recipe_file(tmp_path), tmp_path / "out", **calls)
    assert results["model"]["layer_types"] == whole["model"]["layer_types"]
    assert results["recipe"] == whole["recipe"]


def _at_call(function, number: int, then):
    """`function`, but `then` from its call `number` on."""
    count = []

    def called(*args, **kwargs):
        count.append(1)
        return (then if len(count) >= number else function)(*args, **kwargs)

    return called


def test_progressively_the_least_important_layers_are_converted_first(planted, data, tmp_path):
    path = recipe_file(tmp_path, progressive=True)
    results = convert(planted, path, tmp_path / "out", data=data, keep="best 1", evaluate=False, dtype="float32")
    order = results["conversion"]["ranking"]["order"]
    run = json.loads((tmp_path / "out" / ".rnnzoo" / "run.json").read_text())
    kept = [stage["kept"] for stage in run["stages"] if "kept" in stage]
    assert kept == [sorted(order[:3]), sorted(order[:2]), [2]]


def test_rankings_of_other_teachers_and_students_and_no_rankings_are_refused(planted, data, tmp_path):
    teacher = resolve_teacher(planted)
    good = {"teacher": teacher.sha, "student": "hedgehog", "order": [2, 0, 1, 3]}
    file = tmp_path / "ranking.json"
    for ranking, message in (
        (good | {"teacher": "sha256:1"}, "is of the teacher sha256:1, but this conversion's is"),
        (good | {"student": "gla"}, "is of the student gla, but this conversion's is hedgehog"),
        (good | {"order": [2, 0]}, "ranks the layers 2, 0; expected each of 0 to 3 once"),
        ([1, 2], "is no ranking of layers"),
    ):
        save_ranking(file, ranking)
        with pytest.raises(RnnzooError, match=message):
            load_ranking(file, teacher, "hedgehog")
    with pytest.raises(RnnzooError, match="cannot be read: No such file"):
        load_ranking(tmp_path / "none.json", teacher, "hedgehog")
    with pytest.raises(RnnzooError, match="cannot be written"):
        save_ranking(file / "below", good)
    save_ranking(file, good)
    with pytest.raises(RnnzooError, match="--ranking is for .*, but the recipe keeps none"):
        convert(planted, recipe_file(tmp_path), tmp_path / "out", data=data, ranking=str(file))
    assert load_ranking(file, teacher, "hedgehog") == [2, 0, 1, 3] and not (tmp_path / "out").exists()


def test_the_default_file_is_of_teacher_recipe_and_student(planted, tmp_path, monkeypatch):
    monkeypatch.setenv("RNNZOO_CACHE", str(tmp_path))
    teacher = resolve_teacher(planted)
    paths = {default_path(teacher, Recipe(*names, [])) for names in (("a", "gla"), ("a", "gsa"), ("b", "gla"))}
    assert len(paths) == 3 and all(path.parent == tmp_path / "rankings" for path in paths)
