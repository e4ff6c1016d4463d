"""The gallery: every architecture has a page, its snippet runs, its LoRA names are what PEFT adapts and trains."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rnnzoo.cli.list_command import facts
from rnnzoo.zoo.core.cache import CACHE_NAME
from rnnzoo.zoo.core.configuration import RecurrentConfig
from rnnzoo.zoo.core.registry import architectures, mixer_class
from rnnzoo.zoo.core.sizes import architecture_config

from ..families import often
from .snippets import run, snippets


@pytest.fixture
def zoo():
    from site_pages import zoo

    return zoo


@pytest.mark.parametrize("name", architectures())
def test_page_tells_what_the_registry_knows(name, zoo):
    page = zoo.page(name)
    known = facts(name)
    for said in (f"`{architecture_config(name).model_type}`", known["kernel"], f"`{known['complexity']}`"):
        assert said in page
    assert all(f"`{source}`" in page for source in known["imports"])
    assert all(f"| {size} |" in page for size in architecture_config(name).sizes)
    assert "```text\n" in page, "no equations in the docstring"


@pytest.mark.parametrize("name", often(architectures()))
def test_snippet_of_a_page_runs(name, zoo, capsys):
    (snippet,) = snippets(zoo.page(name), f"zoo/{name}.md")
    assert snippet.body.count("\n") == 5
    run(snippet, {})
    assert re.match(r"tensor\(\[\[ *1, +2, +3(, +\d+){8}]]\)", capsys.readouterr().out)


@pytest.mark.parametrize("name", architectures())
def test_every_field_of_a_configuration_is_explained(name, zoo):
    rows = re.findall(r"^\| (`\w+`[^|]*) \|[^|]*\| (?:-|as in Llama) \|$", zoo.page(name), re.MULTILINE)
    unexplained = {field for row in rows for field in re.findall(r"`(\w+)`", row)}
    assert not unexplained - set(inspect.get_annotations(RecurrentConfig))


def test_gallery_links_every_architecture(zoo):
    assert re.findall(r"^\| \[\w+\]\((\w+)\.md\)", zoo.gallery(), re.MULTILINE) == list(architectures())


@pytest.mark.parametrize("name", architectures())
def test_lora_names_of_the_page_are_adapted_and_trained(name, zoo):
    peft = pytest.importorskip("peft")
    names = zoo.lora_names(name)
    kinds = [kind for kind in names if kind != "mlp"] * 2
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": len(kinds), "sliding_window": 4}
    model = AutoModelForCausalLM.from_config(architecture_config(name)(**sizes, layer_types=kinds))
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}

    targets = sorted({target for group in names.values() for target in group})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    assert set(adapted.targeted_module_names) == linear

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # matrices that start at zero would hide what comes before them
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(32, (2, 12), generator=generator)
    prefix = {"prefix_mask": torch.arange(12).expand(2, -1) < 6} if "prefix_mask" in mixer_class(name).columns else {}
    adapted.train()
    adapted(input_ids=ids, labels=ids, **prefix).loss.backward()
    still = [
        path for path, p in adapted.named_parameters() if "lora_" in path and not (p.grad is not None and p.grad.any())
    ]
    assert not still

    # Decoding has paths of its own; the adapters count there as well.
    adapted.eval()
    with torch.no_grad():
        whole = adapted(input_ids=ids, **prefix).logits
        read = adapted(input_ids=ids[:, :8], use_cache=True, **{key: value[:, :8] for key, value in prefix.items()})
        for column in range(8, 12):
            step = adapted(input_ids=ids[:, column : column + 1], cache=read[CACHE_NAME]).logits
            torch.testing.assert_close(step[:, 0], whole[:, column], atol=1e-4, rtol=1e-4)
