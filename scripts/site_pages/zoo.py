"""The gallery of architectures: one page each, an index, and the names that LoRA needs. Nothing is listed by hand."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Sequence

import torch
import transformers
from torch import nn

from rnnzoo.cli.list_command import WIDTH, facts, published_sizes, size_cells, state_words
from rnnzoo.cli.quantities import format_bytes
from rnnzoo.zoo.core.configuration import RecurrentConfig
from rnnzoo.zoo.core.model import RecurrentBlock
from rnnzoo.zoo.core.registry import architectures, mixer_class
from rnnzoo.zoo.core.sizes import architecture_config, causal_lm_class

from .kernels import folders as kernel_folders
from .text import Entry, arguments, escape, first_sentence, prose, table

__all__ = ["gallery", "lora_names", "lora_table", "page", "shared_fields", "title"]

known_facts = functools.cache(facts)


def page(name: str) -> str:
    """The Markdown page of one architecture."""
    parts = [
        "---\nhide: [toc]\n---",
        f"# {title(name)}",
        f"`{architecture_config(name).model_type}`",
        _linked(prose(_docstring(name))),
        "## At a glance",
        _glance(name),
        "## Use",
        _use(name),
    ]
    if sizes := _sizes(name):
        parts += ["## Published sizes", sizes]
    parts += ["## Configuration", _configuration(name), "## LoRA target modules", _lora(name)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def gallery() -> str:
    """The table of all architectures, with links to their pages."""
    rows = []
    for name in architectures():
        known = known_facts(name)
        rows.append(
            [
                f"[{name}]({name}.md)",
                _linked(escape(first_sentence(_docstring(name)))),
                state_words(known),
                known["complexity"],
                _kernel_link(known["kernel"]),
                "yes" if known["from_attention"] else "-",
                ", ".join(known["imports"]) or "-",
            ]
        )
    head = ["architecture", "what it is", "state", "time / memory", "kernel", "from attention", "imports"]
    return table(head, rows, "llrlll")


def title(name: str) -> str:
    """As its configuration class writes it: `gated_delta_net` is GatedDeltaNet."""
    return architecture_config(name).__name__.removesuffix("Config")


def _docstring(name: str) -> str:
    return sys.modules[causal_lm_class(name).__module__].__doc__ or ""


def _linked(markdown: str) -> str:
    """Files of other architectures become links to their pages."""
    return re.sub(r"`zoo/(\w+)/\w+\.py`", lambda file: f"[{file[1]}]({file[1]}.md)", markdown)


def _kernel_link(kernel: str) -> str:
    # Attention is PyTorch's own function and has no section on the page of kernels.
    return f"[{kernel}](../kernels.md#{kernel})" if kernel in kernel_folders() else f"`{kernel}`"


def _glance(name: str) -> str:
    known = known_facts(name)
    grows = not known["complexity"].endswith("/ 1")
    formats = ", ".join(f"`{name}`" for name in known["imports"])
    rows = [
        ["source", escape(known["paper"])],
        ["kernel", _kernel_link(known["kernel"])],
        ["time of a forward pass over T tokens / memory of a layer while decoding", f"`{known['complexity']}`"],
        [
            f"state of one layer for one sequence (hidden_size {WIDTH}, bfloat16)",
            "grows with the text" if grows else f"{format_bytes(known['state_bytes'])} ({known['state_bytes']:,} B)",
        ],
        ["started from attention by `rnnzoo convert`", "yes" if known["from_attention"] else "no"],
        ["imported from and exported to", formats or "-"],
    ]
    return table(["", ""], rows)


def _use(name: str) -> str:
    model_type = architecture_config(name).model_type
    return f'''```python
import rnnzoo, torch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("{model_type}", vocab_size=256, hidden_size=64, num_hidden_layers=2)
model = AutoModelForCausalLM.from_config(config)
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False))
```

{_words(name)}'''


def _words(name: str) -> str:
    size = next((f" --size {size}" for size in architecture_config(name).sizes), "")
    said = [f"`rnnzoo train --arch {name}{size} --data TEXT --out DIR` trains it."]
    if known_facts(name)["imports"]:
        said.append(
            f"`rnnzoo import CHECKPOINT --as {name} --out DIR` takes in a checkpoint of another implementation."
        )
    if known_facts(name)["from_attention"]:
        said.append(f"As `student: {name}` in a recipe it takes the place of a Transformer's attention.")
    return " ".join(said)


def _sizes(name: str) -> str:
    rows = [[size, *size_cells(entry)] for size, entry in published_sizes(name).items()]
    head = ["size", "layers", "width", "vocabulary", "parameters", "state of a sequence, bfloat16"]
    return table(head, rows, "lrrrrr") if rows else ""


def _core_fields() -> dict[str, dataclasses.Field]:
    """`RecurrentConfig`'s own, without those of transformers' base class."""
    own = inspect.get_annotations(RecurrentConfig)
    return {field.name: field for field in dataclasses.fields(RecurrentConfig) if field.name in own}


def own_fields(name: str) -> list[str]:
    """The fields that an architecture adds to `RecurrentConfig`, and those whose defaults it changes."""
    core = {field.name: repr(field.default) for field in dataclasses.fields(RecurrentConfig)}
    fields = dataclasses.fields(architecture_config(name))
    return [field.name for field in fields if repr(field.default) != core.get(field.name)]


def _entries(cls: type, names: list[str]) -> list[Entry]:
    """What the docstrings of a class and its bases say of some fields, each once; the nearest class wins."""
    everything = [field.name for field in dataclasses.fields(cls)]
    found: list[Entry] = []
    left = set(names)
    for base in cls.__mro__:
        for entry in arguments(base.__dict__.get("__doc__") or "", everything):
            if left & set(entry.names):
                found.append(entry)
                left -= set(entry.names)
    return found


def _field_table(cls: type, names: list[str]) -> str:
    defaults = {field.name: f"`{field.default!r}`" for field in dataclasses.fields(cls)}
    entries = _entries(cls, names)
    said = {name for entry in entries for name in entry.names}
    llama = transformers.LlamaConfig()
    entries += [Entry((n,), "as in Llama" if hasattr(llama, n) else "-") for n in names if n not in said]
    entries.sort(key=lambda entry: min(names.index(n) for n in entry.names if n in names))
    rows = [
        ["<br>".join(f"`{n}`" for n in entry.names), "<br>".join(defaults[n] for n in entry.names), _said(entry)]
        for entry in entries
    ]
    return table(["field", "default", "meaning"], rows)


def _said(entry: Entry) -> str:
    """The explanation, with the names that it goes on to explain as code."""
    return escape(re.sub(rf"\b({'|'.join(entry.names)}): ", r"`\1`: ", entry.text))


def _configuration(name: str) -> str:
    cls = architecture_config(name)
    names = own_fields(name)
    words = prose(inspect.cleandoc(cls.__doc__ or "").split("\nArgs:")[0])
    listed = _field_table(cls, names) if names else "It adds no fields.\n"
    return f"{words}\n{listed}\nThe other fields are those of [`RecurrentConfig`](index.md#fields-that-all-share)."


def shared_fields() -> str:
    """The table of `RecurrentConfig`'s own fields."""
    return _field_table(RecurrentConfig, list(_core_fields()))


