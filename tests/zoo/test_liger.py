"""Liger: equal to its equations written out, and nothing in it but the teacher's attention."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.cache import RecurrentCache
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.liger.configuration_liger import LigerConfig
from rnnzoo.zoo.liger.modeling_liger import LigerForCausalLM

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 6, "initializer_range": 0.3}
TIME = 15


def model_of(**fields):
    torch.manual_seed(3)
    return LigerForCausalLM(LigerConfig(**SIZES, **fields)).double().eval()


def written_out(mixer, x, ctx, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the window and the state say, each (T, H, d)."""
    q, k, v = (part[0] for part in mixer.proj.split(x))
    turned_q, turned_k = (ctx.rotary.rotate(part[None], ctx.positions)[0] for part in (q, k))
    near, far = torch.zeros(TIME, 4, 6, dtype=torch.float64), torch.zeros(TIME, 4, 6, dtype=torch.float64)
    for h in range(4):
        state = torch.zeros(6, 6, dtype=torch.float64)
        for t in range(TIME):
            seen = slice(max(0, t - window + 1), t + 1)
            near[t, h] = torch.softmax(turned_k[seen, h // 2] @ turned_q[t, h] / 6**0.5, 0) @ v[seen, h // 2]
            forget = torch.sigmoid(k[t, h // 2]) ** (1 / 16)
            state = forget[:, None] * state + torch.softmax(k[t, h // 2], 0)[:, None] * v[t, h // 2]
            far[t, h] = torch.softmax(q[t, h], 0) @ state
    return near, far


@torch.no_grad()
def test_a_layer_is_its_equations_and_its_branches_are_their_parts():
    model = model_of(liger_window=4).model
    mixer, x = model.layers[0].mixer, torch.randn(1, TIME, 24, dtype=torch.float64)
    ctx = model.make_context(1, TIME, x.device)
    near, far = written_out(mixer, x, ctx, 4)

    def output(o):
        return o.flatten(1) @ mixer.proj.o_proj.weight.T

    def check(expected):
        torch.testing.assert_close(mixer(x, None, ctx)[0][0], expected, rtol=1e-9, atol=1e-9)

    check(output((near + far) / 2))
    with mixer.only("window"):
        check(output(near))
    with mixer.only("linear"):
        check(output(far))
    check(output((near + far) / 2))
    with pytest.raises(RnnzooError, match="no branch 'sinks'"), mixer.only("sinks"):
        pass


@torch.no_grad()
def test_the_window_stays_while_decoding_and_the_state_does_not_grow():
    model, ids = model_of(liger_window=5), torch.randint(0, 61, (2, 40))
    cache, sizes, parts = RecurrentCache(model.config), set(), []
    for part in ids.split([9, 1, 1, 1, 20, *[1] * 8], 1):
        parts.append(model(part, cache=cache).logits)
        sizes.add(cache.num_bytes())
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-9, atol=1e-9)
    rings, states, counts = 2 * 5 * 2 * 6 * 8, 2 * 6 * 6 * 8, 8
    assert sizes == {2 * 2 * (rings + states + counts)}  # two layers, two rows


@torch.no_grad()
def test_all_of_the_teachers_attention_is_taken_and_nothing_else_is_there():
    mixer = model_of().model.layers[0].mixer
    shapes = {"q": (24, 24), "k": (12, 24), "v": (12, 24), "o": (24, 24)}
    made = {name: torch.randn(*shape) for name, shape in shapes.items()}
    mixer.init_from_attention(AttentionWeights(**made, num_heads=4, num_kv_heads=2, head_dim=6))
    ours = mixer.state_dict()
    assert set(ours) == {f"proj.{name}_proj.weight" for name in made}
    assert all(torch.equal(ours[f"proj.{name}_proj.weight"], x.double()) for name, x in made.items())
    assert mixer.lengths == (64, 64) and mixer.config.liger_gate_divisor == 16


@pytest.mark.parametrize("field", ["liger_window", "liger_gate_divisor"])
def test_wrong_fields_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be positive, got 0"):
        LigerConfig(**SIZES, **{field: 0 if field == "liger_window" else 0.0})
