"""Conversions from end to end through the API, on tiny teachers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import rnnzoo  # noqa: F401  (registers the Auto classes)
from rnnzoo.conversions import memory
from rnnzoo.conversions import results as results_module
from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.pipeline import Pipeline
from rnnzoo.conversions.plan import make_plan
from rnnzoo.conversions.recipes.load import load_recipe
from rnnzoo.conversions.run_folder import Run
from rnnzoo.conversions.stages.calibrate import Calibrate
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.cache import CACHE_NAME, RecurrentCache

from ..end_to_end.conftest import write_documents
from .tiny import tiny_teacher

SMALL = {"tokens": 1024, "seq_len": 128, "dtype": "float32", "evaluate": False}
GENERATION = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "repetition_penalty": 1.05}
OPTIONS = {
    "rnnzoo": {"state_budget": 40_000},
    "supra": {},
    "mamba-in-llama": {"keep": "none"},
}
SCRIPT = """
import sys, torch, rnnzoo
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
logits = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad(): logits[folder] = model(ids).logits
torch.save(logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return [str(write_documents(tmp_path_factory.mktemp("data") / "text.jsonl", 300))]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    made = {f: tiny_teacher(f, tmp_path_factory.mktemp("t")) for f in ("llama", "qwen3", "gpt_neox")}
    for folder in made.values():
        (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return {family: str(folder) for family, folder in made.items()}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, str]:
    """The shipped recipes with less text to calibrate on."""
    folder, paths = tmp_path_factory.mktemp("recipes"), {}
    for name in OPTIONS:
        paths[name] = str(folder / f"{name}.yaml")
        text = yaml.safe_dump(load_recipe(name).to_dict() | {"calibration_tokens": 512})
        Path(paths[name]).write_text(text)
    return paths


CASES = [(family, recipe) for family in ("llama", "qwen3", "gpt_neox") for recipe in OPTIONS]


@pytest.fixture(scope="module")
def conversions(teachers, recipes, data, tmp_path_factory):
    """(family, recipe) -> (folder, results, logits of the student that was published, as it was in memory)."""
    ids = torch.randint(3, 310, (2, 90), generator=torch.Generator().manual_seed(0))
    done, published, publish = {}, {}, Run.publish

    def spy(run, student, *others):
        with torch.no_grad():
            published[run.out] = student(ids, use_cache=False).logits
        publish(run, student, *others)

    Run.publish = spy
    try:
        for family, recipe in CASES:
            out = tmp_path_factory.mktemp("out") / f"{family}-{recipe}"
            results = convert(teachers[family], recipes[recipe], out, data=data, **SMALL, **OPTIONS[recipe])
            done[family, recipe] = (out, results, published[out])
    finally:
        Run.publish = publish
    return ids, done


def test_reloaded_models_give_the_logits_that_they_had(conversions, tmp_path):
    ids, done = conversions
    torch.save(ids, tmp_path / "ids.pt")
    folders = [str(out) for out, _, _ in done.values()]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt"), *folders]
    subprocess.run(command, check=True, capture_output=True)
    fresh = torch.load(tmp_path / "logits.pt")
    for out, _, logits in done.values():
        torch.testing.assert_close(fresh[str(out)], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_results_say_what_was_done(conversions, teachers, case):
    out, results, _ = conversions[1][case]
    assert json.loads((out / "results.json").read_text()) == results
    assert {"schema", "created", "rnnzoo_version", "model", "teacher", "recipe", "conversion"} <= set(results)
    options = _plan_options(case[1]) | ({"run": str(out)} if case[1] == "rnnzoo" else {})
    model, planned = results["model"], make_plan(teachers[case[0]], case[1], **options).to_dict()
    assert model["parameters"] == planned["student_parameters"]
    assert results["teacher"]["parameters"] == planned["parameters"]
    assert model["layer_types"] == [layer["mixer"] for layer in planned["layers"]]
    conversion = results["conversion"]
    assert conversion["tokens"] > 0 and set(conversion["data"]) == {"calibration", "training"}
    assert all(len(record["sha256"]) == 64 for record in conversion["data"].values())
    names = [stage["name"] for stage in conversion["stages"]]
    assert (
        names
        == {
            "rnnzoo": ["initialise", "calibrate", "align", "distill"],
            "supra": ["initialise", "uptrain"],
            "mamba-in-llama": ["1-initialise", "1-distill", "1-finetune", "2-initialise", "2-finetune"],
        }[case[1]]
    )
    assert (out / "README.md").read_text().startswith("---")
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_student_generates_with_its_teachers_settings(conversions, case):
    settings = AutoModelForCausalLM.from_pretrained(conversions[1][case][0]).generation_config.to_dict()
    assert {name: settings[name] for name in GENERATION} == GENERATION


def _plan_options(recipe: str) -> dict:
    return OPTIONS[recipe] | {"tokens": SMALL["tokens"], "seq_len": SMALL["seq_len"]}


@pytest.mark.parametrize("case", CASES, ids="-".join)
@torch.no_grad()
def test_state_is_what_results_say_and_of_one_size(conversions, case):
    out, results, _ = conversions[1][case]
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    cache = RecurrentCache(model.config)
    sizes = set()
    for length in (10, 90, 900):
        model(torch.randint(3, 310, (1, length)), cache=cache)
        sizes.add(cache.num_bytes())
    assert sizes == {results["model"]["state_bytes"]}
    if case[1] == "rnnzoo":
        assert max(sizes) <= 40_000
        assert results["model"]["windows"] == model.config.window_sizes


def test_training_helped(conversions):
    for out, results, _ in conversions[1].values():
        for stage in results["conversion"]["stages"]:
            if "loss_first" in stage:
                assert 0 < stage["loss_last"] < 1.5 * stage["loss_first"] + 0.1, (out, stage)


def test_the_same_call_again_trains_nothing(conversions, teachers, recipes, data, monkeypatch):
    out, results, _ = conversions[1]["llama", "supra"]
    monkeypatch.setattr(Pipeline, "complete", None)
    assert convert(teachers["llama"], recipes["supra"], out, data=data, **SMALL) == results
    assert not list((out / ".rnnzoo").glob("student-*"))  # the model is in OUT; its float32 copy is gone


def test_evaluation_writes_card_and_plots(teachers, recipes, data, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    steps = set()
    options = SMALL | {"evaluate": True, "tokens": 0, "state_budget": 40_000}
    progress = lambda stage, *_: steps.add(stage)  # noqa: E731
    results = convert(teachers["llama"], recipes["rnnzoo"], out, data=data, progress=progress, **options)
    assert results["evaluation"]["perplexity"] and results["samples"]
    assert set(results["conversion"]["data"]) == {"calibration", "evaluation"}
    assert results["conversion"]["data"]["evaluation"]["source"]
    assert list((out / "plots").glob("*.png")) and "erplexity" in (out / "README.md").read_text()
    assert {"initialise", "calibrate"} < steps


def test_a_run_without_any_text_of_its_own_can_be_evaluated(teachers, data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        results_module, "evaluate", lambda folder, **_: json.loads((folder / "results.json").read_text())
    )
    options = SMALL | {"evaluate": True, "tokens": 0}
    results = convert(teachers["llama"], "supra", tmp_path / "out", data=data, **options)
    assert set(results["conversion"]["data"]) == {"evaluation"} and results["conversion"]["tokens"] == 0


def test_text_in_common_with_the_evaluation_is_refused(conversions, teachers, recipes, data):
    out, _, _ = conversions[1]["qwen3", "supra"]
    corpus = [json.loads(line)["text"] for line in Path(data[0]).read_text().splitlines()]
    before = (out / ".rnnzoo" / "evaluation_texts.json").read_text()
    (out / ".rnnzoo" / "evaluation_texts.json").write_text(json.dumps(corpus))
    try:
        with pytest.raises(RnnzooError, match="evaluation"):
            convert(teachers["qwen3"], recipes["supra"], out, data=data, **SMALL | {"evaluate": True})
    finally:
        (out / ".rnnzoo" / "evaluation_texts.json").write_text(before)
    assert (out / "model.safetensors").exists()


def interrupt_at(stage: str, after: int):
    seen = []

    def progress(name, done, total, info):
        seen.append(name)
        if name == stage and seen.count(stage) > after:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("recipe", "stage", "after"),
    [("rnnzoo", "calibrate", 0), ("rnnzoo", "distill", 1), ("mamba-in-llama", "2-finetune", 0)],
)
def test_an_interrupted_conversion_goes_on_to_the_same_weights(
    conversions, teachers, recipes, data, tmp_path, recipe, stage, after
):
    out, options = tmp_path / "out", SMALL | OPTIONS[recipe]
    with pytest.raises(KeyboardInterrupt):
        convert(teachers["llama"], recipes[recipe], out, data=data, progress=interrupt_at(stage, after), **options)
    assert not (out / "config.json").exists()
    results = convert(teachers["llama"], recipes[recipe], out, data=data, **options)
    expected, wanted, _ = conversions[1]["llama", recipe]
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    first, second = ([{**s, "seconds": 0} for s in r["conversion"]["stages"]] for r in (wanted, results))
    assert first == second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "/nowhere"}, "no folder /nowhere"),
        ({"recipe": "lolkats"}, "no recipe"),
        ({"keep": "99"}, "no layer 99"),
        ({"keep": "1/1"}, "keeps every layer"),
        ({"seq_len": 100_000}, "positions up to 512"),
        ({"dtype": "float16"}, "expected bfloat16 or float32"),
        ({"state_budget": 10}, "too small"),
        ({"recipe": "supra", "state_budget": 10_000}, "--state-budget divides windows"),
        ({"data": ["/nowhere.txt"]}, "nowhere"),
        ({"text_field": "body"}, "body"),
        ({"data": "few"}, "documents"),
        ({"data": "short"}, "sequence"),
    ],
)
def test_bad_input_leaves_nothing_behind(teachers, data, tmp_path, changes, message):
    few, short = tmp_path / "few.jsonl", tmp_path / "short.jsonl"
    few.write_text('{"text": "one"}\n{"text": "two"}\n')
    short.write_text("".join(f'{{"text": "word {i}"}}\n' for i in range(4)))
    options = {"teacher": teachers["llama"], "recipe": "rnnzoo", "data": data, "state_budget": 40_000} | SMALL
    if "recipe" in changes:
        options.pop("state_budget")
    options |= changes
    if isinstance(options["data"], str):
        options["data"] = [str({"few": few, "short": short}[options["data"]])]
    with pytest.raises(RnnzooError, match=message) as raised:
        convert(options.pop("teacher"), options.pop("recipe"), tmp_path / "out", **options)
    assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"few.jsonl", "short.jsonl"}


