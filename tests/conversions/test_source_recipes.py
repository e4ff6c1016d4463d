"""The recipes of others: numbers, starts, losses and what moves in which stage are those of their sources."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.plan import make_plan
from rnnzoo.conversions.recipes import keep_steps
from rnnzoo.conversions.recipes.keep import stage_steps, stage_tokens
from rnnzoo.conversions.recipes.load import load_recipe
from rnnzoo.conversions.recipes.prepare import prepare_recipe
from rnnzoo.conversions.stages import KINDS
from rnnzoo.conversions.student import build_student, layer_types, student_config
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError

from ..end_to_end.conftest import write_documents
from .tiny import tiny_teacher

LAYERS = 4
PROJECTIONS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
NUMBERS = {
    "supra": [{"trains": "all", "ce": 1.0, "kl": 0.0, "z_loss": 1e-4, "lr": 3e-5, "new_lr": 3e-5}],
    "mamba-in-llama": [
        {"trains": "converted", "kl": 0.1 * 2048, "ce": 1.0, "labels": "teacher", "lr": 8e-5, "new_lr": 8e-5}
        | {"beta1": 0.9, "beta2": 0.98, "schedule": "cosine", "max_grad_norm": 0.1},
        {"trains": "all", "kl": 0.0, "ce": 1.0, "labels": "text", "lr": 2e-5, "new_lr": 2e-5, "schedule": "cosine"},
    ],
    "lolcats": [
        {"target": "heads", "loss": "mse", "inputs": "teacher", "new_lr": 1e-2, "trains": "features"},
        {"trains": "lora", "lora_rank": 8, "lora_alpha": 16, "ce": 1.0, "kl": 0.0, "lr": 1e-4}
        | {"lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ],
    "mohawk": [
        {"target": "matrices", "loss": "norm", "inputs": "teacher", "share": 0.027},
        {"target": "outputs", "loss": "norm", "inputs": "teacher", "share": 0.053},
        {"kl": 1.0, "ce": 0.0, "share": 0.92, "trains": "all"},
    ],
    "radlads": [
        {"target": "outputs", "loss": "norm", "trains": "mixers", "lr": 1e-3, "min_lr": 1e-5, "schedule": "cosine"},
        {"trains": "all", "kl": 1.0, "ce": 0.0, "lr": 1e-5, "schedule": "constant"},
        {"trains": "all", "kl": 0.0, "ce": 1.0},
    ],
}
NUMBERS["liger"] = [
    {"trains": "lora", "lora_rank": 8, "lora_alpha": 8, "lora_targets": ["q_proj", "k_proj", "v_proj"], "lr": 1e-3}
    | {"ce": 1.0, "kl": 0.0, "warmup": 0.0, "weight_decay": 0.01},
]
NUMBERS["mamba-in-llama-stepwise"] = NUMBERS["mamba-in-llama"]
LENGTHS = {"supra": 2048, "mamba-in-llama": 2048, "lolcats": 1024, "mohawk": 2048, "radlads": 512, "liger": 1024}


def mixer_parts(*parts: str):
    return lambda name, converted: any(f"layers.{i}.mixer." in name for i in converted) and name.endswith(parts)


def mixers(name, converted):
    return any(f"layers.{i}.mixer." in name for i in converted)


def everything(name, converted):
    return True


MOVES = {
    "supra": {"uptrain": everything},
    "mamba-in-llama": {"distill": mixers, "finetune": everything},
    "mamba-in-llama-stepwise": {"distill": mixers, "finetune": everything},
    "lolcats": {
        "transfer": mixer_parts("query_map", "key_map", "log_factor"),
        "lora": mixer_parts(*PROJECTIONS),
    },
    "liger": {"lora": mixer_parts(*PROJECTIONS[:3])},
    "mohawk": {
        "matrices": mixer_parts("q_proj.weight", "k_proj.weight", "conv1d.weight", "conv1d.bias", "decay.weight", ".D"),
        "outputs": mixers,
        "logits": everything,
    },
    "radlads": {"align": mixers, "distill": everything, "lengthen": everything},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    changes = {"num_hidden_layers": LAYERS, "max_position_embeddings": 2048}
    return str(tiny_teacher("llama", tmp_path_factory.mktemp("t"), **changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return [str(write_documents(tmp_path_factory.mktemp("data") / "text.jsonl", 400))]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_the_sources(name):
    recipe = load_recipe(name)
    for stage, wanted in zip(recipe.stages, NUMBERS[name], strict=True):
        assert {key: getattr(stage, key) for key in wanted} == wanted
    assert sum(stage.share for stage in recipe.stages) == pytest.approx(1)
    assert recipe.seq_len == LENGTHS.get(name, 2048)


@pytest.mark.parametrize("name", MOVES)
def test_every_stage_moves_what_its_source_trains_and_nothing_else(teacher, data, tmp_path, monkeypatch, name):
    """From end to end, on a tiny teacher."""
    seen = []

    def watched(run, stage, context, student, part):
        before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
        student, report = run(stage, context, student, part)
        after = student.state_dict()
        assert after.keys() == before.keys()
        moved = {key for key in after if not torch.equal(after[key], before[key])}
        types = student.config.layer_types
        seen.append((stage, moved, set(after), [i for i, kind in enumerate(types) if kind == context.recipe.student]))
        assert torch.isfinite(torch.tensor([report["loss_first"], report["loss_last"]])).all()
        return student, report

    for kind in KINDS.values():
        monkeypatch.setattr(kind, "run", functools.partialmethod(functools.partial(watched, kind.run)))
    tokens = 8192 if name == "mohawk" else 2048  # of which mohawk's first stage has 2.7 %
    options = {"tokens": tokens, "seq_len": 128, "batch_tokens": 256, "dtype": "float32", "evaluate": False}
    results = convert(teacher, name, tmp_path / "out", data=data, keep="1/2", **options)
    assert {stage.name for stage, *_ in seen} == set(MOVES[name])
    for stage, moved, names, converted in seen:
        wanted = {key for key in names if MOVES[name][stage.name](key, converted)}
        # Parameters at which the function is flat stay; of those that move, none may lie elsewhere.
        assert moved <= wanted, (stage.name, sorted(moved - wanted)[:3])
        assert len(moved) > 0.8 * len(wanted), (stage.name, sorted(wanted - moved))
    assert results["model"]["layer_types"].count("full_attention") == LAYERS // 2


@pytest.mark.parametrize("name", MOVES)
def test_plans_name_the_stages_and_their_tokens(teacher, name):
    plan = make_plan(teacher, name, tokens=100_000).to_dict()
    recipe = load_recipe(name)
    assert [stage["tokens"] for stage in plan["stages"]] == [int(100_000 * stage.share) for stage in recipe.stages]


def test_lolcats_starts_from_identity_features_and_a_tenth_of_a_window(teacher, data, tmp_path):
    """Window 64, no sinks, no decay: exp(q k) * 0.1 in the window, [softmax(x), softmax(-x)] products behind it."""
    ref = resolve_teacher(teacher)
    recipe = prepare_recipe("lolcats", ref)
    config = student_config(ref, recipe, layer_types(ref, recipe, []))
    student = build_student(ref, ref.load(), config, "hedgehog", torch.float32, 0)
    mixer = student.model.layers[1].mixer
    assert mixer.lengths == (64, 64) and mixer.sinks == 0
    hidden = torch.randn(1, 100, 48, generator=torch.Generator().manual_seed(0))
    ctx = student.model.make_context(1, 100, hidden.device)
    found = mixer.mixing_matrix(hidden, ctx)[0]
    q, k, _ = mixer.proj.split(hidden)
    q, k = (ctx.rotary.rotate(x, ctx.positions)[0].transpose(0, 1) for x in (q, k))
    k = k.repeat_interleave(3, 0)
    distance = torch.arange(100)[:, None] - torch.arange(100)
    near, far = (distance >= 0) & (distance < 64), distance >= 64
    scores = (q @ k.mT * 8**-0.5).masked_fill(~near, -torch.inf)
    window = 0.1 * (scores - scores.amax(-1, keepdim=True)).exp()
    q, k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (q, k))
    weights = window + (q @ k.mT) * far
    torch.testing.assert_close(found, weights / weights.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_mamba_in_llama_aligns_up_to_half_and_finetunes_from_there():
    """25, 50, 75, 87.5 and 100 % of 32 layers: mixers in the first two, all parameters from the second on."""
    recipe = dataclasses.replace(load_recipe("mamba-in-llama"), keep="none", tokens=1000)
    distill, finetune = recipe.stages
    assert len(keep_steps(recipe, 32)) == 5
    assert stage_steps(recipe, distill, 32) == [True, True, False, False, False]
    assert stage_steps(recipe, finetune, 32) == [False, True, True, True, True]
    assert stage_tokens(recipe, distill, 32) == [250, 250, 0, 0, 0]
    assert stage_tokens(recipe, finetune, 32) == [0, 125, 125, 125, 125]


def test_stepwise_converts_one_layer_more_at_each_step_even_ones_first():
    recipe = dataclasses.replace(load_recipe("mamba-in-llama-stepwise"), keep="none", tokens=600)
    steps = keep_steps(recipe, 6)
    assert steps == ["1,2,3,4,5", "1,3,4,5", "1,3,5", "3,5", "5", "none"]
    assert stage_tokens(recipe, recipe.stages[0], 6) == [50] * 6
    assert stage_tokens(recipe, recipe.stages[1], 6) == [0] * 5 + [300]


@pytest.mark.parametrize(("name", "student"), [("radlads", "rwkv6"), ("mamba-in-llama", "mamba"), ("supra", "retnet")])
def test_other_students_by_name(teacher, data, tmp_path, name, student):
    options = {"tokens": 1024, "seq_len": 64, "dtype": "float32", "evaluate": False, "keep": "1/2"}
    results = convert(teacher, name, tmp_path / "out", data=data, student=student, **options)
    assert results["model"]["layer_types"].count(student) == LAYERS // 2


def test_a_student_that_cannot_be_aligned_so_is_refused_before_anything_is_written(teacher, data, tmp_path):
    with pytest.raises(RnnzooError, match="stage matrices: target: matrices needs layers with a mixing matrix"):
        convert(teacher, "mohawk", tmp_path / "out", data=data, student="mamba")
    recipe = tmp_path / "mine.yaml"
    stages = "[{name: a, kind: align, target: heads, share: 1}]"
    recipe.write_text(f"student: mamba2\nstudent_options: {{ssm_head_dim: 16}}\nstages: {stages}")
    with pytest.raises(RnnzooError, match="heads are as wide as the teacher's, 48 .*'mamba2' layers have heads of 96"):
        convert(teacher, str(recipe), tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()
