"""The student's start: exactly the teacher's tensors, each where its paper puts it."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.recipes import Recipe
from rnnzoo.conversions.student import (
    build_student,
    continue_from,
    layer_types,
    student_config,
    zoo_teacher,
)
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.cache import RecurrentCache
from rnnzoo.zoo.core.mixer import Mixer
from rnnzoo.zoo.core.registry import architectures, mixer_class
from rnnzoo.zoo.core.sizes import state_bytes

from .tiny import TINY_FAMILIES, tiny_teacher

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    **{family: (family, {}) for family in TINY_FAMILIES},
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral-sliding": ("mistral", {"sliding_window": 9}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
}
STUDENTS = ("supra", "mamba2", "hedgehog")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Name of a variant -> (reference, model), each made once."""
    made = {}

    def get(variant: str):
        if variant not in made:
            family, changes = VARIANTS[variant]
            ref = resolve_teacher(str(tiny_teacher(family, tmp_path_factory.mktemp("t"), **changes)))
            made[variant] = (ref, ref.load())
        return made[variant]

    return get


def recipe_of(student: str, **options) -> Recipe:
    return Recipe("test", student, [], student_options=options)


def student_of(teacher, mixer: str, keep=(), seed: int = 0, **options):
    ref, model = teacher
    recipe = recipe_of(mixer, **options)
    config = student_config(ref, recipe, layer_types(ref, recipe, list(keep)))
    return build_student(ref, model, config, mixer, torch.float32, seed).eval()


def some_ids(length: int = 40) -> torch.Tensor:
    return torch.randint(3, 310, (2, length), generator=torch.Generator().manual_seed(0))


