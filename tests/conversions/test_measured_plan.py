"""`plan --select` and `--allocate` measure what the conversion then does, and draw it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from rnnzoo.cli.plan_command import command
from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.plan import make_plan
from rnnzoo.kernels.errors import RnnzooError

from .tiny import tiny_teacher

WORDS = "the tide of the north wind carried ships to an old harbour where people sang that it was morning ".split()
OPTIONS = {"feature_map": "prototype", "feature_width": 4, "num_sinks": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("d") / "text.jsonl"
    generator = torch.Generator().manual_seed(0)
    texts = (" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (300,), generator=generator)) for _ in range(60))
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return [str(path)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(tiny_teacher("llama", tmp_path_factory.mktemp("t"), num_hidden_layers=4))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("r") / "mine.yaml"
    stage = {"name": "calibrate", "kind": "calibrate", "feature_widths": [2, 6], "parts": ["windows", "features"]}
    fields = {"name": "mine", "student": "hedgehog", "student_options": OPTIONS, "stages": [stage]}
    path.write_text(
        yaml.safe_dump(fields | {"state_budget": 12_000, "tokens": 0, "seq_len": 64, "calibration_tokens": 128})
    )
    return str(path)


def test_the_plan_is_what_the_conversion_does(teacher, recipe, data, tmp_path, monkeypatch):
    monkeypatch.setenv("RNNZOO_CACHE", str(tmp_path / "cache"))
    said = make_plan(teacher, recipe, keep="best 25%", select=True, allocate=True, data=data).to_dict()
    kept = said["kept_attention"]
    assert len(kept) == 1 and said["ranking"]["order"][0] == kept[0]
    out = tmp_path / "out"
    results = convert(teacher, recipe, out, keep="best 25%", data=data, evaluate=False)
    assert results["conversion"]["ranking"]["order"] == said["ranking"]["order"]
    record = next(stage for stage in results["conversion"]["stages"] if stage["name"] == "calibrate")["allocation"]
    assert record == said["allocation"]
    model = results["model"]
    assert model["state_bytes"] == record["state_bytes"] <= 12_000 == said["state_bytes"]
    assert model["parameters"] == said["student_parameters"]
    by_layer = {entry["layer"]: entry for entry in record["layers"]}
    assert sorted({0, 1, 2, 3} - set(kept)) == sorted(by_layer)
    for i, entry in by_layer.items():
        assert model["windows"][i] == entry["windows"] and model["feature_widths"][i] == entry["feature_width"]
        assert model["layer_state_bytes"][i] == entry["bytes"]
    with pytest.raises(RnnzooError, match="has converted other layers than this plan"):
        make_plan(teacher, recipe, keep="none", run=str(out))
    drawn = make_plan(teacher, recipe, keep=str(kept[0]), run=str(out)).to_dict()
    assert drawn["allocation"] == record and drawn["student_parameters"] == model["parameters"]
    # The ranking is in the cache, and its file does for another plan, without weights.
    file = said["ranking"]["file"]
    assert file.startswith(str(tmp_path / "cache"))
    assert make_plan(teacher, recipe, keep="best 25%", ranking=file).to_dict()["kept_attention"] == kept


def test_without_a_ranking_the_plan_leaves_open_which_layers_are_kept(teacher, recipe):
    said = make_plan(teacher, recipe, keep="best 2").to_dict()
    assert said["kept_attention"] is None and said["layers"] == [] and said["recipe"]["steps"] == ["best 2"]
    token = 2 * 2 * 8 * 2
    assert said["kept_attention_bytes_per_1k_tokens"] == 2 * 1024 * token


def test_a_budget_can_keep_attention(teacher, recipe, data, tmp_path):
    """Where its context costs next to nothing, attention is what removes the most error per byte."""
    fields = yaml.safe_load(Path(recipe).read_text()) | {"state_budget": 9_000}
    fields["stages"][0]["budget_context"] = 40
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(fields))
    results = convert(teacher, str(path), tmp_path / "out", data=data, evaluate=False)
    record = results["conversion"]["stages"][1]["allocation"]
    kinds = results["model"]["layer_types"]
    assert record["attention"] == [i for i, kind in enumerate(kinds) if kind == "full_attention"] != []
    assert record["attention_bytes"] == len(record["attention"]) * 40 * 2 * 2 * 8 * 2
    assert record["state_bytes"] + record["attention_bytes"] <= 9_000
    assert results["model"]["state_bytes"] == record["state_bytes"]


def test_tables_have_bars(teacher, recipe, data, tmp_path):
    arguments = [teacher, "--recipe", recipe, "--select", "--allocate", "--data", data[0]]
    result = CliRunner().invoke(command, [*arguments, "--ranking", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    ranking, allocation = result.output.split("ranking layers")[1].split("allocation layers")
    for part in (ranking, allocation):
        assert "█" * 24 in part and "█" * 25 not in part
    assert "swap kl" in ranking and "feature width" in allocation and (tmp_path / "r.json").exists()
    said = json.loads(CliRunner().invoke(command, [*arguments, "--json", "--ranking", str(tmp_path / "r.json")]).stdout)
    assert said["ranking"]["order"] == json.loads((tmp_path / "r.json").read_text())["order"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "supra", "allocate": True}, "--allocate divides a state budget, but the recipe supra .* has none"),
        ({"keep": "best 2", "allocate": True}, "takes layers from a ranking; give --select or --ranking"),
        ({"run": "nowhere"}, "nowhere holds no conversion"),
    ],
)
def test_what_cannot_be_drawn_is_refused(teacher, recipe, options, message):
    with pytest.raises(RnnzooError, match=message):
        make_plan(teacher, options.pop("recipe", recipe), **options)
