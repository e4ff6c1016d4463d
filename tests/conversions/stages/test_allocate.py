"""The windows of a trained student move where they remove more error; its weights and its bytes stay."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.fit.observe import observe
from rnnzoo.conversions.fit.state_errors import measure_states
from rnnzoo.conversions.fit.trained_errors import measure_trained
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.recipes.load import load_recipe
from rnnzoo.conversions.run_folder import Run
from rnnzoo.conversions.student import budget_of, build_student, layer_types, student_config, zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.sizes import causal_lm_class, state_bytes

from ..tiny import tiny_teacher

WORDS = "the tide of the north wind carried ships to an old harbour where people sang that it was morning ".split()
OPTIONS = {"feature_map": "prototype", "num_sinks": 2}


def some_rows(count: int = 2, length: int = 32) -> PackedTokens:
    ids = torch.randint(3, 310, (count, length), generator=torch.Generator().manual_seed(0))
    return PackedTokens(ids, torch.zeros_like(ids), "test", TextHashes("test"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    ref = resolve_teacher(str(tiny_teacher("qwen2", tmp_path_factory.mktemp("t"), num_hidden_layers=3)))
    return ref, ref.load()


def student_of(teacher, keep=(1,), **options):
    ref, model = teacher
    recipe = Recipe("test", "hedgehog", [], student_options=OPTIONS | options)
    config = student_config(ref, recipe, layer_types(ref, recipe, list(keep)))
    return recipe, build_student(ref, model, config, "hedgehog", torch.float32, 0).eval()


def test_an_untrained_student_without_features_leaves_what_windows_alone_leave(teacher):
    teacher_model, data = zoo_teacher(*teacher, torch.float32), some_rows()
    _, student = student_of(teacher, feature_widths=[0, 0, 0], window_sizes=[[3, 5], [], [8, 1]])
    ours, alone = measure_trained(teacher_model, student, data, 3), measure_states(teacher_model, data, 2, 3)
    assert ours.windows == (1, 2, 3, 4, 5, 8, 16)
    common = [ours.windows.index(w) for w in alone.windows]
    torch.testing.assert_close(ours.errors[[0, 2]][..., common], alone.errors[[0, 2]], rtol=1e-3, atol=1e-7)
    assert float(ours.errors[1].abs().sum()) == 0


def test_errors_of_a_trained_student_are_those_of_its_layers(teacher):
    """With one query group's outputs left at a time, in the student and in the teacher."""
    teacher_model, data = zoo_teacher(*teacher, torch.float32), some_rows(1)
    _, student = student_of(teacher, feature_widths=[4, 0, 2], window_sizes=[[3, 5], [], [8, 1]])
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    measured = measure_trained(teacher_model, student, data, 3)
    ids = data[0]["input_ids"]
    observed = observe(teacher_model, ids, True, 3)
    ctx = student.model.make_context(1, len(ids), ids.device)
    for i, sizes in ((0, [3, 5]), (2, [8, 1])):
        theirs, ours = teacher_model.model.layers[i].mixer, student.model.layers[i].mixer
        groups = ours.proj.num_heads // 2
        weight = float((observed[i].gradient ** 2).sum(-1).mean())
        for head, window in enumerate(sizes):
            columns = slice(head * groups * 8, (head + 1) * groups * 8)
            with torch.no_grad():
                said = [only(mixer, columns, observed[i].hidden[None], ctx) for mixer in (ours, theirs)]
            error = float(((said[0] - said[1]) ** 2).sum(-1).mean()) * weight
            assert float(measured.errors[i, head, 0, measured.windows.index(window)]) == pytest.approx(error, rel=1e-3)


def only(mixer, columns: slice, hidden: torch.Tensor, ctx) -> torch.Tensor:
    """What a mixer gives through some columns of its output projection."""
    whole = mixer.proj.o_proj.weight.clone()
    mask = torch.zeros_like(whole)
    mask[:, columns] = 1
    mixer.proj.o_proj.weight.mul_(mask)
    said = mixer(hidden, None, ctx)[0]
    mixer.proj.o_proj.weight.copy_(whole)
    return said


def test_the_same_bytes_leave_no_more_error_than_before(teacher):
    teacher_model, data = zoo_teacher(*teacher, torch.float32), some_rows()
    recipe, student = student_of(teacher, feature_widths=[4, 0, 2], window_sizes=[[16, 1], [], [1, 2]])
    measured = measure_trained(teacher_model, student, data, 3)
    config, record = budget_of(teacher[0], recipe, torch.float32).divide_again(student.config, measured)
    assert record["error"] < record["error_before"] and record["tokens_moved"] > 0
    assert config.feature_widths == [4, 0, 2] and config.layer_types == student.config.layer_types
    assert state_bytes(config, torch.float32) == record["state_bytes"] <= state_bytes(student.config, torch.float32)
    again, second = budget_of(teacher[0], recipe, torch.float32).divide_again(config, measured)
    assert second["tokens_moved"] == 0 and second["error"] == pytest.approx(record["error"])
    assert again.window_sizes == config.window_sizes


def recipe_file(tmp_path, **changes):
    stages = [
        {"name": "calibrate", "kind": "calibrate", "feature_widths": [2], "parts": ["windows", "features"]},
        {"name": "distill", "kind": "train", "share": 1.0, "lr": 0.01},
        {"name": "again", "kind": "allocate"},
    ]
    recipe = {"name": "mine", "student": "hedgehog", "student_options": OPTIONS, "calibration_tokens": 128}
    recipe |= {"stages": stages, "tokens": 256, "seq_len": 64, "batch_tokens": 64, "state_budget": 12_000} | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def test_a_conversion_moves_windows_and_keeps_what_it_has_trained(teacher, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    texts = (" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (300,), generator=generator)) for _ in range(40))
    data = tmp_path / "text.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    students = {}

    def finish(self, name, student, report):
        if student is not None:
            students[name] = {key: tensor.clone() for key, tensor in student.state_dict().items()}
        original(self, name, student, report)

    original = Run.finish
    monkeypatch.setattr(Run, "finish", finish)
    folder = str(tmp_path / "tiny")
    teacher[1].save_pretrained(folder)
    teacher[0].tokenizer().save_pretrained(folder)
    calls = dict(data=[str(data)], evaluate=False, dtype="float32")
    results = convert(folder, recipe_file(tmp_path), tmp_path / "out", **calls)
    assert students["distill"].keys() == students["again"].keys()
    assert all(torch.equal(students["distill"][name], tensor) for name, tensor in students["again"].items())
    stages = {stage["name"]: stage for stage in results["conversion"]["stages"]}
    first, second = (stages[name]["allocation"] for name in ("calibrate", "again"))
    assert second["error"] <= second["error_before"]
    assert results["model"]["state_bytes"] == second["state_bytes"] <= first["state_bytes"] <= 12_000
    model = causal_lm_class("hedgehog").from_pretrained(tmp_path / "out")
    assert [list(b.mixer.lengths) for b in model.model.layers] == [e["windows"] for e in second["layers"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_options": {}}, "but feature_map is 'softmax'; student_options must say `prototype`"),
        ({"state_budget": None}, "an allocate stage divides a budget; give the recipe a state_budget"),
        ({"student": "gla"}, "but 'gla' layers have no linear state whose width can be chosen"),
    ],
)
def test_recipes_that_have_nothing_to_move_are_refused(tmp_path, changes, message):
    path = recipe_file(tmp_path, stages=[{"name": "again", "kind": "allocate"}], **changes)
    with pytest.raises(RnnzooError, match=f"stage again: .*{message}"):
        load_recipe(path)
