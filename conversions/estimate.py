"""What a conversion takes on given devices: memory of each, tokens/s, hours; from sizes alone, nothing is measured.

P parameters of the teacher, S of the student, M of these trained in a stage, X of its converted mixers; of S and P the
matrix products count, which the table of embeddings is not. N devices, T tokens of a row, b rows of a micro-batch on a
device (1), B tokens of a step, L layers, D width, I intermediate width, H query and Hk kv heads of width d, V words.

**Work.** FLOP for a token, where a product with a matrix of m entries is 2m:

    forward(model) = 2 * parameters + 2 T H d L_a              L_a layers of attention, causal: half of T x T
    train          = forward(teacher) + 2 forward(student) + 2 M     (+ forward(student) again with checkpointing)
    align          = forward(teacher) + 4 X + 2 M
    calibrate      = 3 forward(teacher)                                                    (allocate as well)

A stage of training whose loss asks nothing of the teacher has no forward(teacher).

**Time of a step** is the longest of four, which overlap, over its micro-batches:

    work      B * FLOP for a token / (N * peak * utilisation)
    reading   bytes of weights that a micro-batch reads / bandwidth:  2 P + 3 * 4 S       (teacher once, student thrice)
    links     a copy on each device: 2 * 4 M (N - 1) / N once a step
              sharded: (2 P + 2 * 2 S + 4 M) (N - 1) / N a micro-batch              (gathered, gathered again, summed)
    bus       with offload, a micro-batch: (2 P + 2 * 4 S + 4 M) / N / 32 GB/s (PCIe 4, 16 lanes)

Utilisation is 40 % of the data sheet's peak on accelerators, as published of large dense models, and 1 on a CPU, whose
figure is what was measured in training. Small models on large devices reach less: their kernels are too short.

**Memory** of a device:

    weights, gradients, AdamW    4 S + 4 M + 8 M, and bfloat16 copies of what is trained, 2 M
    teacher                      2 P
    activations                  b T L (20 D + 6 H d + 8 Hk d + 8 I); with checkpointing b T (4 D L + that of one layer)
    losses                       256 rows of logits at a time: 3 * 4 * 256 V

Sharded (FSDP2) the first two lines are divided by N, and what is gathered at one time comes on top: 2 bytes for each
entry of embeddings, head and two layers of teacher and of student. With offload they lie in the machine's memory.

Of the layouts, in the order of their cost, the first that fits into 90 % of a device is taken: a copy on each device;
with checkpointing; sharded; sharded with checkpointing; that with offload.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..zoo.core.configuration import RecurrentConfig
from ..zoo.core.heads import RecurrentForCausalLM
from ..zoo.core.registry import ATTENTION_TYPES
from .devices import CPU, Device, parse_devices
from .recipes import Recipe
from .stages import Stage
from .stages.parameters import parts_of
from .teachers import TeacherRef

__all__ = ["Sizes", "estimate", "flops_per_token", "memory_bytes"]

USABLE = 0.9  # of a device's memory; the rest is the allocator's and the libraries'
BUS = 32e9  # bytes/s each way between a device and the machine's memory: PCIe 4, 16 lanes
# (name, sharded, checkpointing, offload)
LAYOUTS = (
    ("a copy on each device", False, False, False),
    ("a copy on each device, activation checkpointing", False, True, False),
    ("sharded (FSDP2)", True, False, False),
    ("sharded (FSDP2), activation checkpointing", True, True, False),
    ("sharded (FSDP2), activation checkpointing, CPU offload", True, True, True),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of parameters and the shape, as in the module's docstring.

    Attributes:
        teacher, student: all parameters. table: entries of the embeddings that are no matrix product.
        new, mixers: parameters of the converted mixers that did not come from the teacher, and all of them.
        attention: of the teacher and of the student, layers of attention.
    """

    teacher: int
    student: int
    table: int
    new: int
    mixers: int
    attention: tuple[int, int]
    config: RecurrentConfig

    @staticmethod
    def of(teacher: TeacherRef, config: RecurrentConfig) -> Sizes:
        with torch.device("meta"):
            student = RecurrentForCausalLM(config)
        count = dict.fromkeys(("new", "mixers", "attention", "rest"), 0)
        for name, part in parts_of(student).items():
            count[part] += student.get_parameter(name).numel()
        table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        attention = config.num_hidden_layers, sum(kind in ATTENTION_TYPES for kind in config.layer_types)
        new, mixers = count["new"], count["new"] + count["mixers"]
        return Sizes(teacher.parameters, student.num_parameters(), table, new, mixers, attention, config)

    def trained(self, stage: Stage) -> int:
        """M of a stage."""
        return {"nothing": 0, "all": self.student}.get(
            stage.trainable(), self.new if "new" in stage.trainable() else self.mixers
        )


