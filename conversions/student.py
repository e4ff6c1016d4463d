"""The student: a model of the teacher's shape, its mixers chosen layer by layer, and its start from the teacher."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..kernels.errors import RnnzooError
from ..zoo.core.mixer import AttentionWeights, Mixer
from ..zoo.core.registry import config_class, mixer_class
from ..zoo.core.sizes import causal_lm_class
from .fit.budget import StateBudget
from .recipes import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..zoo.core.configuration import RecurrentConfig
    from ..zoo.core.heads import RecurrentForCausalLM
    from .teachers import TeacherRef

__all__ = [
    "budget_of",
    "build_student",
    "continue_from",
    "layer_types",
    "new_mixer",
    "student_config",
    "teacher_zoo_config",
    "zoo_teacher",
]


def layer_types(teacher: TeacherRef, recipe: Recipe, keep: list[int]) -> list[str]:
    """The mixer of each layer: the teacher's own attention where kept, the recipe's student elsewhere."""
    own = teacher.family.attention_types(teacher.config)
    return [own[i] if i in keep else recipe.student for i in range(len(own))]


def student_config(teacher: TeacherRef, recipe: Recipe, types: list[str], **options: Any) -> RecurrentConfig:
    """A configuration of the recipe's architecture, of the teacher's sizes.

    Raises:
        RnnzooError: options that do not fit the architecture.
    """
    from ..zoo.core.configuration import RecurrentConfig

    cls = config_class(recipe.student) or RecurrentConfig
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(recipe.student_options) - known, key=str):
        raise RnnzooError(f"student_options has {unknown[0]!r}, which is no setting of a {recipe.student} student.")
    fields = teacher.family.student_config(teacher.config)
    sizes = cls.student_fields(fields["num_attention_heads"], fields["num_key_value_heads"], fields["head_dim"])
    try:
        config = cls(**(fields | sizes | recipe.student_options | options), layer_types=types)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RnnzooError(f"The recipe's student cannot be built: {' '.join(str(error).split())}") from error
    config.architectures = [causal_lm_class(recipe.student).__name__]
    return config


def budget_of(
    teacher: TeacherRef, recipe: Recipe, dtype: torch.dtype, widths: Sequence[int] = (), context: int = 0
) -> StateBudget:
    """The recipe's state budget, and what may be bought with it; see `StateBudget`."""
    make = functools.partial(student_config, teacher, recipe)
    own = teacher.family.attention_types(teacher.config)
    return StateBudget(make, own, recipe.state_budget or 0, dtype, widths, context)


def build_student(
    teacher: TeacherRef, model: PreTrainedModel, config: RecurrentConfig, mixer: str, dtype: torch.dtype, seed: int
) -> RecurrentForCausalLM:
    """A model with the teacher's embeddings, norms and MLPs, and mixers started from its attention (`new_mixer`)."""
    torch.manual_seed(seed)
    student = causal_lm_class(mixer)(config)
    shared = teacher.family.shared_tensors(model)
    missing, unexpected = student.load_state_dict({k: v.float() for k, v in shared.items()}, strict=False)
    own = re.compile(r"\.mixer\.|^model\.shared\.|^lm_head\.weight$")
    stray = [name for name in missing if not own.search(name)]
    if unexpected or stray:
        raise RnnzooError(f"The teacher's tensors do not fit the student: {sorted([*unexpected, *stray])[:3]}.")
    for i, layer in enumerate(student.model.layers):
        layer.mixer = new_mixer(student, i, teacher.family.attention_weights(model, i), seed)
    student.tie_weights()
    return student.to(dtype)


def new_mixer(student: RecurrentForCausalLM, number: int, weights: AttentionWeights, seed: int) -> Mixer:
    """The mixer of a layer in float32, started from a teacher's attention; what is drawn depends on no other layer.

    Args:
        student: of any device; its class says how parts are initialised.
    """
    torch.manual_seed(seed + number)
    mixer = mixer_class(student.config.layer_types[number])(student.config, number)
    mixer.apply(student._init_weights)
    tensors = {name: x.float() for name, x in vars(weights).items() if isinstance(x, torch.Tensor)}
    mixer.init_from_attention(dataclasses.replace(weights, **tensors))
    return mixer


def zoo_teacher(teacher: TeacherRef, model: PreTrainedModel, dtype: torch.dtype) -> RecurrentForCausalLM:
    """The teacher itself in the zoo's block, every layer attention: one shape for all families, the same logits."""
    teacher_model = build_student(teacher, model, teacher_zoo_config(teacher), "full_attention", dtype, 0)
    return teacher_model.eval().requires_grad_(False)


def teacher_zoo_config(teacher: TeacherRef) -> RecurrentConfig:
    """Of `zoo_teacher`."""
    recipe = Recipe(name="teacher", student="full_attention", stages=[])
    return student_config(teacher, recipe, teacher.family.attention_types(teacher.config))


@torch.no_grad()
def continue_from(student: RecurrentForCausalLM, previous: RecurrentForCausalLM) -> None:
    """Takes over what an earlier step trained; layers converted only now start from its attention, and vice versa."""
    trained = previous.state_dict()
    for i, (new, old) in enumerate(zip(student.model.layers, previous.model.layers, strict=True)):
        if type(new.mixer) is type(old.mixer):
            continue
        trained = {name: tensor for name, tensor in trained.items() if not name.startswith(f"model.layers.{i}.mixer.")}
        proj = old.mixer.proj
        weights = {name: getattr(proj, f"{name}_proj").weight for name in "qkvo"}
        weights |= {f"{name}_bias": getattr(proj, f"{name}_proj").bias for name in "qkvo"}
        for name in ("q_norm", "k_norm"):
            norm = getattr(proj, name)
            weights[name] = None if norm is None else norm.weight
        sizes = dict(num_heads=proj.num_heads, num_kv_heads=proj.num_kv_heads, head_dim=proj.head_dim)
        new.mixer.init_from_attention(AttentionWeights(**weights, **sizes))
    # A linear state of another width starts anew.
    ours = student.state_dict()
    trained = {name: tensor for name, tensor in trained.items() if ours[name].shape == tensor.shape}
    student.load_state_dict(trained, strict=False)
    student.tie_weights()
