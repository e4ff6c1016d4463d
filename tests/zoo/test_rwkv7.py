"""RWKV-7: the same numbers as the authors' package and as FLA's equations; values carried over the layers; students."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.core.model import RecurrentModel
from rnnzoo.zoo.rwkv7.configuration_rwkv7 import RWKV7Config
from rnnzoo.zoo.rwkv7.modeling_rwkv7 import RWKV7ForCausalLM, RWKV7Mixer

from .rwkv_package import equal, ours_and_theirs

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3}
RANKS = {"rwkv7_decay_rank": 3, "rwkv7_rate_rank": 4, "rwkv7_value_rank": 5, "rwkv7_gate_rank": 6}


def test_the_authors_package_gives_equal_logits(tmp_path):
    equal(*ours_and_theirs("rwkv7", tmp_path, head_dim=16, **RANKS))


@torch.no_grad()
def test_what_the_training_code_writes_and_nobody_uses_is_passed_over(tmp_path):
    RWKV7ForCausalLM(RWKV7Config(**SIZES)).save_pretrained(tmp_path / "model")
    file = export_checkpoint(tmp_path / "model", "rwkv", tmp_path / "theirs") / "model.pth"
    tensors = torch.load(file)
    torch.save(tensors | {f"blocks.0.att.v{i}": torch.zeros(3) for i in range(3)}, file)
    import_checkpoint(file, "rwkv7", tmp_path / "back")


# FLA's format --------------------------------------------------------------------------------------------------------


def fla_loop(w: dict[str, torch.Tensor], ids: torch.Tensor, heads: int, layers: int) -> torch.Tensor:
    """A plain loop from FLA's equations over its tensors: logits (T, vocab)."""
    time, eps = len(ids), 1e-5

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def lerp(x, mu):
        return x + mu.flatten() * (torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x)

    first = None
    x = norm(w["model.embeddings.weight"][ids], "model.layers.0.pre_norm")
    for i in range(layers):
        p = f"model.layers.{i}.attn."
        y = norm(x, f"model.layers.{i}.attn_norm")

        def low(name, act, p=p, y=y):
            up = act(lerp(y, w[f"{p}x_{name}"]) @ w[f"{p}{name}_lora.lora.0.weight"].T)
            return up @ w[f"{p}{name}_lora.lora.2.weight"].T + w.get(f"{p}{name}_lora.lora.2.bias", 0)

        r, k, v = (lerp(y, w[f"{p}x_{n}"]) @ w[f"{p}{n}_proj.weight"].T for n in "rkv")
        decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(low("w", torch.tanh)))
        first = v if first is None else first
        if i:
            v = torch.lerp(v, first, torch.sigmoid(low("v", lambda z: z)))
        a = torch.sigmoid(low("a", lambda z: z))
        g = low("g", torch.sigmoid)
        n = F.normalize((k * w[p + "k_k"]).view(time, heads, -1), dim=-1)
        k = k * (1 + (a - 1) * w[p + "k_a"])
        r, k, v, a, decay = (z.view(time, heads, -1) for z in (r, k, v, a, decay))
        state, rows = torch.zeros(heads, k.shape[-1], v.shape[-1], dtype=x.dtype), []
        for t in range(time):
            known = (n[t][:, :, None] * state).sum(1, keepdim=True)
            state = decay[t][:, :, None] * state - (n * a)[t][:, :, None] * known + k[t][:, :, None] * v[t][:, None]
            rows.append((r[t][:, :, None] * state).sum(1).flatten())
        width = eps * k.shape[-1]
        o = F.group_norm(torch.stack(rows), heads, w[p + "g_norm.weight"], w[p + "g_norm.bias"], width)
        o = o + ((r * k * w[p + "r_k"]).sum(-1, keepdim=True) * v).flatten(1)
        x = x + (o * g) @ w[p + "o_proj.weight"].T
        y, p = norm(x, f"model.layers.{i}.ffn_norm"), f"model.layers.{i}.ffn."
        x = x + F.relu(lerp(y, w[p + "x_k"]) @ w[p + "key.weight"].T) ** 2 @ w[p + "value.weight"].T
    return norm(x, "model.norm") @ w["lm_head.weight"].T


def random_model(**fields) -> RWKV7ForCausalLM:
    torch.manual_seed(0)
    model = RWKV7ForCausalLM(RWKV7Config(**(SIZES | RANKS | fields))).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def test_a_checkpoint_in_flas_format_gives_what_its_equations_give(tmp_path):
    random_model(head_dim=8, rwkv_group_eps=8e-5).save_pretrained(tmp_path / "model")
    theirs = export_checkpoint(tmp_path / "model", "fla", tmp_path / "theirs")
    ours = RWKV7ForCausalLM.from_pretrained(import_checkpoint(theirs, "rwkv7", tmp_path / "back")).eval()
    ids = torch.randint(0, 61, (13,))
    expected = fla_loop(load_file(theirs / "model.safetensors"), ids, 4, 3)
    torch.testing.assert_close(ours(ids[None]).logits[0], expected, rtol=1e-9, atol=1e-9)


def test_a_formats_limits_are_named(tmp_path):
    RWKV7ForCausalLM(RWKV7Config(**SIZES, rwkv7_value_residual=False)).save_pretrained(tmp_path / "student")
    RWKV7ForCausalLM(RWKV7Config(**SIZES)).save_pretrained(tmp_path / "eps")
    for model, format, named in (("student", "rwkv", "rwkv7_value_residual"), ("eps", "fla", "rwkv_group_eps")):
        with pytest.raises(RnnzooError, match=named):
            export_checkpoint(tmp_path / model, format, tmp_path / "out")


