"""Recipes: the shipped ones load, wrong ones are told in one sentence, `keep` means what it says."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from rnnzoo.conversions.recipes import Recipe, keep_steps, kept_layers, list_recipes, parse_keep
from rnnzoo.conversions.recipes.keep import check_ranking
from rnnzoo.conversions.recipes.load import load_recipe
from rnnzoo.conversions.recipes.prepare import prepare_recipe
from rnnzoo.conversions.stages.train import Train
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError

from .tiny import tiny_teacher

GOOD = {"name": "mine", "student": "supra", "stages": [{"name": "up", "kind": "train", "share": 1.0}]}
CALIBRATE = {"name": "fit", "kind": "calibrate"}


def written(tmp_path, recipe) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return str(path)


def stage(**changes) -> dict:
    return GOOD | {"stages": [GOOD["stages"][0] | changes]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return resolve_teacher(str(tiny_teacher("llama", tmp_path_factory.mktemp("teacher"), num_hidden_layers=4)))


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_load_and_are_described(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description and recipe.source
    assert list_recipes()[name] == recipe.description
    assert sum(stage.share for stage in recipe.stages) == pytest.approx(1.0)


def test_a_recipe_written_out_loads_as_itself(tmp_path):
    for name in list_recipes():
        recipe = load_recipe(name)
        assert load_recipe(written(tmp_path, recipe.to_dict())) == recipe


def test_what_is_not_given_has_its_default(tmp_path):
    recipe = load_recipe(written(tmp_path, {k: v for k, v in GOOD.items() if k != "name"}))
    assert recipe == Recipe(name="mine", student="supra", stages=[Train("up", share=1.0)])


def test_yaml_numbers_without_a_point_are_numbers(tmp_path):
    assert load_recipe(written(tmp_path, stage(lr=1) | {"tokens": 1e5})).tokens == 100_000
    text = "student: supra\nstages: [{name: up, kind: train, lr: 3e-4}]"
    assert load_recipe(written(tmp_path, text)).stages[0].lr == 3e-4


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (GOOD | {"tokenz": 5}, "mine.yaml has the unknown key 'tokenz'; known are name"),
        (GOOD | {5: 1, "x": 2}, "unknown key 5"),
        (stage(rate=1.0), "mine.yaml, stage 1 has the unknown key 'rate'"),
        (GOOD | {"tokens": "many"}, "tokens is 'many'; expected int"),
        (GOOD | {"tokens": 1.5}, "expected a whole number"),
        (GOOD | {"tokens": float("inf")}, "tokens is inf; expected a finite number"),
        (GOOD | {"tokens": True}, "tokens is True"),
        (GOOD | {"progressive": "yes please"}, "progressive is 'yes please'; expected bool"),
        (GOOD | {"keep": 4}, "keep is 4; expected str"),
        (GOOD | {"state_budget": "4MB"}, "state_budget is '4MB'"),
        (GOOD | {"student_options": [1]}, "student_options"),
        (stage(lr="fast"), "lr is 'fast'; expected float"),
        (stage(lr=float("nan")), "expected a finite number"),
        ({k: v for k, v in GOOD.items() if k != "student"}, "lacks the key 'student'"),
        ({k: v for k, v in GOOD.items() if k != "stages"}, "stages must be a list"),
        (GOOD | {"stages": []}, "stages must be a list"),
        (GOOD | {"stages": ["train"]}, "stage 1 is a str; expected a mapping"),
        (GOOD | {"stages": [{"name": "up"}]}, "stage 1 lacks the key 'kind'"),
        (GOOD | {"stages": GOOD["stages"] * 2}, "two stages have the same name"),
        (GOOD | {"student": "transfomer"}, "no mixer 'transfomer'; known are"),
        (GOOD | {"student": "full_attention"}, "no mixer 'full_attention'"),
        (stage(kind="finetune"), "kind is 'finetune'; expected one of"),
        (stage(trains="some"), "trains is 'some'"),
        (stage(schedule="step"), "schedule is 'step'"),
        (stage(labels="none"), "labels is 'none'"),
        (stage(rest_lr="slow"), "rest_lr is 'slow'; expected float | None"),
        (stage(lora_targets=["q_proj", 2]), "lora_targets is ['q_proj', 2]; expected list[str]"),
        (stage(trains="lora", lora_rank=0), "LoRA needs a lora_rank of 1 or more"),
        (stage(epochs=0), "epochs is 0"),
        (stage(kl=0), "kl, reverse_kl and ce are all 0"),
        (stage(ce=-1), "ce is -1; the weight of a loss cannot be negative"),
        (stage(kl=0, ce=1, teacher="large"), "the teacher large is not asked"),
        (stage(kl=0, ce=1, cache_top_k=8), "cache_top_k is 8"),
        (stage(kind="extend", length=64, chunk=128), "chunk is 128; it must lie between 2 and length, which is 64"),
        (stage(kind="extend", grad_chunks=0), "grad_chunks must be 1 or more"),
        (stage(kind="extend", name="training"), "training is the name of a part of the text"),
        (stage(kind="sft", loss_on="user"), "loss_on is 'user'"),
        (stage(kind="dpo", beta=0), "beta is 0"),
        (stage(name="../up"), "cannot be named '../up'"),
        (stage(name="finished"), "cannot be named 'finished'"),
        (stage(share=1.5), "between 0 and 1"),
        (GOOD | {"tokens": -1}, "tokens not negative"),
        (GOOD | {"batch_tokens": 0}, "must be positive"),
        (
            GOOD | {"stages": [CALIBRATE | {"parts": ["windows"]}]},
            "the part windows is for layers with windows of chosen lengths; 'supra' has none",
        ),
        (GOOD | {"stages": [CALIBRATE | {"parts": ["keys"]}]}, "parts has 'keys'; expected some of windows"),
        (GOOD | {"stages": [CALIBRATE | {"ridge": -1}]}, "ridge is -1; it cannot be negative"),
        (GOOD | {"stages": [CALIBRATE | {"correct": 2}]}, "correct is 2; it must lie between 0 and 1"),
        (GOOD | {"stages": [CALIBRATE | {"weighting": "all"}]}, "weighting is 'all'; expected one of"),
        (GOOD | {"stages": [CALIBRATE], "state_budget": 1000}, "a state budget is divided by a stage"),
        (GOOD | {"student": "hedgehog", "state_budget": 1000}, "a state budget is divided by a stage"),
        ("- a\n- b", "holds a list; expected a mapping"),
        ("", "holds a NoneType"),
        ("a: [1, 2\nb: }", "is not readable YAML"),
        ("\x00", "is not readable YAML"),
    ],
)
def test_wrong_recipes_are_told_in_one_sentence(tmp_path, recipe, message):
    with pytest.raises(RnnzooError) as raised:
        load_recipe(written(tmp_path, recipe))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_bytes_that_are_no_text_and_unknown_names_are_told(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RnnzooError, match="is not readable YAML"):
        load_recipe(str(path))
    with pytest.raises(RnnzooError, match="no recipe 'rnnmuseum'; known are .*mamba-in-llama, .*rnnzoo, .*supra"):
        load_recipe("rnnmuseum")


@pytest.mark.parametrize(
    ("keep", "layers"),
    [
        ("none", []),
        ("NONE", []),
        ("1/1", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("1/2", [1, 3, 5, 7]),
        ("1/3", [2, 5]),
        ("1/8", [7]),
        ("5,2,2", [2, 5]),
        ("7", [7]),
        ("0", [0]),
        ("0,3", [0, 3]),
        ("0, 3", [0, 3]),
        ("uniform 1/4", [3, 7]),
        ("first 3", [0, 1, 2]),
        ("last 25%", [6, 7]),
        ("Last  1/8", [7]),
        ("first 0", []),
        ("best 2", [1, 6]),
        ("best 50%", [1, 2, 6, 7]),
        ("best 1%", [6]),
        ("best 1/4", [1, 6]),
        ("best 8", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_keep(keep, layers):
    assert parse_keep(keep, 8, [6, 1, 7, 2, 0, 5, 3, 4]) == layers


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("8", "no layer 8; the teacher's layers are 0 to 7"),
        ("1,99", "no layer 99"),
        ("1/9", "between 1/8 and 1/1 for 8 layers"),
        ("1/0", "between 1/8 and 1/1"),
        ("2/3", "neither none, a share such as 1/4, nor layer numbers"),
        ("half", "neither none"),
        ("-1", "neither none"),
        ("1,,2", "neither none"),
        ("first", "neither none"),
        ("first -1", "neither none"),
        ("uniform 4", "neither none"),
        ("best half", "neither none"),
        ("best 1/0", "neither none"),
        ("last 9", "the teacher has 8 layers"),
        ("best 150%", "the teacher has 8 layers"),
        ("best 2", "takes layers from a ranking, and there is none; .*--select"),
    ],
)
def test_wrong_keep(keep, message):
    with pytest.raises(RnnzooError, match=message):
        parse_keep(keep, 8)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7, 8, 24, 30])
def test_progressive_steps_convert_more_and_more_and_undo_nothing(layers):
    recipe = dataclasses.replace(load_recipe("mamba-in-llama"), keep="none")
    steps = keep_steps(recipe, layers)
    quarter = [",".join(str(layer) for layer in range(layers) if layer % 4)] if layers >= 4 else []
    assert steps == quarter + [f"1/{n}" for n in (2, 4, 8) if n <= layers] + ["none"]
    kept = [set(parse_keep(step, layers)) for step in steps]
    assert all(later < earlier for earlier, later in zip(kept, kept[1:], strict=False))


def test_progress_ends_at_what_was_asked_for():
    recipe = load_recipe("mamba-in-llama")
    quarter = ",".join(str(layer) for layer in range(24) if layer % 4)
    assert keep_steps(recipe, 24) == [quarter, "1/2"]
    assert keep_steps(dataclasses.replace(recipe, keep="1/4"), 24) == [quarter, "1/2", "1/4"]
    assert keep_steps(dataclasses.replace(recipe, keep="0"), 4)[-1] == "0"
    assert keep_steps(dataclasses.replace(recipe, keep="none", progressive=False), 24) == ["none"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("supra", {"state_budget": 5000}, "--state-budget divides windows"),
        ("rnnzoo", {"state_budget": 500}, "A state budget of 500 bytes is too small"),
        ("supra", {"seq_len": 513}, "positions up to 512"),
        ("supra", {"seq_len": 1}, "between 2 and 512"),
        ("supra", {"keep": "9"}, "no layer 9"),
        ("supra", {"keep": "1/1"}, "keeps every layer"),
        ("supra", {"tokens": -4}, "tokens not negative"),
    ],
)
def test_values_that_do_not_fit_the_teacher_are_refused(teacher, name, options, message):
    with pytest.raises(RnnzooError, match=message):
        prepare_recipe(name, teacher, **options)


def test_options_that_do_not_fit_the_architecture_are_refused(teacher, tmp_path):
    wrong = GOOD | {"student": "hedgehog", "student_options": {"feature_map": "polynomial"}}
    with pytest.raises(RnnzooError, match="student cannot be built: .*feature_map must be"):
        prepare_recipe(written(tmp_path, wrong), teacher)


def test_the_users_values_replace_the_recipes(teacher):
    recipe = prepare_recipe("rnnzoo", teacher, keep="1/2", state_budget=20_000, tokens=4096, seq_len=128)
    assert (recipe.keep, recipe.state_budget, recipe.tokens, recipe.seq_len) == ("1/2", 20_000, 4096, 128)
    assert prepare_recipe("supra", teacher).seq_len == 512  # no longer than the teacher's positions


def test_the_least_important_layers_are_converted_first():
    ranking = [6, 1, 7, 2, 0, 5, 3, 4]
    recipe = dataclasses.replace(load_recipe("mamba-in-llama"), keep="best 1", ranking=ranking)
    assert recipe.progressive and keep_steps(recipe, 8) == ["0,1,2,5,6,7", "1,2,6,7", "1,6", "6"]
    stepwise = dataclasses.replace(recipe, progressive=False, stepwise=True, keep="best 5")
    assert keep_steps(stepwise, 8) == ["0,1,2,3,5,6,7", "0,1,2,5,6,7", "0,1,2,6,7"]
    assert keep_steps(dataclasses.replace(recipe, keep="best 0"), 8)[-1] == "none"


def test_before_there_is_a_ranking_best_stands_for_as_many_layers():
    recipe = dataclasses.replace(load_recipe("rnnzoo"), keep="best 25%")
    assert kept_layers(recipe, 8) == [0, 1] and keep_steps(recipe, 8) == ["0,1"]


def test_a_ranking_of_other_layers_is_refused():
    with pytest.raises(RnnzooError, match="ranks the layers 0, 2, 2; expected each of 0 to 2 once"):
        check_ranking([0, 2, 2], 3, "The recipe x")
