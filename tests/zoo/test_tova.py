"""TOVA: the policy of the paper, token by token, and full attention as long as nothing has been dropped."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.zoo.core.cache import RecurrentCache
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.tova import modeling_tova
from rnnzoo.zoo.tova.configuration_tova import TovaConfig
from rnnzoo.zoo.tova.modeling_tova import TovaForCausalLM

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 6, "initializer_range": 0.3}
TIME = 23


def model_of(states: int, **fields):
    torch.manual_seed(1)
    return TovaForCausalLM(TovaConfig(**SIZES, tova_states=states, **fields)).double().eval()


def ids(length: int = TIME) -> torch.Tensor:
    return torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("states", [1, 2, 5])
@torch.no_grad()
def test_the_policy_is_the_papers(states):
    model = model_of(states).model
    mixer, x = model.layers[0].mixer, torch.randn(1, TIME, 24, dtype=torch.float64)
    ctx = model.make_context(1, TIME, x.device)
    q, k, v = mixer.proj.split(x)
    q, k = ctx.rotary.rotate(q, ctx.positions)[0], ctx.rotary.rotate(k, ctx.positions)[0]
    cache, outputs, dropped = [], [], []
    for t in range(TIME):
        cache = [*cache, t]
        weights = [torch.softmax(q[t, h] @ k[cache, h // 2].T / 6**0.5, 0) for h in range(4)]
        outputs.append(torch.cat([w @ v[0, cache, h // 2] for h, w in enumerate(weights)]))
        if len(cache) > states:
            least = int(torch.stack(weights).mean(0).argmin())
            dropped.append(cache.pop(least))
    assert dropped != sorted(dropped)  # no sliding window
    expected = torch.stack(outputs) @ mixer.proj.o_proj.weight.T
    torch.testing.assert_close(mixer(x, None, ctx)[0][0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("states", [TIME, TIME + 1, 512])
@torch.no_grad()
def test_until_it_is_full_it_is_full_attention(states):
    model, full = model_of(states), model_of(states, layer_types=["full_attention"] * 2)
    full.load_state_dict(model.state_dict())
    expected = full(ids()).logits
    torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-9, atol=1e-9)
    cache = RecurrentCache(model.config)
    parts = [model(part, cache=cache).logits for part in ids().split([7, 1, 1, 14], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_pieces_of_any_length_give_the_same(monkeypatch):
    model, mask = model_of(4), torch.ones(2, TIME, dtype=torch.long)
    mask[0, [0, 7, 8]] = mask[1, 15:18] = 0
    documents = torch.tensor([[0] * 9 + [1] * 14, [0] * 4 + [1] * 2 + [2] * 17])
    whole = model(ids(), attention_mask=mask, seq_ids=documents).logits
    for piece in (1, 2, 5):
        monkeypatch.setattr(modeling_tova, "PIECE", piece)
        cut = model(ids(), attention_mask=mask, seq_ids=documents).logits
        torch.testing.assert_close(cut[mask.bool()], whole[mask.bool()], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_bytes_stay_the_same_at_any_length():
    model = model_of(6)
    cache, sizes = RecurrentCache(model.config), set()
    for length in (3, 1, 1, 9, 1, 40, 1):
        model(ids(length), cache=cache)
        sizes.add(cache.num_bytes())
    assert sizes == {2 * 2 * 7 * (2 * 2 * 6 * 8 + 1)}  # layers, rows, states and one to spare; k and v, and a flag
    assert all(state.kept.sum(1).tolist() == [6, 6] for state in cache.states)


def test_gradients_pass_through_what_was_kept():
    model = model_of(3)
    x = torch.randn(1, TIME, 24, dtype=torch.float64, requires_grad=True)
    mixer, ctx = model.model.layers[0].mixer, model.model.make_context(1, TIME, x.device)
    mixer(x, None, ctx)[0][0, -1].sum().backward()
    assert int((x.grad[0].abs().sum(-1) > 0).sum()) == 4  # three from the cache, and itself
    assert torch.autograd.gradcheck(lambda x: mixer(x, None, ctx)[0], (x.detach().requires_grad_(),))


@torch.no_grad()
def test_all_of_the_teachers_attention_is_taken_and_nothing_else_is_there():
    mixer = model_of(3).model.layers[0].mixer
    made = {
        name: torch.randn(*size) for name, size in zip("qkvo", ((24, 24), (12, 24), (12, 24), (24, 24)), strict=True)
    }
    mixer.init_from_attention(AttentionWeights(**made, num_heads=4, num_kv_heads=2, head_dim=6))
    ours = mixer.state_dict()
    assert set(ours) == {f"proj.{name}_proj.weight" for name in made}
    assert all(torch.equal(ours[f"proj.{name}_proj.weight"], x.double()) for name, x in made.items())


def test_no_states_are_refused():
    with pytest.raises(ValueError, match="tova_states must be at least 1, got 0"):
        TovaConfig(**SIZES, tova_states=0)
