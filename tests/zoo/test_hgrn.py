"""HGRN: a checkpoint in FLA's format, computed here token by token from its tensors, and what it starts from."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.importing import import_checkpoint
from rnnzoo.zoo.hgrn.configuration_hgrn import HGRNConfig
from rnnzoo.zoo.hgrn.modeling_hgrn import HGRNForCausalLM

WIDTH, LAYERS, VOCABULARY, MLP = 16, 3, 29, 256  # FLA's MLPs are multiples of 256
VARIANTS = {
    "plain": {},
    "wider, with convolutions": {"expand_ratio": 2, "use_short_conv": True, "conv_size": 3},
    "without bounds": {"use_lower_bound": False},
}


@pytest.fixture(params=VARIANTS)
def original(request, tmp_path):
    """A checkpoint with FLA's names: its tensors, its settings and its folder."""
    torch.manual_seed(4)
    extra = VARIANTS[request.param]
    inner = WIDTH * extra.get("expand_ratio", 1)
    shapes = {"model.embeddings.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    shapes |= {"model.norm.weight": (WIDTH,)}
    if extra.get("use_lower_bound", True):
        shapes["model.lower_bounds"] = (LAYERS, inner)
    for layer in (f"model.layers.{i}." for i in range(LAYERS)):
        shapes |= {f"{layer}attn_norm.weight": (WIDTH,), f"{layer}mlp_norm.weight": (WIDTH,)}
        shapes |= {f"{layer}attn.{part}_proj.weight": (inner, WIDTH) for part in "ifg"}
        shapes |= {f"{layer}attn.o_proj.weight": (WIDTH, inner), f"{layer}attn.g_norm.weight": (inner,)}
        shapes |= {f"{layer}mlp.{part}_proj.weight": (MLP, WIDTH) for part in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (WIDTH, MLP)}
        if "use_short_conv" in extra:
            shapes |= {f"{layer}attn.{part}_conv1d.weight": (inner, 1, 3) for part in "if"}
    tensors = {name: torch.randn(shape) * (1 if len(shape) != 2 else 0.4) for name, shape in shapes.items()}
    settings = {"model_type": "hgrn", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    (tmp_path / "fla").mkdir()
    save_file(tensors, tmp_path / "fla" / "model.safetensors")
    (tmp_path / "fla" / "config.json").write_text(json.dumps(settings | extra))
    return {name: x.double() for name, x in tensors.items()}, extra, tmp_path / "fla"


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def mix(x, p, bound):
    """FLA's HGRN layer on x (T, D), token by token; `p` its tensors, `bound` the lower bound of its gates or None."""
    i, f = x @ p["i_proj.weight"].T, x @ p["f_proj.weight"].T
    if "i_conv1d.weight" in p:
        i, f = (
            F.conv1d(F.pad(u.T, (2, 0)), p[f"{part}_conv1d.weight"], groups=u.shape[1]).T
            for u, part in ((i, "i"), (f, "f"))
        )
    g, h, out = x @ p["g_proj.weight"].T, torch.zeros(i.shape[1], dtype=x.dtype), []
    for t in range(len(x)):
        forget = torch.sigmoid(f[t])
        if bound is not None:
            forget = bound + (1 - bound) * forget
        h = forget * h + F.silu(i[t]) * (1 - forget)
        out.append(rms(h, p["g_norm.weight"]) * F.silu(g[t]))
    return torch.stack(out) @ p["o_proj.weight"].T


def logits_of(tensors, ids):
    """Logits (T, V) of one row of ids, from the checkpoint's tensors alone."""
    bounds = [None] * LAYERS
    if "model.lower_bounds" in tensors:
        share = tensors["model.lower_bounds"].softmax(0)
        bounds = list(share.cumsum(0) - share[0])
        bounds[0] = None
    x = tensors["model.embeddings.weight"][ids]
    for n in range(LAYERS):
        prefix = f"model.layers.{n}."
        p = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        inner = {name.removeprefix("attn."): tensor for name, tensor in p.items() if name.startswith("attn.")}
        x = x + mix(rms(x, p["attn_norm.weight"]), inner, bounds[n])
        y = rms(x, p["mlp_norm.weight"])
        x = (
            x
            + (F.silu(y @ p["mlp.gate_proj.weight"].T) * (y @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
        )
    return rms(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


@torch.no_grad()
def test_an_imported_checkpoint_of_fla_gives_what_its_tensors_say(original, tmp_path):
    tensors, _, folder = original
    out = import_checkpoint(folder, "hgrn", tmp_path / "new")
    ours = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(ours, HGRNForCausalLM)
    ids = torch.randint(3, VOCABULARY, (1, 21))
    expected = logits_of(tensors, ids[0])
    torch.testing.assert_close(ours(ids).logits[0].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.double()(ids).logits[0], expected, rtol=1e-9, atol=1e-9)
    generated = ours.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=VOCABULARY, pad_token_id=0)[0]
    # What is generated is at every place the most likely token of the formula above.
    assert torch.equal(logits_of(tensors, generated[:-1])[20:].argmax(-1), generated[21:])


def test_what_the_format_or_the_zoo_cannot_say_is_refused(original, tmp_path):
    _, extra, folder = original
    config = json.loads((folder / "config.json").read_text())
    for wrong in ({"expand_ratio": 1.5}, {"attn": {"layers": [1]}}, {"elementwise_affine": False}):
        (folder / "config.json").write_text(json.dumps(config | extra | wrong))
        with pytest.raises(RnnzooError, match=next(iter(wrong))):
            import_checkpoint(folder, "hgrn", tmp_path / "new")
    with pytest.raises(ValueError, match="hgrn_expand"):
        HGRNConfig(hidden_size=32, num_hidden_layers=1, hgrn_expand=0)


def test_bounds_start_evenly_spaced_over_the_layers():
    model = HGRNForCausalLM(HGRNConfig(vocab_size=11, hidden_size=12, num_hidden_layers=4)).model
    ctx = model.make_context(1, 1, torch.device("cpu"))
    bounds = [model.shared["hgrn"].bound(i, ctx).unique().item() for i in range(4)]
    assert bounds == pytest.approx([0, 0.25, 0.5, 0.75])
    assert "hgrn" not in HGRNForCausalLM(HGRNConfig(hidden_size=12, num_hidden_layers=1)).model.shared
