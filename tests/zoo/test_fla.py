"""flash-linear-attention's checkpoints: a plain loop over their tensors, by their names, gives our model's logits."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint
from rnnzoo.zoo.core.registry import config_class


def rms(x, weight, eps=1e-6):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def causal(x, weight):
    """x (T, C), weight (C, 1, taps) -> (T, C): y_t = sum_j weight_j x_{t - taps + 1 + j}."""
    taps, past = weight.shape[-1], torch.cat([x.new_zeros(weight.shape[-1] - 1, x.shape[1]), x])
    return sum(past[j : j + len(x)] * weight[:, 0, j] for j in range(taps))


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def hgrn2(w, x, config, layer, model):
    heads = config["hidden_size"] // config["expand_ratio"]
    f = torch.sigmoid(x @ w["f_proj.weight"].T)
    if config["use_lower_bound"]:
        weights = model["model.lower_bounds"].softmax(0)
        bound = weights[: layer + 1].sum(0) - weights[0]
        f = bound + (1 - bound) * f
    q, i = F.silu(x @ w["q_proj.weight"].T), x @ w["i_proj.weight"].T
    q, f, i = (y.unflatten(-1, (heads, -1)) for y in (q, f, i))
    state, out = x.new_zeros(heads, q.shape[-1], i.shape[-1]), []
    for t in range(len(x)):
        state = f[t, :, :, None] * state + (1 - f[t])[:, :, None] * i[t, :, None]
        out.append(torch.einsum("hk,hkv->hv", q[t], state).flatten() * q.shape[-1] ** -0.5)
    return rms(torch.stack(out), w["g_norm.weight"]) @ w["o_proj.weight"].T


def deltas(w, x, heads, alpha, beta):
    """q, k, v by convolution, unit keys, S = (I - beta n n^T) diag(alpha) S + beta n v; (T, heads, V)."""
    q, k, v = (F.silu(causal(x @ w[f"{c}_proj.weight"].T, w[f"{c}_conv1d.weight"])) for c in "qkv")
    q, k = unit(q.unflatten(-1, (heads, -1))), unit(k.unflatten(-1, (heads, -1)))
    v = v.unflatten(-1, (beta.shape[-1], -1))
    q, k = (y.repeat_interleave(v.shape[1] // heads, 1) for y in (q, k))
    state, out = x.new_zeros(v.shape[1], q.shape[-1], v.shape[-1]), []
    for t in range(len(x)):
        state = alpha[t][..., None] * state
        stored = torch.einsum("hk,hkv->hv", k[t], state)
        state = state + k[t][..., None] * (beta[t][:, None] * (v[t] - stored))[:, None, :]
        out.append(torch.einsum("hk,hkv->hv", q[t], state) * q.shape[-1] ** -0.5)
    return torch.stack(out)


def delta_net(w, x, config, layer, model):
    beta = torch.sigmoid(x @ w["b_proj.weight"].T) * (2 if config["allow_neg_eigval"] else 1)
    o = rms(deltas(w, x, config["num_heads"], x.new_ones(len(x), 1, 1), beta), w["o_norm.weight"])
    if config["use_gate"]:
        o = o * F.silu(x @ w["g_proj.weight"].T).unflatten(-1, o.shape[1:])
    return o.flatten(1) @ w["o_proj.weight"].T


def split_heads(w, x, heads, kv_heads):
    """q, k, v (T, heads, width), those of a group repeated."""
    q, k, v = (x @ w[f"{name}_proj.weight"].T for name in "qkv")
    k, v = (y.unflatten(-1, (kv_heads, -1)).repeat_interleave(heads // kv_heads, 1) for y in (k, v))
    return q.unflatten(-1, (heads, -1)), k, v


def gated_output(w, x, o):
    o = rms(o, w["g_norm_swish_gate.weight"]).flatten(1) * F.silu(x @ w["g_proj.weight"].T)
    return o @ w["o_proj.weight"].T


def rotated(x):
    """x (T, heads, d): channels i and i + d/2 are turned by t 10000^(-2i/d), frequencies in float32 as in FLA."""
    half, time = x.shape[-1] // 2, torch.arange(len(x), dtype=x.dtype)
    angle = time[:, None] * (1.0 / 10000.0 ** (torch.arange(half) / half)).to(x)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def retnet(w, x, config, layer, model):
    """The naive retention of FLA's ops: all pairs of tokens, weighted by powers of gamma."""
    heads, time = config["num_heads"], torch.arange(len(x), dtype=x.dtype)
    q, k, v = split_heads(w, x, heads, config["num_kv_heads"])
    q, k = rotated(q), rotated(k)
    gamma = 1 - 2 ** (-5 - torch.arange(heads, dtype=x.dtype))
    distance = time[:, None] - time
    decay = (gamma[:, None, None] ** distance.clamp(min=0)) * (distance >= 0)
    weights = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5 * decay
    return gated_output(w, x, torch.einsum("hij,jhv->ihv", weights, v))