def layer_kinds(name: str) -> list[str]:
    """Layer types of an architecture: of its default, and of its published sizes."""
    cls = architecture_config(name)
    configs = [cls(vocab_size=8, hidden_size=48, num_hidden_layers=4)]
    configs += [cls(**size) for size in cls.sizes.values()]
    return list(dict.fromkeys(kind for config in configs for kind in config.layer_types or ()))


@functools.cache
def lora_names(name: str) -> dict[str, tuple[str, ...]]:
    """Names of the nn.Linear modules, by layer type and, under "mlp", of the channel mixer; what PEFT can adapt.

    Names are the last parts of the modules' names, enough of them to tell a mixer's from an MLP's.
    """
    cls = architecture_config(name)
    found: dict[str, tuple[str, ...]] = {}
    for kind in layer_kinds(name):
        # Two layers: some hold what the first has no use for (RWKV-7's share of the first layer's values).
        config = cls(vocab_size=8, hidden_size=48, num_hidden_layers=2, layer_types=[kind] * 2, sliding_window=4)
        with torch.device("meta"):
            blocks = [RecurrentBlock(config, layer) for layer in range(2)]
        found[kind] = _linear_layers([block.mixer for block in blocks], "mixer")
        if blocks[0].mlp is not None:
            found["mlp"] = _linear_layers([block.mlp for block in blocks], "mlp")
    return found


def _linear_layers(modules: Sequence[nn.Module | None], prefix: str) -> tuple[str, ...]:
    named = [pair for module in modules if module is not None for pair in module.named_modules()]
    return tuple(dict.fromkeys(f"{prefix}.{path}" for path, child in named if isinstance(child, nn.Linear)))


def _lora(name: str) -> str:
    rows = [[f"`{kind}`", _code(names)] for kind, names in lora_names(name).items()]
    return (
        table(["layer", "target_modules"], rows)
        + '\nGive them to `peft.LoraConfig(target_modules=[...])`; `"all-linear"` takes them all.'
    )


def _code(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names) or "none"


def lora_table() -> str:
    """The names of every architecture's own layers, for the page on fine-tuning."""
    kinds: dict[str, tuple[str, ...]] = {}
    for name in architectures():
        for kind, names in lora_names(name).items():
            kinds.setdefault(f"{kind} ({_mlp_owner(name)})" if kind == "mlp" else kind, names)
    kinds = {kind: kinds[kind] for kind in sorted(kinds, key=lambda kind: (kind.startswith("mlp"), kind))}
    return table(["layer", "target_modules"], [[f"`{kind}`", _code(names)] for kind, names in kinds.items()])


def _mlp_owner(name: str) -> str:
    config = architecture_config(name)(vocab_size=8, hidden_size=48, num_hidden_layers=1)
    return config.mlp_type if config.channel_mixer == "mlp" else config.channel_mixer


def from_attention() -> str:
    """The architectures that a conversion can start from attention, as links."""
    able = [name for name in architectures() if mixer_class(name).starts_from_attention()]
    return ", ".join(f"[{name}](zoo/{name}.md)" for name in able) + "\n"
