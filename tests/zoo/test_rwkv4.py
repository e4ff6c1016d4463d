"""RWKV-4: the same numbers as transformers' implementation and the authors' package; multiple temporal perspectives."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.cache import CACHE_NAME
from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint
from rnnzoo.zoo.rwkv4.configuration_rwkv4 import RWKV4Config
from rnnzoo.zoo.rwkv4.modeling_rwkv4 import RWKV4ForCausalLM

from .rwkv_package import equal, ours_and_theirs

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
VARIANTS = {
    "plain": {"num_hidden_layers": 3},
    "widths": {
        "num_hidden_layers": 2,
        "attention_hidden_size": 48,
        "intermediate_size": 40,
        "tie_word_embeddings": True,
    },
    "rescaled": {"num_hidden_layers": 7, "rescale_every": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_transformers_checkpoint_gives_equal_logits_and_generations(variant, tmp_path):
    torch.manual_seed(2)
    config = transformers.RwkvConfig(**({"vocab_size": 67, "hidden_size": 32} | VARIANTS[variant]))
    model = transformers.RwkvForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "original")
    ours = RWKV4ForCausalLM.from_pretrained(import_checkpoint(tmp_path / "original", "rwkv4", tmp_path / "new")).eval()
    every = VARIANTS[variant].get("rescale_every", 6)
    for i, layer in enumerate(ours.model.layers):
        # transformers' rescaling against overflow halves what the norms see, so it quadruples their epsilon.
        layer.input_layernorm.eps = layer.post_attention_layernorm.eps = 1e-5 * 4 ** (i // every)
    ours.model.norm.eps = 1e-5 * 4 ** (config.num_hidden_layers // every)
    ids = torch.randint(3, 67, (2, 21))
    torch.testing.assert_close(ours(ids).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    arguments = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    # transformers' one-token step mixes up rows, and its state has room for `hidden_size` channels only.
    for row in ids[:, None] if config.attention_hidden_size == 32 else ():
        assert torch.equal(ours.generate(row, **arguments), model.generate(row, **arguments))


def test_the_authors_package_gives_equal_logits(tmp_path):
    equal(*ours_and_theirs("rwkv4", tmp_path))


def test_a_formats_limits_are_named(tmp_path):
    RWKV4ForCausalLM(RWKV4Config(**SIZES, temporal_perspectives=2)).save_pretrained(tmp_path / "two")
    RWKV4ForCausalLM(RWKV4Config(**SIZES, channel_mixer="mlp")).save_pretrained(tmp_path / "mlp")
    with pytest.raises(RnnzooError, match="temporal_perspectives=2"):
        export_checkpoint(tmp_path / "two", "rwkv", tmp_path / "out")
    with pytest.raises(RnnzooError, match="channel_mixer='mlp'"):
        export_checkpoint(tmp_path / "mlp", "transformers", tmp_path / "out")


def test_initialisation_is_the_authors():
    model = RWKV4ForCausalLM(RWKV4Config(vocab_size=61, hidden_size=8, num_hidden_layers=3))
    first, last = model.model.layers[0], model.model.layers[2]
    torch.testing.assert_close(first.mixer.decay, -5 + 8 * (torch.arange(8) / 7) ** 0.7)
    torch.testing.assert_close(last.mixer.decay, -5 + 8 * (torch.arange(8) / 7) ** 2.0)
    torch.testing.assert_close(first.mixer.bonus[:3], math.log(0.3) + torch.tensor([0.0, 0.5, -0.5]))
    torch.testing.assert_close(first.mixer.mix_k, torch.arange(8) / 8)
    torch.testing.assert_close(last.mixer.mix_v, (torch.arange(8) / 8) ** (1 / 3) + 0.3)
    torch.testing.assert_close(last.mixer.mix_r, (torch.arange(8) / 8) ** (1 / 6))
    torch.testing.assert_close(last.mlp.mix_r, (torch.arange(8) / 8) ** (1 / 3))
    torch.testing.assert_close(first.mixer.value.weight @ first.mixer.value.weight.T, torch.eye(8))
    for zero in (first.mixer.output, first.mixer.key, first.mixer.receptance, first.mlp.value, first.mlp.receptance):
        assert not zero.weight.any()


# Multiple temporal perspectives --------------------------------------------------------------------------------------


def with_perspectives(count: int) -> RWKV4ForCausalLM:
    torch.manual_seed(0)
    model = RWKV4ForCausalLM(RWKV4Config(**SIZES, temporal_perspectives=count, rwkv_zero_init=False)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def shifted(x, factor):
    return factor * x + (1 - factor) * torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def time_mixing(mixer, x, i):
    """Equations 11 to 16 of the RWKV-4 paper for one perspective, x (T, D), as sums over all tokens before."""
    k = mixer.key(shifted(x, mixer.mix_k[i]))
    v = mixer.value(shifted(x, mixer.mix_v[i]))
    r = torch.sigmoid(mixer.receptance(shifted(x, mixer.mix_r[i])))
    rows = []
    for t in range(len(x)):
        age = torch.arange(t - 1, -1, -1)[:, None]
        score = torch.cat([-age * mixer.decay.exp() + k[:t], mixer.bonus + k[t : t + 1]])
        rows.append((score.softmax(0) * v[: t + 1]).sum(0))
    return mixer.output(r * torch.stack(rows))


def channel_mixing(mlp, x, i):
    k = torch.relu(mlp.key(shifted(x, mlp.mix_k[i]))) ** 2
    return torch.sigmoid(mlp.receptance(shifted(x, mlp.mix_r[i]))) * mlp.value(k)


@torch.no_grad()
def test_perspectives_are_the_papers_loop_over_streams_with_weighted_logits():
    model, ids = with_perspectives(3), torch.randint(0, 61, (11,))
    body, streams = model.model, []
    for i in range(3):
        x = body.embedding_norm(body.embed_tokens(ids))
        for layer in body.layers:
            x = x + time_mixing(layer.mixer, layer.input_layernorm(x), i)
            x = x + channel_mixing(layer.mlp, layer.post_attention_layernorm(x), i)
        streams.append(body.norm(x))
    weights = body.perspectives.weigh(torch.stack(streams).mean(0)).softmax(-1)
    expected = sum(weights[:, i : i + 1] * model.lm_head(x) for i, x in enumerate(streams))
    torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_perspectives_keep_the_equalities():
    model, ids = with_perspectives(2), torch.randint(0, 61, (2, 9))
    whole = model(ids).logits
    cache, parts = None, []
    for part in ids.split([1, 3, 1, 4], 1):
        out = model(part, cache=cache, use_cache=True)
        cache = out[CACHE_NAME]
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1]).expand(2, -1)
    packed = model(ids, seq_ids=documents).logits
    torch.testing.assert_close(packed[:, 3:], model(ids[:, 3:]).logits, rtol=1e-9, atol=1e-9)
    padded = model(torch.nn.functional.pad(ids, (2, 0)), attention_mask=torch.tensor([[0] * 2 + [1] * 9] * 2)).logits
    torch.testing.assert_close(padded[:, 2:], whole, rtol=1e-9, atol=1e-9)
    model.train()
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_wrong_perspectives_are_refused():
    with pytest.raises(ValueError, match="one or more"):
        RWKV4Config(**SIZES, temporal_perspectives=0)
    with pytest.raises(ValueError, match="every layer"):
        RWKV4Config(**SIZES, temporal_perspectives=2, layer_types=["rwkv4", "full_attention"])