def gla(w, x, config, layer, model):
    heads, kv_heads = config["num_heads"], config["num_kv_heads"]
    q, k, v = split_heads(w, x, heads, kv_heads)
    gate = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    alpha = (torch.sigmoid(gate) ** (1 / 16)).unflatten(-1, (kv_heads, -1)).repeat_interleave(heads // kv_heads, 1)
    state, out = x.new_zeros(heads, k.shape[-1], v.shape[-1]), []
    for t in range(len(x)):
        state = alpha[t][..., None] * state + k[t][..., None] * v[t][:, None]
        out.append(torch.einsum("hk,hkv->hv", q[t], state) * k.shape[-1] ** -0.5)
    return gated_output(w, x, torch.stack(out))


def gated_delta_net(w, x, config, layer, model):
    alpha = torch.exp(-w["A_log"].exp() * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"]))
    beta = torch.sigmoid(x @ w["b_proj.weight"].T) * (2 if config["allow_neg_eigval"] else 1)
    o = rms(deltas(w, x, config["num_heads"], alpha[..., None], beta), w["o_norm.weight"])
    if config["use_gate"]:
        gate = {"silu": F.silu, "sigmoid": torch.sigmoid}[config["output_gate_activation"]]
        o = o * gate(x @ w["g_proj.weight"].T).unflatten(-1, o.shape[1:])
    return o.flatten(1) @ w["o_proj.weight"].T


def kda(w, x, config, layer, model):
    f, gate = (x @ w[f"{y}_proj.0.weight"].T @ w[f"{y}_proj.1.weight"].T for y in "fg")
    rate = F.softplus(f + w["dt_bias"]).unflatten(-1, (len(w["A_log"]), -1))
    alpha = torch.exp(-w["A_log"].exp()[:, None] * rate)
    beta = torch.sigmoid(x @ w["b_proj.weight"].T) * (2 if config["allow_neg_eigval"] else 1)
    o = rms(deltas(w, x, config["num_heads"], alpha, beta), w["o_norm.weight"])
    o = o * torch.sigmoid(gate + w["g_proj.1.bias"]).unflatten(-1, o.shape[1:])
    return o.flatten(1) @ w["o_proj.weight"].T


MIXERS = {
    "hgrn2": (hgrn2, {}),
    "hgrn2:unbounded": (hgrn2, {"hgrn2_lower_bounds": False, "hgrn2_key_dim": 8}),
    "retnet": (retnet, {}),
    "retnet:grouped": (
        retnet,
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "retnet_value_factor": 1.5},
    ),
    "gla": (gla, {}),
    "gla:grouped": (
        gla,
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "gla_key_width": 8},
    ),
    "delta_net": (delta_net, {}),
    "delta_net:gated": (
        delta_net,
        {"delta_num_heads": 4, "delta_key_dim": 4, "delta_value_dim": 16, "delta_gate": True, "delta_conv_kernel": 3}
        | {"delta_negative_eigenvalues": True},
    ),
    "gated_delta_net": (gated_delta_net, {}),
    "gated_delta_net:grouped": (
        gated_delta_net,
        {"gdn_num_heads": 2, "gdn_v_heads": 4, "gdn_gate_activation": "sigmoid", "gdn_negative_eigenvalues": True},
    ),
    "gated_delta_net:ungated": (gated_delta_net, {"gdn_num_heads": 3, "gdn_value_dim": 5, "gdn_gate": False}),
    "kda": (kda, {"kda_gate_bias": True}),
    "kda:grouped": (
        kda,
        {"kda_gate_bias": True, "kda_num_heads": 2, "kda_v_heads": 4, "kda_value_dim": 8}
        | {"kda_negative_eigenvalues": True},
    ),
}


def logits(folder, mixer, ids):
    """A whole model of theirs, in float64; ids (T,)."""
    config = json.loads((folder / "config.json").read_text())
    model = {name: x.double() for name, x in load_file(folder / "model.safetensors").items()}
    x = model["model.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): y for name, y in model.items() if name.startswith(prefix)}
        attn = {name.removeprefix("attn."): y for name, y in w.items() if name.startswith("attn.")}
        x = x + mixer(attn, rms(x, w["attn_norm.weight"]), config, i, model)
        y = rms(x, w["mlp_norm.weight"])
        y = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + y @ w["mlp.down_proj.weight"].T
    return rms(x, model["model.norm.weight"]) @ model["lm_head.weight"].T


def write(kind, folder):
    """A random model of ours in their format."""
    architecture, (mixer, fields) = kind.split(":")[0], MIXERS[kind]
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "rms_norm_eps": 1e-6}
    config = config_class(architecture)(**sizes, initializer_range=0.2, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.rand_like(parameter)
    model.save_pretrained(folder / "ours")
    return model, mixer, export_checkpoint(folder / "ours", "fla", folder / "theirs")


@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_a_plain_loop_over_their_tensors_gives_our_logits(kind, tmp_path):
    _, mixer, theirs = write(kind, tmp_path)
    out = import_checkpoint(theirs, kind.split(":")[0], tmp_path / "back")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64).eval()
    ids = torch.randint(0, 61, (23,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids[None]).logits[0], logits(theirs, mixer, ids), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in MIXERS if ":" not in kind])
def test_settings_that_we_do_not_know_are_refused_by_name(kind, tmp_path):
    _, _, theirs = write(kind, tmp_path)
    config = json.loads((theirs / "config.json").read_text())
    for name, value in (("attn", {"layers": [0]}), ("hidden_act", "gelu"), ("attnres_block_size", 2)):
        (theirs / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(RnnzooError, match=name):
            import_checkpoint(theirs, kind, tmp_path / "back")
