"""Students that choose by a score what they keep: scores and sizes come from the teacher alone, without training."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.fit.closed_form import ClosedForm
from rnnzoo.conversions.fit.scored_errors import measure_scored
from rnnzoo.conversions.layers import InMemoryLayers
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.recipes.load import load_recipe
from rnnzoo.conversions.stages.calibrate import fit_layers
from rnnzoo.conversions.student import build_student, layer_types, student_config, zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.registry import mixer_class
from rnnzoo.zoo.core.sizes import state_bytes
from rnnzoo.zoo.salient.modeling_salient import SalientForCausalLM

from .tiny import tiny_teacher

WORDS = "the state of a network is what it keeps of all the words that it has read so far".split()
TIME = 256


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    ref = resolve_teacher(str(tiny_teacher("llama", tmp_path_factory.mktemp("t"))))
    return ref, ref.load()


def rows(count: int = 2) -> PackedTokens:
    ids = torch.randint(3, 310, (count, TIME), generator=torch.Generator().manual_seed(0))
    return PackedTokens(ids, torch.zeros_like(ids), "test", TextHashes("test"))


def configured(teacher, **options):
    recipe = Recipe("test", "salient", [], student_options={"window_size": 24, "num_sinks": 2} | options)
    return student_config(teacher[0], recipe, layer_types(teacher[0], recipe, []))


def test_more_tokens_leave_less_error_and_all_of_them_none(teacher):
    teacher_model = zoo_teacher(*teacher, torch.float32)
    measured = measure_scored(teacher_model, rows(), configured(teacher), mixer_class("salient"), 0)
    layers, kv_heads = teacher_model.config.num_hidden_layers, teacher_model.config.num_key_value_heads
    assert measured.errors.shape == (layers, kv_heads, 1, len(measured.windows)) and measured.widths == (0,)
    assert measured.windows[-1] < TIME and bool((measured.errors >= 0).all())
    assert bool((measured.errors[..., -1] < measured.errors[..., 0] * 0.5).all())


def test_the_scores_of_a_calibrated_student_are_those_of_its_teachers_layers(teacher):
    teacher_model, student = zoo_teacher(*teacher, torch.float32), None
    student = build_student(*teacher, configured(teacher), "salient", torch.float32, 0).eval()
    assert all(not block.mixer.score_weight.any() for block in student.model.layers)
    layers = InMemoryLayers(teacher_model, student)
    fit_layers(layers, rows(), ClosedForm([]), scores=True)
    weights = [block.mixer.score_weight for block in student.model.layers]
    assert all(weight.any() for weight in weights)

    with torch.no_grad():  # what it keeps is worth more to the teacher's own outputs than the last tokens are
        ids = rows(3).input_ids[2:].long()
        exact = teacher_model(ids, use_cache=False).logits.log_softmax(-1)

        def distance() -> float:
            found = student(ids, use_cache=False).logits.log_softmax(-1)
            return float((exact.exp() * (exact - found)).sum(-1).mean())

        scored = distance()
        for weight in weights:
            weight.zero_()
        assert scored < distance()


def test_the_recipe_divides_its_budget_and_fits_its_scores(tmp_path):
    generator = torch.Generator().manual_seed(0)
    texts = (" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (900,), generator=generator)) for _ in range(20))
    data, path = tmp_path / "text.jsonl", tmp_path / "mine.yaml"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    recipe = load_recipe("salient").to_dict() | {"name": "mine", "state_budget": 9_000}
    recipe |= {"calibration_tokens": 2 * TIME, "tokens": 2 * TIME, "seq_len": TIME, "batch_tokens": TIME}
    recipe["student_options"]["ring_bits"] = None
    path.write_text(yaml.safe_dump(recipe))
    teacher = str(tiny_teacher("llama", tmp_path))
    results = convert(teacher, str(path), tmp_path / "out", data=[str(data)], evaluate=False, dtype="float32")
    calibrated, distilled = results["conversion"]["stages"][-2:]
    assert distilled["tokens"] == 2 * TIME
    allocation = calibrated["allocation"]
    sizes = [entry["windows"] for entry in allocation["layers"]]
    assert len({size for layer in sizes for size in layer}) > 1 and 8_000 < allocation["state_bytes"] <= 9_000
    model = SalientForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.window_sizes == sizes and state_bytes(model.config, torch.float32) == allocation["state_bytes"]
    assert all(block.mixer.score_weight.any() for block in model.model.layers)


def test_scores_are_refused_where_nothing_is_kept_by_them(tmp_path):
    (path := tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {"name": "mine", "student": "hedgehog", "stages": [{"name": "c", "kind": "calibrate", "parts": ["scores"]}]}
        )
    )
    with pytest.raises(RnnzooError, match="scores is for layers that keep tokens by a score; 'hedgehog' has none"):
        load_recipe(str(path))
