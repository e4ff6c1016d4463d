"""xLSTM: the same numbers as transformers' implementation, and as the paper's equations at any size of the gates."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.zoo.core.importing import export_checkpoint, import_checkpoint
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.core.model import RecurrentModel
from rnnzoo.zoo.xlstm.configuration_xlstm import xLSTMConfig
from rnnzoo.zoo.xlstm.modeling_xlstm import running_maximum, xLSTMForCausalLM, xLSTMMixer

# Its cache rounds widths up to a multiple of 64, so that narrower ones cannot generate.
SIZES = {"vocab_size": 67, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "ffn_proj_factor": 1.0}
VARIANTS = {
    "plain": {"chunk_size": 16},
    "options": {"chunk_size": 64, "gate_soft_cap": 5.0, "output_logit_soft_cap": 3.0, "eps": 1e-3, "norm_eps": 1e-4},
}


def original(variant: str, folder):
    """A random model of transformers, its gates at work, and its checkpoint in `folder`."""
    torch.manual_seed(2)
    model = transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**SIZES, **VARIANTS[variant])).eval()
    for name, parameter in model.named_parameters():
        if "gate_preact" in name or "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
        if "igate_preact.bias" in name:
            parameter.data += 9
        if "embeddings" in name or "lm_head" in name:
            parameter.data *= 5
    model.save_pretrained(folder, max_shard_size="200KB")
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_an_imported_checkpoint_gives_equal_logits_and_generations(variant, tmp_path):
    model = original(variant, tmp_path / "original")
    out = import_checkpoint(tmp_path / "original", "xlstm", tmp_path / "new")
    ours = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(ours, xLSTMForCausalLM)
    ids = torch.randint(3, 67, (2, 37))
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    arguments = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = ours.generate(ids, **arguments)
    assert torch.equal(found, model.generate(ids, **arguments)) and len(found[:, 37:].unique()) > 5
    again = type(model).from_pretrained(export_checkpoint(out, "transformers", tmp_path / "back"))
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


def test_the_gradient_is_transformers(tmp_path):
    model = original("options", tmp_path / "original")  # one chunk; its backward through several fails
    out = import_checkpoint(tmp_path / "original", "xlstm", tmp_path / "new")
    ours = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(3, 67, (1, 32))
    for each in (model, ours):
        each(ids, labels=ids).loss.backward()
    theirs = model.backbone.blocks[0]
    mixer, mlp = ours.model.layers[0].mixer, ours.model.layers[0].mlp
    for left, right in (
        (mixer.i_proj.weight, theirs.mlstm_layer.igate_preact.weight),
        (mixer.f_proj.bias, theirs.mlstm_layer.fgate_preact.bias),
        (mixer.proj.q_proj.weight, theirs.mlstm_layer.q.weight),
        (mixer.proj.k_proj.weight, theirs.mlstm_layer.k.weight),
        (mlp.gate_proj.weight, theirs.ffn.proj_up_gate.weight),
    ):
        assert (left.grad - right.grad).norm() < 1e-4 * right.grad.norm()


def loop(mixer: xLSTMMixer, x: torch.Tensor) -> torch.Tensor:
    """The equations 19-27 of the paper without stabiliser, in float64, for one sequence (T, D); eps = 0."""
    heads, cap = mixer.proj.num_heads, mixer.config.xlstm_gate_cap
    q, k, v = (
        layer(x).unflatten(-1, (heads, -1)) for layer in (mixer.proj.q_proj, mixer.proj.k_proj, mixer.proj.v_proj)
    )
    i, f = mixer.i_proj(x), mixer.f_proj(x)
    i, f = (i, f) if cap is None else (cap * torch.tanh(i / cap), cap * torch.tanh(f / cap))
    c, n, outputs = torch.zeros(heads, q.shape[-1], v.shape[-1]), torch.zeros(heads, q.shape[-1]), []
    for t in range(x.shape[0]):
        forget, write = torch.sigmoid(f[t])[:, None], torch.exp(i[t])[:, None]
        key = k[t] / q.shape[-1] ** 0.5
        c = forget[..., None] * c + write[..., None] * key[:, :, None] * v[t][:, None]
        n = forget * n + write * key
        h = torch.einsum("hk,hkv->hv", q[t], c) / (q[t] * n).sum(-1, keepdim=True).abs().clamp(min=1)
        outputs.append(torch.nn.functional.layer_norm(h, h.shape[-1:], eps=mixer.config.rms_norm_eps).flatten())
    return mixer.proj.o_proj(torch.stack(outputs) * torch.sigmoid(mixer.gate_proj(x)))


@pytest.mark.parametrize(("shift", "cap"), [(0.0, 15.0), (0.0, None), (40.0, None), (-40.0, None)])
@torch.no_grad()
def test_it_is_the_unstabilised_equations(shift, cap):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        config = xLSTMConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, xlstm_gate_cap=cap, xlstm_eps=0.0
        )
        mixer = xLSTMMixer(config, 0)
        for layer in (mixer.i_proj, mixer.f_proj):
            layer.weight.mul_(6)
        mixer.i_proj.bias.add_(shift)
        x = torch.randn(1, 70, 32)
        found = mixer(x, None, RecurrentModel(config).make_context(1, 70, x.device))[0]
        torch.testing.assert_close(found[0], loop(mixer, x[0]), rtol=1e-9, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_gates_of_any_size_neither_overflow_nor_spoil_the_gradient(logit):
    config = xLSTMConfig(hidden_size=32, num_hidden_layers=1, xlstm_gate_cap=None)
    mixer = xLSTMMixer(config, 0)
    mixer.init_weights()
    torch.nn.init.constant_(mixer.i_proj.bias, logit)
    torch.nn.init.normal_(mixer.i_proj.weight, std=30)
    torch.nn.init.normal_(mixer.f_proj.weight, std=30)
    x = torch.randn(2, 40, 32, requires_grad=True)
    mask = torch.rand(2, 40) < 0.8
    y = mixer(x, None, RecurrentModel(config).make_context(2, 40, x.device, mask=mask))[0]
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_the_running_maximum_is_the_recurrence():
    torch.manual_seed(1)
    log_f, log_i, first = -3 * torch.rand(2, 37, 3), 4 * torch.randn(2, 37, 3), torch.randn(2, 3)
    mask, starts = torch.rand(2, 37) < 0.7, torch.rand(2, 37) < 0.2
    starts &= mask
    found, m = running_maximum(log_f, log_i, first, starts, mask), first
    for t in range(37):
        after = torch.maximum(log_f[:, t] + m.masked_fill(starts[:, t, None], 0), log_i[:, t])
        m = torch.where(mask[:, t, None], after, m)
        torch.testing.assert_close(found[:, t], m)


def test_initialisation_is_the_source():
    torch.manual_seed(0)
    config = xLSTMConfig(vocab_size=9, hidden_size=256, num_hidden_layers=3, initializer_range=7.0)
    mixer = transformers.AutoModelForCausalLM.from_config(config).model.layers[0].mixer
    assert config.num_attention_heads == 4 and config.xlstm_key_width == 32
    assert torch.equal(mixer.i_proj.bias, torch.full((4,), -10.0))
    torch.testing.assert_close(mixer.f_proj.bias, torch.tensor([3.0, 4, 5, 6]))
    assert not any(layer.weight.any() for layer in (mixer.i_proj, mixer.f_proj, mixer.gate_proj))
    assert abs(mixer.proj.q_proj.weight.std() / (2 / (5 * 256)) ** 0.5 - 1) < 0.05
    assert abs(mixer.proj.o_proj.weight.std() / (2 / 3 / 16) - 1) < 0.05


def test_a_student_of_attention_takes_its_matrices():
    torch.manual_seed(0)
    q, k, v, o = torch.randn(36, 36), torch.randn(12, 36), torch.randn(12, 36), torch.randn(36, 36)
    weights = AttentionWeights(q, k, v, o, 9, 3, 4)
    heads = {
        "hidden_size": 36,
        "num_hidden_layers": 1,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 4,
    }
    mixer = xLSTMMixer(xLSTMConfig(**heads, **xLSTMConfig.student_fields(9, 3, 4)), 0)
    mixer.init_from_attention(weights)
    for name in "qkvo":
        assert torch.equal(getattr(mixer.proj, f"{name}_proj").weight, getattr(weights, name))
    assert mixer.i_proj.out_features == 3  # a gate a key/value head
    with pytest.raises(ShapeError, match="q_proj"):
        xLSTMMixer(xLSTMConfig(**heads), 0).init_from_attention(weights)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="xlstm_gate_cap"):
        xLSTMConfig(hidden_size=32, num_hidden_layers=1, xlstm_gate_cap=0.0)
    with pytest.raises(ValueError, match="xlstm_key_width"):
        xLSTMConfig(hidden_size=32, num_hidden_layers=1, xlstm_key_width=-1)
    original("plain", tmp_path / "original")
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    (tmp_path / "original" / "config.json").write_text(json.dumps(config | {"weight_mode": "fused"}))
    with pytest.raises(RnnzooError, match="weight_mode='fused'"):
        import_checkpoint(tmp_path / "original", "xlstm", tmp_path / "new")