def same(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
    return x is None and y is None if x is None or y is None else torch.equal(x, y)


def same_attention(proj, weights) -> bool:
    """Is every tensor of the projections the teacher's? A bias that the teacher lacks must be zero or not there."""
    for name in "qkvo":
        layer, bias = getattr(proj, f"{name}_proj"), getattr(weights, f"{name}_bias")
        if not torch.equal(layer.weight, getattr(weights, name)) or not same(layer.bias, bias):
            return False
    norms = [(proj.q_norm, weights.q_norm), (proj.k_norm, weights.k_norm)]
    return all(same(None if ours is None else ours.weight, theirs) for ours, theirs in norms)


@pytest.mark.parametrize("mixer", STUDENTS)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_embeddings_norms_and_mlps_are_the_teachers(teachers, family, mixer):
    teacher = teachers(family)
    student = student_of(teacher, mixer)
    ours = student.state_dict()
    shared = teacher[0].family.shared_tensors(teacher[1])
    assert all(torch.equal(ours[name], tensor) for name, tensor in shared.items())
    others = {name for name in ours if name not in shared and ".mixer." not in name}
    assert others <= {"lm_head.weight"}
    if others:
        assert torch.equal(student.lm_head.weight, student.model.embed_tokens.weight)


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("mixer", ["supra", "hedgehog"])
def test_supra_and_hedgehog_copy_the_attention(teachers, family, mixer):
    ref, model = teachers(family)
    for i, block in enumerate(student_of((ref, model), mixer).model.layers):
        assert same_attention(block.mixer.proj, ref.family.attention_weights(model, i))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_mamba2_starts_as_the_mamba_in_the_llama(teachers, family):
    ref, model = teachers(family)
    student = student_of((ref, model), "mamba2")
    for i, block in enumerate(student.model.layers):
        mixer, weights = block.mixer, ref.family.attention_weights(model, i)
        heads, kv_heads, width = weights.num_heads, weights.num_kv_heads, weights.head_dim
        sizes = [heads * width, kv_heads * width, kv_heads * width, heads * width, heads]
        _, x, b, c, _ = mixer.in_proj.weight.split(sizes)
        assert torch.equal(x, weights.v) and torch.equal(b, weights.k) and torch.equal(c, weights.q)
        assert torch.equal(mixer.out_proj.weight, weights.o)
        if mixer.in_proj.bias is not None:
            _, x, b, c, _ = mixer.in_proj.bias.split(sizes)
            assert torch.equal(x, weights.v_bias) and torch.equal(b, weights.k_bias) and torch.equal(c, weights.q_bias)
        assert same(mixer.out_proj.bias, weights.o_bias)
        if weights.q_norm is not None:
            assert torch.equal(mixer.c_norm.weight, weights.q_norm)
            assert torch.equal(mixer.b_norm.weight, weights.k_norm)
        decay = mixer.A_log.exp()
        assert bool(((decay > 1 - 1e-6) & (decay < 16 + 1e-4)).all()) and decay.std() > 0
        assert bool((mixer.D == 1).all())
        step = torch.nn.functional.softplus(mixer.dt_bias)
        assert bool(((step > 0.99e-3) & (step < 0.101)).all())
        assert mixer.conv1d.weight.std() > 0.1 and mixer.conv1d.weight.abs().max() <= 0.5


@pytest.mark.parametrize("mixer", ["rwkv6", "rwkv7"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rwkv_students_start_as_radlads(teachers, family, mixer):
    """Its formulas for the decays by channel and depth, and zero wherever it has zero."""
    ref, model = teachers(family)
    student = student_of((ref, model), mixer)
    assert student.config.rwkv_rotate and student.config.channel_mixer == "mlp"
    for i, block in enumerate(student.model.layers):
        layer, weights = block.mixer, ref.family.attention_weights(model, i)
        assert same_attention(layer.proj, weights)
        assert layer.norm is None  # the output is multiplied by d^-1/2
        ramp = torch.arange(weights.num_heads * weights.head_dim) / (weights.num_heads * weights.head_dim - 1)
        depth = i / (len(student.model.layers) - 1)
        assert not layer.decay.down.weight.any()
        if mixer == "rwkv6":
            torch.testing.assert_close(layer.decay.up.bias, -6 + 5 * ramp ** (0.7 + 1.3 * depth))
            assert layer.config.rwkv6_balance and layer.gate_act is torch.sigmoid and not layer.gate.weight.any()
            assert not any(x.any() for x in (layer.shift.mix, layer.shift.mix_x, layer.shift.down.weight))
        else:
            torch.testing.assert_close(layer.decay.up.bias, 0.5 - 7 + 5 * ramp ** (0.85 + depth**0.5))
            zeros = (layer.rate.up.bias, layer.rate.down.weight, layer.bonus, layer.mix)
            assert layer.share is None and not any(x.any() for x in zeros)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("mixer", ["liger", "tova"])
def test_students_without_new_parameters_are_the_teachers_attention(teachers, family, mixer):
    ref, model = teachers(family)
    teacher_model = zoo_teacher(ref, model, torch.float32)
    student = student_of((ref, model), mixer)
    assert student.state_dict().keys() == teacher_model.state_dict().keys()
    assert all(torch.equal(tensor, teacher_model.state_dict()[name]) for name, tensor in student.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_phi_mamba_repeats_the_teachers_kv_heads_and_holds_its_scores(teachers, family):
    ref, model = teachers(family)
    for i, block in enumerate(student_of((ref, model), "phi_mamba").model.layers):
        proj, weights = block.mixer.proj, ref.family.attention_weights(model, i).repeated()
        assert torch.equal(proj.k_proj.weight, weights.k) and torch.equal(proj.v_proj.weight, weights.v)
        scale = weights.head_dim**-0.5
        if weights.q_norm is None:
            torch.testing.assert_close(proj.q_proj.weight, weights.q * scale)
        else:
            torch.testing.assert_close(proj.q_norm.weight, weights.q_norm * scale)
        taps = proj.conv1d.weight[:, 0]
        assert bool((taps[:, -1] == 1).all()) and not taps[:, :-1].any() and not proj.conv1d.bias.any()
        gate = torch.nn.functional.silu(block.mixer.gate(torch.randn(5, proj.q_proj.in_features)))
        torch.testing.assert_close(gate, torch.ones_like(gate))


CONVERTIBLE = [
    name for name in architectures() if mixer_class(name).init_from_attention is not Mixer.init_from_attention
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("mixer", CONVERTIBLE)
def test_every_mixer_that_can_be_started_from_attention_makes_a_student(teachers, family, mixer):
    """Of teachers with grouped heads, biases, norms of q and k, partial rotation: it runs and passes gradients on."""
    student = student_of(teachers(family), mixer).train()
    student(some_ids(), labels=some_ids()).loss.backward()
    for i, block in enumerate(student.model.layers):
        gradients = [p.grad for p in block.mixer.parameters() if p.grad is not None]
        assert gradients and all(g.isfinite().all() for g in gradients), i
        assert any(g.abs().sum() > 0 for g in gradients), i


def test_the_seed_fixes_what_is_random(teachers):
    one, two, other = (student_of(teachers("llama"), "mamba2", seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.layers.0.mixer.A_log"], other["model.layers.0.mixer.A_log"])


@pytest.mark.parametrize("mixer", STUDENTS)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_kept_layers_are_the_teachers_attention(teachers, family, mixer):
    ref, model = teachers(family)
    student = student_of((ref, model), mixer, keep=[1])
    assert student.config.layer_types == [mixer, "full_attention"]
    assert same_attention(student.model.layers[1].mixer.proj, ref.family.attention_weights(model, 1))


@pytest.mark.parametrize("mixer", STUDENTS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_student_that_keeps_all_layers_is_the_teacher(teachers, variant, mixer):
    teacher = teachers(variant)
    student = student_of(teacher, mixer, keep=[0, 1])
    torch.testing.assert_close(student(some_ids()).logits, teacher[1](some_ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_teacher_in_the_zoo_block_is_the_teacher(teachers, variant):
    teacher = teachers(variant)
    teacher_model = zoo_teacher(*teacher, torch.float32)
    torch.testing.assert_close(teacher_model(some_ids()).logits, teacher[1](some_ids()).logits, rtol=1e-4, atol=1e-4)
    assert not teacher_model.training and not any(p.requires_grad for p in teacher_model.parameters())
    kept = teacher[0].family.attention_types(teacher[0].config)
    assert teacher_model.config.layer_types == kept == [block.mixer.layer_type for block in teacher_model.model.layers]


@pytest.mark.parametrize("feature_map", ["softmax", "prototype"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "mistral-sliding"])
@torch.no_grad()
def test_hedgehog_with_a_window_over_all_is_the_teacher(teachers, variant, feature_map):
    """Nothing has left the window, so no feature counts; token by token as well as at once."""
    teacher = teachers(variant)
    student = student_of(teacher, "hedgehog", window_size=40, feature_map=feature_map, feature_width=4)
    expected = teacher[1](some_ids()).logits
    torch.testing.assert_close(student(some_ids()).logits, expected, rtol=1e-4, atol=1e-4)
    cache = RecurrentCache(student.config)
    parts = [student(part, cache=cache).logits for part in some_ids()[:1].split([30, 1, 1, 8], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("supra", {}),
        ("mamba2", {}),
        ("hedgehog", {"window_size": 7}),
        ("hedgehog", {"window_sizes": [[3, 20], [1, 9]], "feature_map": "prototype", "feature_width": 5}),
        ("hedgehog", {"feature_width": 0, "num_sinks": 0, "feature_map": "prototype"}),
        ("hedgehog", {"ring_bits": [8, 4]}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_state_bytes_are_those_of_the_cache_at_any_length(teachers, mixer, options, dtype):
    student = student_of(teachers("llama"), mixer, **options).to(dtype)
    said = state_bytes(student.config, dtype)
    cache = RecurrentCache(student.config)
    for length in (10, 1, 89, 400):
        student(some_ids(length)[:1], cache=cache)
        assert cache.num_bytes() == said


@pytest.mark.parametrize("mixer", STUDENTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox"])
@torch.no_grad()
def test_a_later_step_keeps_what_was_trained(teachers, family, mixer):
    teacher = teachers(family)
    before = student_of(teacher, mixer, keep=[1])
    for parameter in before.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    after = student_of(teacher, mixer, seed=3)
    continue_from(after, before)
    old, new = before.state_dict(), after.state_dict()
    common = [name for name in old if not name.startswith("model.layers.1.mixer.")]
    assert len(common) > 8 and all(torch.equal(old[name], new[name]) for name in common)
    trained, fresh = before.model.layers[1].mixer.proj, after.model.layers[1].mixer
    if mixer == "mamba2":
        assert torch.equal(fresh.out_proj.weight, trained.o_proj.weight)
    else:
        assert all(torch.equal(tensor, fresh.proj.state_dict()[n]) for n, tensor in trained.state_dict().items())


def test_options_that_no_layer_knows_or_that_do_not_fit_are_refused(teachers):
    ref, _ = teachers("llama")
    with pytest.raises(RnnzooError, match="'num_sink', which is no setting of a hedgehog student"):
        student_config(ref, recipe_of("hedgehog", num_sink=4), ["hedgehog"] * 2)
    with pytest.raises(RnnzooError, match="student cannot be built"):
        student_config(ref, recipe_of("hedgehog", window_sizes=[[1, 1]]), ["hedgehog"] * 2)
    with pytest.raises(RnnzooError, match="student cannot be built"):
        student_config(ref, recipe_of("hedgehog", window_size="wide"), ["hedgehog"] * 2)


@torch.no_grad()
def test_a_linear_state_of_another_width_starts_anew_and_all_else_goes_on(teachers):
    """Trained projections stay, also where the budget makes a layer attention again."""
    teacher = teachers("llama")
    options = {"feature_map": "prototype", "feature_widths": [4, 4]}
    before = student_of(teacher, "hedgehog", **options)
    for parameter in before.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    after = student_of(teacher, "hedgehog", **options | {"feature_widths": [4, 2], "window_size": 9})
    continue_from(after, before)
    old, new = before.state_dict(), after.state_dict()
    same = [name for name in old if old[name].shape == new[name].shape]
    assert len(old) - len(same) == 3 and all(torch.equal(old[name], new[name]) for name in same)
    kept = student_of(teacher, "hedgehog", keep=[1], **options)
    continue_from(kept, before)
    for name in "qkvo":
        weights = [getattr(model.model.layers[1].mixer.proj, f"{name}_proj").weight for model in (kept, before)]
        assert torch.equal(*weights)