def flops_per_token(sizes: Sizes, stage: Stage, seq_len: int, checkpointing: bool = False) -> float:
    """FLOP of a stage for one token of its text."""
    config = sizes.config
    across = 2.0 * seq_len * config.num_attention_heads * config.head_dim
    teacher = 2.0 * (sizes.teacher - sizes.table) + across * sizes.attention[0]
    student = 2.0 * (sizes.student - sizes.table) + across * sizes.attention[1]
    cost = stage.cost()
    again = 1.0 if checkpointing and cost.student else 0.0
    passes = cost.teacher * teacher + (cost.student + again) * student + 2.0 * cost.mixers * sizes.mixers
    return passes + 2.0 * cost.gradients * sizes.trained(stage)


def memory_bytes(sizes: Sizes, trained: int, seq_len: int, count: int, layout: tuple[str, bool, bool, bool]) -> float:
    """Bytes of one device in the stage that trains most."""
    _, sharded, checkpointing, offload = layout
    config = sizes.config
    width, layers, words = config.hidden_size, config.num_hidden_layers, config.vocab_size
    heads = 6 * config.num_attention_heads * config.head_dim + 8 * config.num_key_value_heads * config.head_dim
    of_layer = 20 * width + heads + 8 * config.intermediate_size
    kept = 4 * width * layers + of_layer if checkpointing else of_layer * layers
    held = 4.0 * sizes.student + 14.0 * trained + 2.0 * sizes.teacher
    if sharded:
        ends = words * width * (1 if config.tie_word_embeddings else 2)
        one_layer = (sizes.teacher - ends) / layers
        held = (0.0 if offload else held / count) + 2 * 2 * (ends + 2 * one_layer)
    return held + float(seq_len * kept + 3 * 4 * 256 * words)


def _step_seconds(sizes: Sizes, stage: Stage, recipe: Recipe, rows: int, count: int, device: Device, layout) -> dict:
    """Seconds of a step by what they go into."""
    _, sharded, checkpointing, offload = layout
    trained, share = sizes.trained(stage), (count - 1) / count
    micro = rows / count  # micro-batches of a device; fewer than one for cores, which share them
    work = rows * recipe.seq_len * flops_per_token(sizes, stage, recipe.seq_len, checkpointing)
    sent = (2 * sizes.teacher + 4 * sizes.student + 4 * trained) * max(1.0, micro) if sharded else 8 * trained
    moved = (2 * sizes.teacher + 8 * sizes.student + 4 * trained) / count * max(1.0, micro) if offload else 0.0
    return {
        "arithmetic": work / (count * device.flops * device.utilisation),
        "reading weights": 0.0
        if device.name == CPU
        else max(1.0, micro) * (2 * sizes.teacher + 12 * sizes.student) / device.bandwidth,
        "links": sent * share / device.link,
        "bus": moved / BUS,
    }


def estimate(devices: str, teacher: TeacherRef, recipe: Recipe, config: RecurrentConfig) -> dict[str, Any]:
    """Layout, memory of a device, tokens/s and time of a recipe, by the formulas above.

    Args:
        devices: as `parse_devices` takes it. config: the student's.
    Raises:
        RnnzooError: unknown devices.
    """
    count, device = parse_devices(devices)
    sizes = Sizes.of(teacher, config)
    rows = max(1, recipe.batch_tokens // recipe.seq_len)
    cores = device.name == CPU
    if not cores:
        rows = -(-rows // count) * count
    most = max((sizes.trained(stage) for stage in recipe.stages), default=0)
    layouts = [layout for layout in LAYOUTS if not layout[1] or (not cores and (count > 1 or layout[3]))]
    needs = [memory_bytes(sizes, most, recipe.seq_len, count, layout) for layout in layouts]
    fits = [need <= USABLE * device.memory for need in needs]
    best = fits.index(True) if any(fits) else len(layouts) - 1
    layout = layouts[best]
    seconds, tokens, limits = 0.0, 0, {}
    for stage in recipe.stages:
        if not stage.together:
            work = (stage.tokens_read(recipe) or 0) * flops_per_token(sizes, stage, recipe.seq_len)
            seconds += work / (device.flops * device.utilisation * (count if cores else 1))  # by one process
        elif used := int(recipe.tokens * stage.share):
            parts = _step_seconds(sizes, stage, recipe, rows, count, device, layout)
            spent = max(parts.values()) * used / (rows * recipe.seq_len)
            seconds, tokens = seconds + spent, tokens + used
            longest = max(parts, key=lambda name: parts[name])
            limits[longest] = limits.get(longest, 0.0) + spent
    training = sum(limits.values())
    found: dict[str, Any] = {
        "asked_for": f"{count} x {device.name}",
        "layout": "one process on all cores" if cores else layout[0],
        "fits": any(fits),
        "memory_bytes_of_each" if not cores else "memory_bytes": needs[best],
        "batch_tokens": rows * recipe.seq_len,
        "training_tokens_per_second": tokens / training if training else 0.0,
        "time_seconds": seconds,
        "limited_by": max(limits, key=lambda name: limits[name]) if limits else "arithmetic",
        "utilisation_assumed": device.utilisation,
        "figures_from": device.source,
    }
    if layout[3]:
        found["machine_memory_bytes"] = 4 * sizes.student + 14 * most + 2 * sizes.teacher
    if not any(fits):
        found["to_make_it_fit"] = "a shorter --seq-len, or a device with more memory"
    return found