# The value residual --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_first_layers_values_get_their_gradient_through_later_layers_under_checkpointing(reentrant):
    ids, grads = torch.randint(0, 61, (2, 9)), []
    for checkpointing in (False, True):
        model = random_model().train()
        model.model.layers[0].mixer.proj.o_proj.weight.data.zero_()  # nothing reaches the loss but by the later layers
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids).loss.backward()
        grads.append(model.model.layers[0].mixer.proj.v_proj.weight.grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads)


@torch.no_grad()
def test_a_layer_that_runs_alone_takes_its_own_values_for_the_first():
    model = random_model().model
    x, layer = torch.randn(1, 5, 32).double(), model.layers[2]
    ctx = model.make_context(1, 5, x.device)
    alone, _, carried = layer(x, None, ctx)
    assert ctx.carried is None and carried.shape == (1, 5, 1, 32)
    torch.testing.assert_close(layer(x, None, ctx, carried)[0], alone)
    assert not torch.allclose(layer(x, None, ctx, carried + 1)[0], alone)
    hybrid = RWKV7Config(vocab_size=7, hidden_size=32, num_hidden_layers=3, layer_types=["supra", "rwkv7", "rwkv7"])
    shares = [getattr(layer.mixer, "share", None) for layer in RecurrentModel(hybrid).layers]
    assert shares[1] is None and shares[2] is not None


# Starts --------------------------------------------------------------------------------------------------------------


def test_initialisation_is_the_authors():
    mixer = RWKV7ForCausalLM(RWKV7Config(**SIZES, head_dim=8)).model.layers[1].mixer
    channel = torch.arange(32)
    linear, zigzag = channel / 31 - 0.5, (channel % 8 - 3.5) / 3.5
    zigzag = zigzag * zigzag.abs()
    torch.testing.assert_close(mixer.decay.up.bias, -5.5 + 6 * (channel / 31) ** (1 + 0.5**0.3) + 2.5 * zigzag)
    torch.testing.assert_close(mixer.rate.up.bias, -0.19 + 0.3 * zigzag + 0.4 * linear)
    torch.testing.assert_close(mixer.share.up.bias, 0.73 - 0.4 * linear)
    torch.testing.assert_close(mixer.removal, 0.71 - 0.1 * linear)
    assert (mixer.replacement == 1.02).all() and (mixer.bonus == -0.04).all()
    powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None] * 2 / 3
    torch.testing.assert_close(mixer.mix, 1 - (channel / 32) ** powers)
    for function in (mixer.decay, mixer.rate, mixer.share, mixer.gate):
        assert not function.down.weight.any()
        torch.testing.assert_close(function.up.weight.T @ function.up.weight, 0.01 * torch.eye(32))


def test_ranks_are_those_the_authors_suggest():
    config = RWKV7Config(**RWKV7Config.sizes["2.9B"])
    ranks = (config.rwkv7_decay_rank, config.rwkv7_rate_rank, config.rwkv7_value_rank, config.rwkv7_gate_rank)
    assert ranks == (96, 96, 64, 320)


def weights(**extra) -> AttentionWeights:
    torch.manual_seed(0)
    q, k, v, o = torch.randn(36, 36), torch.randn(12, 36), torch.randn(12, 36), torch.randn(36, 36)
    return AttentionWeights(q, k, v, o, 9, 3, 4, **extra)


@torch.no_grad()
def test_a_student_of_attention_takes_its_matrices_and_starts_with_a_gate_of_one():
    sizes = {"vocab_size": 61, "hidden_size": 36, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 4}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "attention_bias": True}
    config = RWKV7Config(**sizes, **heads, norm_type="rms", **RWKV7Config.student_fields(9, 3, 4))
    model = RecurrentModel(config).double()
    mixer, teacher = model.layers[1].mixer, weights(v_bias=torch.randn(12))
    mixer.init_from_attention(teacher)
    for ours, theirs in (("q", teacher.q), ("k", teacher.k), ("v", teacher.v), ("o", teacher.o)):
        assert torch.equal(getattr(mixer.proj, f"{ours}_proj").weight, theirs.double())
    assert torch.equal(mixer.proj.v_proj.bias, teacher.v_bias.double())
    x, ctx = torch.randn(1, 7, 36).double(), model.make_context(1, 7, torch.device("cpu"))
    torch.testing.assert_close(mixer.gate(x), torch.ones_like(x))
    torch.testing.assert_close(mixer.rate(x), torch.zeros_like(x))
    torch.testing.assert_close(mixer.decay(x)[0, 0], -6.5 + 5 * (torch.arange(36).double() / 35) ** 1.85)
    # The first token reads what it has written: v, times r k (1 + (1/2 - 1) 1.02), without a norm.
    r, k, v = (z[:, 0].double() for z in mixer.proj.split(x))
    score = (r * k.repeat_interleave(3, 1)).sum(-1, keepdim=True) * (1 - 0.51) * 4**-0.5
    expected = mixer.proj.o_proj((score * v.repeat_interleave(3, 1)).flatten(1))
    torch.testing.assert_close(mixer(x, None, ctx)[0][:, 0], expected)


def test_a_student_of_other_sizes_is_refused():
    with pytest.raises(ShapeError, match="heads"):
        RWKV7Mixer(RWKV7Config(**SIZES), 0).init_from_attention(weights())
