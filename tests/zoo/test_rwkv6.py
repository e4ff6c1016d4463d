"""RWKV-6: the same numbers as the authors' package and as FLA's equations; the student of an attention layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.core.model import RecurrentModel
from rnnzoo.zoo.rwkv6.configuration_rwkv6 import RWKV6Config
from rnnzoo.zoo.rwkv6.modeling_rwkv6 import RWKV6ForCausalLM, RWKV6Mixer

from .rwkv_package import equal, ours_and_theirs

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}


def test_the_authors_package_gives_equal_logits(tmp_path):
    equal(*ours_and_theirs("rwkv6", tmp_path, head_dim=16, rwkv6_mix_rank=5, rwkv6_decay_rank=7))


# FLA's format --------------------------------------------------------------------------------------------------------


def fla_loop(w: dict[str, torch.Tensor], ids: torch.Tensor, heads: int, eps: float, layers: int) -> torch.Tensor:
    """A plain loop from FLA's equations over its tensors: logits (T, vocab)."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def lerp(x, mu):
        return x + mu * (torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x)

    x = norm(w["model.embeddings.weight"][ids], "model.layers.0.pre_norm")
    for i in range(layers):
        p = f"model.layers.{i}.attn."
        y = norm(x, f"model.layers.{i}.attn_norm")
        low = torch.tanh(lerp(y, w[p + "x_proj.0.mu"]) @ w[p + "x_proj.0.linear.weight"].T).view(len(y), 5, -1)
        up = w[p + "x_proj.2.weight"].view(y.shape[1], 5, -1)
        mu = torch.einsum("tnr,hnr->tnh", low, up) + w[p + "x_bias"]
        x_r, x_w, x_k, x_v, x_g = (lerp(y, mu[:, n]) for n in range(5))
        lora = p + "w_proj.linear.lora."
        decay = torch.tanh(x_w @ w[lora + "0.weight"].T) @ w[lora + "2.weight"].T + w[lora + "2.bias"]
        r, k, v = (z @ w[f"{p}{n}_proj.linear.weight"].T for n, z in (("r", x_r), ("k", x_k), ("v", x_v)))
        r, k, v, decay = (z.view(len(y), heads, -1) for z in (r, k, v, (-decay.exp()).exp()))
        state, rows = torch.zeros(heads, k.shape[-1], v.shape[-1], dtype=x.dtype), []
        for t in range(len(y)):
            kv = k[t][:, :, None] * v[t][:, None]
            rows.append(((state + w[p + "bonus"][:, :, None] * kv) * r[t][:, :, None]).sum(1).flatten())
            state = decay[t][:, :, None] * state + kv
        o = F.group_norm(torch.stack(rows), heads, w[p + "g_norm.weight"], w[p + "g_norm.bias"], eps)
        x = x + (o * F.silu(x_g @ w[p + "g_proj.linear.weight"].T)) @ w[p + "o_proj.weight"].T
        y, p = norm(x, f"model.layers.{i}.ffn_norm"), f"model.layers.{i}.ffn."
        key = F.relu(lerp(y, w[p + "key.mu"]) @ w[p + "key.linear.weight"].T) ** 2
        gate = torch.sigmoid(lerp(y, w[p + "receptance.mu"]) @ w[p + "receptance.linear.weight"].T)
        x = x + gate * (key @ w[p + "value.weight"].T)
    return norm(x, "model.norm") @ w["lm_head.weight"].T


@torch.no_grad()
def test_a_checkpoint_in_flas_format_gives_what_its_equations_give(tmp_path):
    torch.manual_seed(0)
    # FLA's default: keys half as wide as values.
    model = RWKV6ForCausalLM(RWKV6Config(**SIZES, head_dim=8, rwkv6_key_width=4, rwkv6_mix_rank=3)).double()
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    theirs = export_checkpoint(tmp_path / "model", "fla", tmp_path / "theirs")
    ours = RWKV6ForCausalLM.from_pretrained(import_checkpoint(theirs, "rwkv6", tmp_path / "back"))
    assert ours.config.rwkv6_key_width == 4 and ours.dtype == torch.float64
    ids = torch.randint(0, 61, (13,))
    expected = fla_loop(load_file(theirs / "model.safetensors"), ids, 4, 1e-5, 2)
    torch.testing.assert_close(ours.eval()(ids[None]).logits[0], expected, rtol=1e-9, atol=1e-9)


