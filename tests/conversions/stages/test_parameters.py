"""Which parameters of a student are the teacher's and which are new is what `init_from_attention` did, nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.stages.align import Align, AlignLayers, aligned_parameters
from rnnzoo.conversions.stages.parameters import decay_names, parts_of
from rnnzoo.conversions.stages.training import train_stage
from rnnzoo.conversions.student import build_student, layer_types, student_config, zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.registry import architectures, mixer_class

from ..tiny import tiny_teacher

STUDENTS = [name for name in architectures() if mixer_class(name).starts_from_attention()]
FAMILIES = ("llama", "qwen2", "qwen3")  # without biases and norms, with biases of q, k and v, with norms of q and k


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    found = {}
    for family in FAMILIES:
        ref = resolve_teacher(str(tiny_teacher(family, tmp_path_factory.mktemp("t"), num_hidden_layers=3)))
        found[family] = ref, ref.load()
    return found


def student_of(teacher, mixer: str, keep: tuple[int, ...] = (), model=None):
    ref, own = teacher
    options = {"window_size": 4, "num_sinks": 0} if mixer == "hedgehog" else {}
    recipe = Recipe("test", mixer, [], student_options=options)
    config = student_config(ref, recipe, layer_types(ref, recipe, list(keep)))
    return build_student(ref, own if model is None else model, config, mixer, torch.float32, 0)


def other_attention(model):
    """The teacher with other weights in its attention layers."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "self_attn" in name:
                parameter.add_(torch.rand_like(parameter) + 0.5)
    return other


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixer", STUDENTS)
def test_what_changes_with_the_teachers_attention_is_what_is_said_to_come_from_it(teachers, family, mixer):
    teacher = teachers[family]
    student, other = student_of(teacher, mixer), student_of(teacher, mixer, model=other_attention(teacher[1]))
    pairs = zip(student.named_parameters(), other.parameters(), strict=True)
    changed = {name for (name, ours), theirs in pairs if not torch.equal(ours, theirs)}
    parts = parts_of(student)
    assert changed == {name for name, part in parts.items() if part == "mixers"}
    assert len(changed) >= 2 * len(student.model.layers)


def test_a_student_that_was_saved_and_loaded_is_told_apart_in_the_same_way(teachers, tmp_path):
    for mixer in ("hawk", "delta_net", "mamba2"):
        student = student_of(teachers["qwen2"], mixer, keep=(0,))
        student.save_pretrained(tmp_path / mixer)
        loaded = type(student).from_pretrained(tmp_path / mixer)
        assert parts_of(loaded) == parts_of(student)


def test_known_cases(teachers):
    """Griffin's projections are the teacher's; convolutions that start as the identity and biases at zero are new."""
    parts = parts_of(student_of(teachers["llama"], "griffin", keep=(1,)))
    assert parts["model.layers.0.mixer.linear_x.weight"] == parts["model.layers.0.mixer.linear_out.weight"] == "mixers"
    assert parts["model.layers.0.mixer.linear_x.bias"] == parts["model.layers.0.mixer.conv_1d.weight"] == "new"
    assert parts["model.layers.1.mixer.proj.q_proj.weight"] == "attention"
    assert parts["model.layers.0.mlp.up_proj.weight"] == parts["model.embed_tokens.weight"] == "rest"
    assert parts_of(student_of(teachers["qwen2"], "griffin"))["model.layers.0.mixer.linear_x.bias"] == "mixers"
    for mixer in ("delta_net", "gated_delta_net", "kda"):
        parts = parts_of(student_of(teachers["llama"], mixer))
        assert parts["model.layers.0.mixer.proj.conv1d.weight"] == "new"
        assert parts["model.layers.0.mixer.proj.q_proj.weight"] == "mixers"
    shared = {name: part for name, part in parts_of(student_of(teachers["llama"], "hgrn2")).items() if "shared" in name}
    assert set(shared.values()) == {"new"}


@pytest.mark.parametrize("mixer", STUDENTS)
def test_align_trains_what_is_new_in_every_student(teachers, tmp_path, mixer):
    teacher, length = teachers["llama"], 12
    student = student_of(teacher, mixer, keep=(1,))
    stage = Align("align", share=1.0, new_lr=1e-2, target="outputs", warmup=0.0, schedule="constant")
    expected = {name for name, part in parts_of(student).items() if part == "new"}
    if not expected:
        with pytest.raises(RnnzooError, match=f"nothing in a '{mixer}' layer is new .* trains: mixers"):
            aligned_parameters(stage, student)
        return
    ids = torch.randint(3, 310, (3, length), generator=torch.Generator().manual_seed(0))
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    train_stage(
        AlignLayers,
        student,
        zoo_teacher(*teacher, torch.float32),
        stage,
        PackedTokens(ids, torch.zeros_like(ids), "test", TextHashes("test")),
        tmp_path,
        trains=aligned_parameters(stage, student),
        batch_tokens=length,
        bf16=False,
        seed=0,
        progress=lambda *_: None,
    )
    moved = {name for name, parameter in student.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved == expected


def test_align_can_leave_the_decays_as_they_are(teachers):
    student = student_of(teachers["llama"], "gated_delta_net", keep=(0,))
    trained = aligned_parameters(Align("align", trains="features"), student)
    new = {
        name.removeprefix("model.layers.1.mixer.") for name in parts_of(student) if "layers.1" in name and trained(name)
    }
    assert new == {"proj.conv1d.weight", "b_proj.weight", "norm.weight", "g_proj.weight"}


@pytest.mark.parametrize("mixer", STUDENTS)
def test_a_decay_that_is_set_is_among_the_parameters_that_are_said_to_decide_it(teachers, mixer):
    student = student_of(teachers["llama"], mixer)
    decays, own = decay_names(student), student.model.layers[1].mixer
    assert all(parts_of(student)[name] == "new" for name in decays)
    names = [name for name, _ in own.named_parameters()]
    assert all(any(name.startswith(start) for name in names) for start in own.decay_parameters)
    if own.has_decay():
        before = {name: parameter.clone() for name, parameter in own.named_parameters()}
        own.set_decay(torch.full((6,), -0.05))
        moved = {name for name, parameter in own.named_parameters() if not torch.equal(before[name], parameter)}
        assert moved and {f"model.layers.1.mixer.{name}" for name in moved} <= decays
