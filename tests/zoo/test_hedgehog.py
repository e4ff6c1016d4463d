"""Hedgehog layers against their formulas, written out densely."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.core.cache import RecurrentCache
from rnnzoo.zoo.core.configuration import RecurrentConfig
from rnnzoo.zoo.core.heads import RecurrentForCausalLM
from rnnzoo.zoo.core.rotary import Rotary, RotaryFrequencies
from rnnzoo.zoo.core.sizes import state_bytes
from rnnzoo.zoo.hedgehog.configuration_hedgehog import HedgehogConfig
from rnnzoo.zoo.hedgehog.modeling_hedgehog import HedgehogForCausalLM, HedgehogMixer

SHORT = {"original_max_position_embeddings": 16}
LONGROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0}
ROPES = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, **SHORT},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SHORT},
    "longrope": {**LONGROPE, **SHORT},
}


def rope(name: str) -> dict:
    return {"rope_type": "default" if name == "partial" else name, "rope_theta": 100.0, **ROPES[name]}


def config_of(**changes) -> HedgehogConfig:
    """Width 24, 4 heads of 8 over 2 kv heads, 1 layer."""
    sizes = dict(vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    return HedgehogConfig(**(sizes | dict(head_dim=8, initializer_range=0.3, intermediate_size=32) | changes))


def model_of(seed: int = 0, **changes) -> HedgehogForCausalLM:
    """Random in every parameter of its mixers, float64."""
    torch.manual_seed(seed)
    model = HedgehogForCausalLM(config_of(**changes)).double().eval()
    for block in model.model.layers:
        for name, parameter in block.mixer.named_parameters():
            if ".proj." not in f".{name}":
                parameter.data += 0.3 * torch.randn_like(parameter)
        block.mixer.log_decay.data = -0.05 * torch.rand_like(block.mixer.log_decay)
    return model


def dense(mixer: HedgehogMixer, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """The layer's output (B, T, D) with all T x T weights; query and key heads one by one."""
    time = hidden.shape[1]
    config, positions = mixer.config, torch.arange(time)[None]
    q, k, v = mixer.proj.split(hidden)
    turned_q, turned_k = rotary.rotate(q, positions), rotary.rotate(k, positions)
    sink_q = rotary.rotate(q, positions.clamp(max=config.sink_distance))
    distance = torch.arange(time)[:, None] - torch.arange(time)[None]
    is_sink = (torch.arange(time) < config.num_sinks)[None].expand(time, -1)
    groups = q.shape[2] // k.shape[2]
    outputs = []
    for head in range(q.shape[2]):
        kv = head // groups
        window = mixer.lengths[kv]
        scale = q.shape[-1] ** -0.5
        scores = torch.einsum("btd,bsd->bts", turned_q[:, :, head], turned_k[:, :, kv]) * scale
        to_sinks = torch.einsum("btd,bsd->bts", sink_q[:, :, head], turned_k[:, :, kv]) * scale
        scores = torch.where(is_sink, to_sinks, scores)
        exact = (distance >= 0) & ((distance < window) | is_sink)
        far = (distance >= window) & ~is_sink
        if mixer.prototypes:
            phi_q = (q[:, :, head] @ mixer.query_map[head] + mixer.query_bias[head]).softmax(-1)
            phi_q = phi_q * mixer.log_scale[head].exp()
            phi_k = (k[:, :, kv] @ mixer.key_map[kv]).exp()
            weights = torch.where(exact, scores.exp(), 0.0)
        else:
            x, y = turned_q[:, :, head] @ mixer.query_map[head], turned_k[:, :, kv] @ mixer.key_map[kv]
            phi_q, phi_k = (torch.cat([z.softmax(-1), (-z).softmax(-1)], -1) for z in (x, y))
            largest = scores.masked_fill(~exact, -torch.inf).amax(-1, keepdim=True)
            weights = torch.where(exact, (scores - largest).exp(), 0.0) * mixer.log_factor[head].exp()
        linear = torch.einsum("btf,bsf->bts", phi_q, phi_k) * far
        decay = (mixer.log_decay[kv].clamp(max=0) * (distance - window).clamp(min=0)).exp()
        weights = weights + linear * decay
        outputs.append(weights @ v[:, :, kv] / weights.sum(-1, keepdim=True))
    return mixer.proj.o_proj(torch.stack(outputs, 2).flatten(-2))


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("feature_map", ["softmax", "prototype"])
@torch.no_grad()
def test_a_layer_is_its_formula(feature_map, name):
    changes = {"window_sizes": [[3, 7]], "num_sinks": 2, "feature_width": 4, "rope_parameters": rope(name)}
    model = model_of(feature_map=feature_map, max_position_embeddings=64, sink_distance=10, **changes)
    mixer, hidden = model.model.layers[0].mixer, torch.randn(2, 30, 24, dtype=torch.float64)
    ctx = model.model.make_context(2, 30, hidden.device)
    torch.testing.assert_close(mixer(hidden, None, ctx)[0], dense(mixer, hidden, ctx.rotary), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_softmax_features_are_those_of_lolcats():
    """Zhang et al. 2024: o = (gamma sum_window e^(s - max) v + phi(q) sum_before phi(k) v) / (the same of ones)."""
    model = model_of(feature_map="softmax", window_size=5, num_sinks=0, feature_width=16)
    mixer, hidden = model.model.layers[0].mixer, torch.randn(1, 25, 24, dtype=torch.float64)
    mixer.log_decay.zero_()
    ctx = model.model.make_context(1, 25, hidden.device)
    q, k, v = (x[0] for x in mixer.proj.split(hidden))
    q, k = (ctx.rotary.rotate(x[None], ctx.positions)[0] for x in (q, k))

    def phi(x, weight):
        return torch.cat([(x @ weight).softmax(-1), (-(x @ weight)).softmax(-1)], -1)

    expected = torch.zeros(25, 4, 8, dtype=torch.float64)
    for head in range(4):
        gamma = mixer.log_factor[head].exp()
        for t in range(25):
            near, before = slice(max(0, t - 4), t + 1), slice(0, max(0, t - 4))
            scores = k[near, head // 2] @ q[t, head] / 8**0.5
            near_weights = gamma * (scores - scores.max()).exp()
            far_weights = phi(k[before, head // 2], mixer.key_map[head // 2]) @ phi(q[t, head], mixer.query_map[head])
            top = near_weights @ v[near, head // 2] + far_weights @ v[before, head // 2]
            expected[t, head] = top / (near_weights.sum() + far_weights.sum())
    expected = mixer.proj.o_proj(expected.flatten(-2))
    torch.testing.assert_close(mixer(hidden, None, ctx)[0][0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("longest", [12, 50])
def test_unrotate_is_the_inverse_of_rotate(name, longest):
    config = RecurrentConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        rope_parameters=rope(name),
    )
    positions = torch.randint(0, longest, (2, 9))
    positions[0, 0] = longest - 1
    rotary = Rotary(RotaryFrequencies(config), positions)
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(rotary.unrotate(rotary.rotate(x, positions), positions), x, rtol=1e-9, atol=1e-9)
    some = positions[:, :4]  # other positions of the same call, as those of a ring are
    torch.testing.assert_close(rotary.unrotate(rotary.rotate(x[:, :4], some), some), x[:, :4], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in ROPES if name not in ("dynamic", "longrope")])
@pytest.mark.parametrize("feature_map", ["softmax", "prototype"])
@torch.no_grad()
def test_token_by_token_is_the_same_far_beyond_the_trained_positions(feature_map, name):
    changes = {"window_sizes": [[3, 5]], "num_sinks": 2, "feature_width": 4, "rope_parameters": rope(name)}
    model = model_of(feature_map=feature_map, max_position_embeddings=16, **changes)
    ids = torch.randint(0, 61, (2, 60))
    expected = model(ids).logits
    cache = RecurrentCache(model.config)
    parts = [model(part, cache=cache).logits for part in ids.split([5, *[1] * 20, 2, 33], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_sinks_stay_at_sink_distance():
    """Only sinks matter here (window 1, no features, values of all others zero): far away, nothing changes any more."""
    model = model_of(feature_map="prototype", window_size=1, num_sinks=2, feature_width=0, sink_distance=10)
    mixer = model.model.layers[0].mixer
    hidden = torch.randn(1, 2, 24, dtype=torch.float64)
    query = torch.randn(1, 1, 24, dtype=torch.float64)
    said = {}
    for time in (6, 9, 11, 12, 200):
        row = torch.cat([hidden, query.expand(-1, time, -1)], 1)
        ctx = model.model.make_context(1, time + 2, row.device)
        said[time + 1] = mixer(row, None, ctx)[0][:, -1]  # by the position of the last token
    assert not torch.allclose(said[7], said[10], atol=1e-4)
    torch.testing.assert_close(said[12], said[13], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(said[12], said[201], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(said[10], said[12], rtol=1e-9, atol=1e-9)


def test_the_default_sink_distance_is_the_longest_trained_position():
    assert config_of(max_position_embeddings=77).sink_distance == 77


@torch.no_grad()
def test_without_features_it_is_a_window_with_sinks():
    model = model_of(feature_map="prototype", window_size=6, num_sinks=0, feature_width=0)
    ids = torch.randint(0, 61, (1, 30))
    fields = model.config.to_dict() | {"layer_types": ["sliding_attention"], "sliding_window": 6}
    names = ("model_type", "architectures", "transformers_version", "dtype")
    sliding = RecurrentForCausalLM(RecurrentConfig(**{k: v for k, v in fields.items() if k not in names})).double()
    sliding.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(ids).logits, sliding.eval()(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("branch", ["window", "linear"])
@pytest.mark.parametrize("feature_map", ["softmax", "prototype"])
@torch.no_grad()
def test_one_branch_alone_is_a_model_that_has_no_other(feature_map, branch):
    """At once and token by token; and afterwards the mixer is whole again."""
    changes = {"window_sizes": [[3, 7]], "num_sinks": 2, "feature_width": 4, "feature_map": feature_map}
    model, ids = model_of(**changes), torch.randint(0, 61, (2, 20))
    mixer, whole = model.model.layers[0].mixer, model(ids).logits
    changes |= {"feature_width": 0} if branch == "window" else {"window_sizes": [[1, 1]], "num_sinks": 0}
    alone = HedgehogForCausalLM(config_of(**changes)).double().eval()
    maps = ("query_map", "key_map", "query_bias") if branch == "window" else ()
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(maps or "\0")}
    alone.load_state_dict(own, strict=False)
    expected = alone(ids).logits
    with mixer.only(branch):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)
        cache, steps = RecurrentCache(model.config), []
        for token in ids.split(1, 1):
            steps.append(model(token, cache=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, whole)
    assert torch.equal(model(ids).logits, whole)


def test_an_unknown_branch_is_refused():
    model = model_of(window_size=3, num_sinks=0, feature_width=4)
    with (
        pytest.raises(RnnzooError, match="no branch 'both'; it has window, linear"),
        model.model.layers[0].mixer.only("both"),
    ):
        pass


@pytest.mark.parametrize("feature_map", ["softmax", "prototype"])
def test_every_parameter_has_a_gradient(feature_map):
    model = model_of(feature_map=feature_map, window_size=4, num_sinks=1, feature_width=4).train()
    model(torch.randint(0, 61, (2, 20)), labels=torch.randint(0, 61, (2, 20))).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


@torch.no_grad()
def test_large_activations_stay_finite():
    model = model_of(feature_map="prototype", window_size=4, num_sinks=1, feature_width=4)
    mixer = model.model.layers[0].mixer
    for parameter in (mixer.proj.q_proj.weight, mixer.proj.k_proj.weight):
        parameter *= 100
    assert bool(model.float()(torch.randint(0, 61, (1, 300))).logits.isfinite().all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_map": "exp"}, "feature_map must be"),
        ({"feature_map": "softmax", "feature_width": 5}, "feature_width must be even"),
        ({"window_sizes": [[1, 1], [1, 1]]}, "window_sizes has 2 entries"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


@pytest.mark.parametrize("feature_map", ["prototype", "softmax"])
@pytest.mark.parametrize("bits", [None, [8, 4]])
def test_layers_of_different_feature_widths_decode_as_they_read(feature_map, bits):
    """A layer without features among them; the cache has as many bytes as the sizes say."""
    changes = {"num_hidden_layers": 3, "window_sizes": [[3, 5], [1, 2], [4, 4]], "feature_widths": [0, 6, 2]}
    model = model_of(feature_map=feature_map, ring_bits=bits, **changes)
    model = model if bits is None else model.float()
    assert [block.mixer.key_map.shape[-1] for block in model.model.layers] == (
        [0, 6, 2] if feature_map == "prototype" else [0, 3, 1]
    )
    ids, cache, steps = torch.randint(0, 61, (2, 30)), RecurrentCache(model.config), []
    with torch.no_grad():
        whole = model(ids).logits
        for token in ids.split(1, 1):
            steps.append(model(token, cache=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert 2 * state_bytes(model.config, model.dtype) == sum(state.num_bytes() for state in cache.states)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_widths": [4, 4]}, "feature_widths has 2 entries"),
        ({"feature_widths": [-2]}, "0 or more"),
        ({"feature_widths": [3], "feature_map": "softmax"}, "must be even"),
    ],
)
def test_feature_widths_that_cannot_be_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        config_of(**changes)


def test_it_starts_as_lolcats_does():
    """Identity maps, s(w) = 0.1 in every head, no decay; and the teacher's attention."""
    config = HedgehogConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, window_factor=0.1, initial_log_decay=0.0, num_sinks=0
    )
    mixer = HedgehogForCausalLM(config).model.layers[0].mixer
    width = config.head_dim
    for feature_map in (mixer.query_map, mixer.key_map):
        assert torch.equal(feature_map, torch.eye(width).expand_as(feature_map))
    torch.testing.assert_close(mixer.log_factor.exp(), torch.full((config.num_attention_heads,), 0.1))
    assert not mixer.log_decay.any()
    with pytest.raises(ValueError, match="window_factor must be positive, got 0"):
        HedgehogConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, window_factor=0.0)
    with pytest.raises(ValueError, match="initial_log_decay must be 0 or less, got 1"):
        HedgehogConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, initial_log_decay=1.0)