def test_bad_input_with_restart_does_not_cost_the_old_run(conversions, teachers, recipes):
    out, _, _ = conversions[1]["llama", "supra"]
    with pytest.raises(RnnzooError, match="nowhere"):
        convert(teachers["llama"], recipes["supra"], out, data=["/nowhere.txt"], restart=True, **SMALL)
    assert (out / "model.safetensors").exists() and (out / "results.json").exists()


def test_a_failure_of_a_resume_deletes_nothing(teachers, data, tmp_path, monkeypatch):
    """Stopped before any stage was finished, then a damaged file: what had been packed is still there."""

    def stop(name, *_):
        if name == "initialise":
            raise KeyboardInterrupt

    out, asked = tmp_path / "out", []
    monkeypatch.setattr(memory, "_glibc", asked.append)
    with pytest.raises(KeyboardInterrupt):
        convert(teachers["llama"], "supra", out, data=data, **SMALL, progress=stop)
    assert "mallopt" not in asked  # which would be for the whole process of the caller
    damaged = out / ".rnnzoo" / "data" / "training.safetensors"
    damaged.write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RnnzooError, match="training.safetensors"):
        convert(teachers["llama"], "supra", out, data=data, **SMALL)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_full_disk_is_told_and_the_run_can_go_on(teachers, data, tmp_path, monkeypatch):
    out, publish = tmp_path / "out", Run.publish

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "publish", full)
    with pytest.raises(RnnzooError, match="the same command will go on with it: the disk is full"):
        convert(teachers["llama"], "supra", out, data=data, **SMALL)
    monkeypatch.setattr(Run, "publish", publish)
    assert convert(teachers["llama"], "supra", out, data=data, **SMALL)["conversion"]["tokens"] == 1024
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("recipe", OPTIONS)
def test_bfloat16_is_what_is_planned_and_saved(teachers, recipes, data, tmp_path, recipe):
    out = tmp_path / "out"
    options = OPTIONS[recipe] | {"tokens": 0, "seq_len": 128}
    results = convert(teachers["llama"], recipes[recipe], out, data=data, evaluate=False, **options)
    planned = make_plan(teachers["llama"], recipes[recipe], **options).to_dict()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and results["model"]["dtype"] == "bfloat16"
    cache = model(torch.randint(3, 310, (1, 50)), use_cache=True)[CACHE_NAME]
    assert cache.num_bytes() == results["model"]["state_bytes"]
    if recipe == "rnnzoo":
        assert cache.num_bytes() <= planned["state_bytes"] == 40_000
    else:
        assert cache.num_bytes() == planned["state_bytes"]


