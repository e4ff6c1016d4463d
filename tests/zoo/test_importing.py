"""Checkpoints of other implementations: what every importer promises."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.importing import export_checkpoint, formats, import_checkpoint, importable
from rnnzoo.zoo.core.registry import config_class

# Options without which a format cannot express a model.
NEEDED = {
    ("rwkv7", "fla"): {"rwkv_group_eps": 32e-5},
    ("gated_delta_net", "transformers"): {
        "norm_type": "rms_offset",
        "layer_types": ["gated_delta_net", "gated_delta_net.attention"],
    },
    ("kda", "fla"): {"kda_gate_bias": True},
    ("kda", "transformers"): {"layer_types": ["kda", "kda.attention"]},
}
EVERY = [(name, own) for name in importable() for own in formats(name)]


@pytest.fixture(params=EVERY, ids="-".join)
def kind(request):
    return request.param


def random_model(architecture: str, folder, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = config_class(architecture)(vocab_size=61, hidden_size=32, num_hidden_layers=2, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.rand_like(parameter)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return model


def test_an_exported_model_comes_back_bit_for_bit(kind, tmp_path):
    architecture, own = kind
    model = random_model(architecture, tmp_path / "model", torch.bfloat16, **NEEDED.get(kind, {}))
    export_checkpoint(tmp_path / "model", own, tmp_path / "theirs", shard_bytes=20_000)
    back = import_checkpoint(tmp_path / "theirs", architecture, tmp_path / "back", shard_bytes=30_000)
    assert (tmp_path / "theirs" / "tokenizer_config.json").is_file() and (back / "tokenizer_config.json").is_file()
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert type(again) is type(model)
    expected = model.state_dict()
    assert {name: x.dtype for name, x in again.state_dict().items()} == {n: x.dtype for n, x in expected.items()}
    for name, x in again.state_dict().items():
        assert torch.equal(x, expected[name]), name
    ids = torch.arange(9)[None]
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_tensors_that_are_missing_or_have_no_place_are_all_named(kind, tmp_path):
    architecture, own = kind
    random_model(architecture, tmp_path / "model", **NEEDED.get(kind, {}))
    theirs = export_checkpoint(tmp_path / "model", own, tmp_path / "theirs")
    file = formats(architecture)[own].file
    path = theirs / (file or "model.safetensors")
    tensors = torch.load(path, weights_only=True) if file else load_file(path)
    gone = sorted(name for name in tensors if "norm" in name or "ln" in name)[0]
    del tensors[gone]
    tensors["left.over.weight"] = torch.zeros(3)
    torch.save(tensors, path) if file else save_file(tensors, path)
    with pytest.raises(RnnzooError) as error:
        import_checkpoint(theirs, architecture, tmp_path / "back", format=own)
    assert gone in str(error.value) and "left.over.weight" in str(error.value)
    assert not (tmp_path / "back").exists()


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil").mkdir()
    torch.save({"blocks.0.att.weight": Evil()}, tmp_path / "evil" / "pytorch_model.bin")
    (tmp_path / "evil" / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
    with pytest.raises(RnnzooError, match="cannot be read as tensors alone"):
        import_checkpoint(tmp_path / "evil", "mamba2", tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_an_interrupted_import_leaves_nothing(tmp_path, monkeypatch):
    random_model("mamba2", tmp_path / "model")
    theirs = export_checkpoint(tmp_path / "model", "transformers", tmp_path / "theirs")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rnnzoo.zoo.core.importing.save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(theirs, "mamba2", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "theirs"]


def test_export_refuses_what_the_format_cannot_say(tmp_path):
    random_model("mamba2", tmp_path / "hybrid", layer_types=["mamba2", "full_attention"])
    with pytest.raises(RnnzooError, match="other layers"):
        export_checkpoint(tmp_path / "hybrid", "transformers", tmp_path / "out")
    with pytest.raises(RnnzooError, match="no format of mamba2"):
        export_checkpoint(tmp_path / "hybrid", "gguf", tmp_path / "out")