def test_a_formats_limits_are_named(tmp_path):
    RWKV6ForCausalLM(RWKV6Config(**SIZES, rwkv6_balance=True)).save_pretrained(tmp_path / "balanced")
    RWKV6ForCausalLM(RWKV6Config(**SIZES, rwkv_group_eps=1e-5)).save_pretrained(tmp_path / "eps")
    for model, format, named in (("balanced", "rwkv", "rwkv6_balance"), ("eps", "fla", "64 rms_norm_eps")):
        with pytest.raises(RnnzooError, match=named):
            export_checkpoint(tmp_path / model, format, tmp_path / "out")
    with pytest.raises(ValueError, match="rwkv6_gate"):
        RWKV6Config(**SIZES, rwkv6_gate="relu")


# Starts --------------------------------------------------------------------------------------------------------------


def test_initialisation_is_the_authors():
    model = RWKV6ForCausalLM(RWKV6Config(vocab_size=61, hidden_size=32, num_hidden_layers=3, head_dim=8))
    mixer, channel = model.model.layers[1].mixer, torch.arange(32)
    torch.testing.assert_close(mixer.decay.up.bias, -6 + 5 * (channel / 31) ** 1.35)
    torch.testing.assert_close(mixer.bonus.flatten(), 0.5 * (1 - channel / 31) + ((channel + 1) % 3 - 1) * 0.1)
    share = (channel / 32) ** (2 / 3)
    rows = [share, share, share + 0.15, share.sqrt(), share.sqrt()]
    torch.testing.assert_close(mixer.shift.mix, 1 - torch.stack(rows))
    torch.testing.assert_close(model.model.layers[1].mlp.mix_k, 1 - (channel / 32) ** (8 / 27))
    assert not mixer.shift.down.weight.any() and not mixer.decay.down.weight.any()
    assert 0 < mixer.shift.up.abs().max() <= 0.01 and 0 < mixer.decay.up.weight.abs().max() <= 0.01


def student(**fields) -> RWKV6Config:
    sizes = {"vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 4}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    return RWKV6Config(**sizes, **heads, norm_type="rms", **RWKV6Config.student_fields(9, 3, 4), **fields)


def weights(**extra) -> AttentionWeights:
    torch.manual_seed(0)
    q, k, v, o = torch.randn(36, 36), torch.randn(12, 36), torch.randn(12, 36), torch.randn(36, 36)
    return AttentionWeights(q, k, v, o, 9, 3, 4, **extra)


@torch.no_grad()
def test_a_student_of_attention_starts_as_decayed_attention_without_softmax():
    model = RecurrentModel(student(attention_bias=True, qk_norm=True)).double()
    mixer, teacher = model.layers[0].mixer, weights(q_bias=torch.randn(36), k_norm=torch.rand(4))
    mixer.init_from_attention(teacher)
    assert torch.equal(mixer.proj.q_proj.weight, teacher.q.double())
    assert torch.equal(mixer.proj.q_proj.bias, teacher.q_bias.double())
    x, ctx = torch.randn(1, 7, 36).double(), model.make_context(1, 7, torch.device("cpu"))
    q, k, v = mixer.proj.split(x)
    q, k = ctx.rotary.rotate(q, ctx.positions), ctx.rotary.rotate(k, ctx.positions)
    k, v = k.repeat_interleave(3, 2), v.repeat_interleave(3, 2)
    w = (-mixer.decay.up.bias.exp()).exp().view(9, 4)
    k = k * (1 - w)
    rows = []
    for t in range(7):
        age = (t - 1 - torch.arange(t + 1))[:, None, None].clamp(min=0)  # the bonus of 1: a token reads itself in full
        score = (q[0, t] * w**age * k[0, : t + 1]).sum(-1, keepdim=True)
        rows.append((score * v[0, : t + 1]).sum(0).flatten())
    expected = mixer.proj.o_proj(0.5 * 4**-0.5 * torch.stack(rows))
    torch.testing.assert_close(mixer(x, None, ctx)[0][0], expected, rtol=1e-9, atol=1e-9)


def test_a_student_of_other_sizes_is_refused():
    with pytest.raises(ShapeError, match="heads"):
        RWKV6Mixer(RWKV6Config(**SIZES), 0).init_from_attention(weights())