def test_progressive_calibration_keeps_what_was_trained(teachers, recipes, data, tmp_path, monkeypatch):
    """The second step sizes all windows anew, and fits features only where they are new."""
    recipe, calibrate, seen = tmp_path / "steps.yaml", Calibrate.run, []
    recipe.write_text(yaml.safe_dump(yaml.safe_load(Path(recipes["rnnzoo"]).read_text()) | {"progressive": True}))

    def spy(stage, context, student, part):
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        after, report = calibrate(stage, context, student, part)
        changed = {name for name, tensor in after.state_dict().items() if not torch.equal(before[name], tensor)}
        seen.append((part.fresh, {name.split(".mixer.")[0] for name in changed}))
        return after, report

    monkeypatch.setattr(Calibrate, "run", spy)
    results = convert(teachers["llama"], str(recipe), tmp_path / "out", data=data, state_budget=40_000, **SMALL)
    assert seen == [([0], {"model.layers.0"}), ([1], {"model.layers.1"})]
    assert all(len(row) == 2 for row in results["model"]["windows"])
    assert results["model"]["state_bytes"] <= 40_000


@pytest.mark.parametrize("student", ["gated_delta_net", "rwkv7"])
def test_another_student_needs_nothing_but_its_name(teachers, data, tmp_path, student):
    results = convert(teachers["qwen3"], "rnnzoo", tmp_path / "out", data=data, student=student, keep="1/2", **SMALL)
    assert results["model"]["architecture"] == student
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.layer_types == [student, "full_attention"] * (model.config.num_hidden_layers // 2)
    ids = torch.arange(3, 20)[None]
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 21)
