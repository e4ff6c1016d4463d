"""`rnnzoo card` writes a card for any folder: trained, imported, fine-tuned elsewhere, an adapter."""

from __future__ import annotations

import json
import struct

import pytest

from rnnzoo import cli
from rnnzoo.cards import render_card, validate_card
from rnnzoo.cards.describe import describe, said_by_publisher
from rnnzoo.cards.handwritten import BEGIN
from rnnzoo.kernels.errors import RnnzooError

from .invented import head, invented, section, write


def safetensors(path, **tensors):
    """A file of this format with zeros, from {name: (dtype, shape)}."""
    header, place = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"BF16": 2, "F32": 4}[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(place))


@pytest.fixture
def model(tmp_path):
    """A tiny Mamba as save_pretrained leaves it, without results.json."""
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    config = {
        "model_type": "rnnzoo-mamba", "architectures": ["MambaForCausalLM"], "dtype": "bfloat16", "hidden_size": 32,
        "vocab_size": 320, "num_hidden_layers": 3, "layer_types": ["mamba", "full_attention", "mamba"],
        "num_attention_heads": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    safetensors(folder / "model.safetensors", a=("BF16", [10, 100]), b=("F32", [7]))
    return folder


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "tiny-adapter"
    folder.mkdir()
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "someone/Base", "r": 8, "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors(folder / "adapter_model.safetensors", a=("F32", [8, 16]), b=("F32", [16, 8]))
    return folder


def test_a_model_without_results_gets_a_short_honest_card(model, capsys):
    assert cli._run(["card", str(model)]) == 0
    assert capsys.readouterr().out == f"{model / 'README.md'}\n"
    text = (model / "README.md").read_text()
    assert validate_card(text, model) == [] and "(kind: model)" in text and len(text.splitlines()) < 120
    about = section(text, "What it is")
    assert "`mamba`" in about and "| parameters | 1,007 |" in about and "| dtype | bfloat16 |" in about
    assert "How it was made was not recorded here." in about
    assert "128 bytes for each token of context" in about  # one attention layer: 2 * 32 numbers of 2 bytes
    assert "hybrid" in head(text)["tags"] and "base_model" not in head(text)
    assert "not measured" in section(text, "Quality") and "## Decoding speed" not in text
    assert not (model / "results.json").exists()


def test_the_bytes_of_state_are_those_of_the_model_itself(model):
    import torch

    from rnnzoo.cli.facts import model_facts
    from rnnzoo.zoo.core.cache import CACHE_NAME
    from rnnzoo.zoo.mamba.configuration_mamba import MambaConfig
    from rnnzoo.zoo.mamba.modeling_mamba import MambaForCausalLM

    facts = model_facts(model)
    real = MambaForCausalLM(MambaConfig.from_pretrained(model)).bfloat16().eval()
    sizes = [real(torch.ones(1, n, dtype=torch.long), use_cache=True)[CACHE_NAME].num_bytes() for n in (64, 128)]
    assert facts["state_bytes_per_token"] == (sizes[1] - sizes[0]) // 64
    assert facts["state_bytes"] == sizes[0] - 64 * facts["state_bytes_per_token"] == sum(facts["layer_state_bytes"])


def test_an_imported_model_names_its_source_and_how_to_import_it_again(model):
    origin = {
        "source": "someone/mamba-tiny", "kind": "hub", "format": "transformers", "sha": "f00d",
        "licence": "cc-by-nd-4.0",
    }  # fmt: skip
    results = {"schema": 1, "created": "2001-02-03", "rnnzoo_version": "0.1.0", "import": origin}
    text = render_card(write(model, results)).read_text()
    assert head(text)["base_model"] == "someone/mamba-tiny" and head(text)["license"] == "cc-by-nd-4.0"
    assert "nothing was trained" in text and "| source revision | f00d |" in text
    command = "rnnzoo import someone/mamba-tiny --as mamba --format transformers --revision f00d --out tiny-model"
    assert command in section(text, "Reproduce") and "forbids publishing" in section(text, "Licence")


def test_import_writes_where_the_weights_come_from_and_a_card(tmp_path):
    import transformers

    source = tmp_path / "theirs"
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    out = tmp_path / "ours"
    assert cli._run(["import", str(source), "--as", "mamba", "--out", str(out), "--quiet"]) == 0
    origin = json.loads((out / "results.json").read_text())["import"]
    assert {key: origin[key] for key in ("source", "kind", "format", "licence")} == {
        "source": "theirs", "kind": "folder", "format": "transformers", "licence": "mit",
    }  # fmt: skip
    text = (out / "README.md").read_text()
    assert origin["sha"] in text and str(tmp_path) not in text and head(text)["license"] == "mit"
    before = (out / "README.md").read_bytes()
    assert cli._run(["card", str(out), "--quiet"]) == 0 and (out / "README.md").read_bytes() == before


def test_an_adapter_gets_a_card_that_names_its_base(adapter):
    text = render_card(adapter).read_text()
    data = head(text)
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (
        "someone/Base",
        "adapter",
        "peft",
    )
    assert "lora" in data["tags"] and "| parameters of the adapter | 256 |" in text and "k_proj, q_proj" in text
    assert 'PeftModel.from_pretrained(base, ".")' in text


def test_an_adapter_of_a_local_base_leaks_no_path(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/srv/me/my-base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    text = render_card(adapter).read_text()
    assert "/srv" not in text and "my-base" in text and "base_model" not in head(text)


def test_pefts_own_template_is_replaced_only_when_asked(adapter, capsys):
    (adapter / "README.md").write_text("# Model Card for Model ID\n")
    assert cli._run(["card", str(adapter)]) == 1
    assert "--replace" in capsys.readouterr().err
    assert cli._run(["card", str(adapter), "--replace"]) == 0 and "LORA" in (adapter / "README.md").read_text()


def test_what_the_publisher_says_is_kept_for_the_next_card(model, capsys):
    address = "https://huggingface.co/collections/someone/recurrent-1a2b"
    said = ["--licence", "mit", "--language", "de", "--dataset", "someone/prose", "--collection", address]
    assert cli._run(["card", str(model), "--quiet", *said]) == 0
    card = model / "README.md"
    first = card.read_bytes()
    data = head(card.read_text())
    assert (data["license"], data["language"], data["datasets"]) == ("mit", ["de"], ["someone/prose"])
    assert address in card.read_text()
    card.write_text(card.read_text().replace(BEGIN + "\n", BEGIN + "\nmine\n"))
    assert cli._run(["card", str(model), "--quiet"]) == 0
    assert card.read_bytes() == first.replace(BEGIN.encode() + b"\n", BEGIN.encode() + b"\nmine\n")
    assert cli._run(["card", str(model), "--quiet", "--licence", "isc"]) == 0
    assert head(card.read_text())["license"] == "isc" and head(card.read_text())["language"] == ["de"]


@pytest.mark.parametrize("wrong", [["--dataset", "a b"], ["--collection", "none"], ["--language", "German"]])
def test_an_option_that_is_wrong_leaves_everything_as_it_was(tmp_path, wrong, capsys):
    write(tmp_path, invented())
    before = (tmp_path / "results.json").read_bytes()
    assert cli._run(["card", str(tmp_path), *wrong]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert (tmp_path / "results.json").read_bytes() == before and not (tmp_path / "README.md").exists()


def test_weights_that_cannot_be_read_are_not_counted(model):
    (model / "model.safetensors").write_bytes(b"version https://git-lfs")
    assert "| parameters | not measured |" in render_card(model).read_text()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_configuration_is_one_sentence(model, content):
    (model / "config.json").write_text(content)
    with pytest.raises(RnnzooError, match="save the model again"):
        render_card(model)
    assert not (model / "README.md").exists()


def test_a_folder_without_a_model_has_no_card(tmp_path):
    assert describe(tmp_path) == {}
    with pytest.raises(RnnzooError, match="no results.json, and no model"):
        render_card(tmp_path)


def test_ids_may_be_given_as_addresses():
    said = said_by_publisher(licence=None, datasets=("https://huggingface.co/datasets/a/b",), collections=())
    assert said == {"datasets": ["a/b"]}
