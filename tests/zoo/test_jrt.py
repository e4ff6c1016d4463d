"""JRT-RNN: prefix linear attention from all pairs of tokens, and a prefix through packing, padding and generate()."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.zoo.core.cache import CACHE_NAME, RecurrentCache
from rnnzoo.zoo.core.mixer import AttentionWeights
from rnnzoo.zoo.jrt.configuration_jrt import JRTConfig
from rnnzoo.zoo.jrt.modeling_jrt import JRTForCausalLM, JRTMixer, JRTModel

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
STACKS = [("jrt", "jrt"), ("sliding_attention", "jrt", "mamba2", "jrt")]
IDS = torch.randint(3, 61, (2, 14), generator=torch.Generator().manual_seed(1))
PREFIX = torch.arange(14).expand(2, -1) < torch.tensor([[6], [3]])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(params=STACKS, ids=lambda stack: stack[0])
def causal_lm(request, make_model):
    return make_model(request.param)


@pytest.fixture
def model(causal_lm):
    return causal_lm.model


def pairs(mixer: JRTMixer, x: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """Numerator and denominator of the paper from all pairs of tokens; x (T, D), prefix (T,) bool."""
    heads, kv_heads = mixer.config.num_attention_heads, mixer.config.num_key_value_heads

    def project(layer, count):
        return (x @ layer.weight.T).unflatten(-1, (count, -1)).repeat_interleave(heads // count, 1)

    q = project(mixer.proj.q_proj, heads)
    keys = project(mixer.proj.k_proj, kv_heads), project(mixer.encoder_k_proj, kv_heads)
    values = project(mixer.proj.v_proj, kv_heads), project(mixer.encoder_v_proj, kv_heads)
    scores = [torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5 for k in keys]
    decoder, encoder = (1 + s + s**2 / 2 for s in scores)
    decoder, encoder = decoder.tril(), encoder * prefix
    o = sum(torch.einsum("hij,jhv->ihv", a, v) for a, v in zip((decoder, encoder), values, strict=True))
    z = (decoder + encoder).sum(-1).T
    return (o / z[..., None]).flatten(1) @ mixer.proj.o_proj.weight.T


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_it_computes_the_equation_of_the_paper(kv_heads):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 6}
    model = JRTModel(JRTConfig(vocab_size=61, **sizes, num_key_value_heads=kv_heads, initializer_range=0.3)).double()
    mixer, x = model.layers[0].mixer, torch.randn(2, 14, 24, dtype=torch.float64)
    for prefix in (PREFIX, PREFIX & False):
        ctx = model.make_context(2, 14, x.device)
        ctx.prefix = prefix if prefix.any() else None
        y, _ = mixer(x, None, ctx)
        for row in range(2):
            close(y[row], pairs(mixer, x[row], prefix[row]))


@torch.no_grad()
def test_a_prefix_is_seen_whole_by_its_own_tokens_and_without_one_nothing_looks_ahead(model):
    changed = IDS.clone()
    changed[:, 2] = (IDS[:, 2] - 3 + 1) % 58 + 3  # within both rows' prefixes
    for prefix, moved in ((PREFIX, True), (None, False)):
        before, after = (model(ids, prefix_mask=prefix).last_hidden_state[:, :2] for ids in (IDS, changed))
        assert torch.equal(before, after) != moved
    close(model(IDS, prefix_mask=PREFIX & False).last_hidden_state, model(IDS).last_hidden_state)


@pytest.mark.parametrize("pieces", [[6, 8], [6, 1, 1, 4, 2], [9, 5], [6] + [1] * 8])
@torch.no_grad()
def test_whole_equals_chunks_after_the_prefix(model, pieces):
    expected = model(IDS, prefix_mask=PREFIX).last_hidden_state
    cache, outputs, start = RecurrentCache(model.config), [], 0
    for n in pieces:
        prefix = {"prefix_mask": PREFIX[:, :n]} if start == 0 else {}
        outputs.append(model(IDS[:, start : start + n], cache=cache, **prefix).last_hidden_state)
        start += n
    close(torch.cat(outputs, 1), expected)


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_packed_equals_separate_with_padding_anywhere(model, seed):
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.rand(2, 14, generator=generator) < 0.2).long().cumsum(1)
    mask = torch.rand(2, 14, generator=generator) < 0.7
    mask[:, 5] = True
    prefix = torch.rand(2, 14, generator=generator) < 0.4
    scrambled = documents.masked_fill(~mask, -1)
    packed = model(IDS, seq_ids=scrambled, attention_mask=mask, prefix_mask=prefix).last_hidden_state
    for row in range(2):
        for document in documents[row].unique():
            own = (documents[row] == document) & mask[row]
            if own.any():
                alone = model(IDS[row, own][None], prefix_mask=prefix[row, own][None]).last_hidden_state[0]
                close(packed[row, own], alone)


@torch.no_grad()
def test_a_later_document_of_a_cache_has_its_own_prefix(model):
    seq_ids = torch.tensor([0] * 5 + [1] * 9).expand(2, -1)
    prefix = PREFIX & False
    prefix[:, 5:8] = prefix[:, :2] = True
    expected = model(IDS, seq_ids=seq_ids, prefix_mask=prefix).last_hidden_state
    separate = [model(IDS[:, c], prefix_mask=prefix[:, c]).last_hidden_state for c in (slice(0, 5), slice(5, 14))]
    close(expected, torch.cat(separate, 1))
    cache, outputs = RecurrentCache(model.config), []
    for c in (slice(0, 3), slice(3, 9), slice(9, 14)):
        columns = {"seq_ids": seq_ids[:, c], "prefix_mask": prefix[:, c]}
        outputs.append(model(IDS[:, c], cache=cache, **columns).last_hidden_state)
    close(torch.cat(outputs, 1), expected)


@pytest.mark.parametrize("removed", [0, 3, 7, 14])
@torch.no_grad()
def test_tokens_taken_back_equal_tokens_never_seen_and_rows_can_be_reordered(model, removed):
    cache = RecurrentCache(model.config)
    cache.activate_past_recording()
    model(IDS[:, :9], cache=cache, prefix_mask=PREFIX[:, :9])
    model(IDS[:, 9:], cache=cache)
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    ids, prefix = IDS[[1, 0, 1]], PREFIX[[1, 0, 1]]
    cache.crop(-removed)
    kept, more = 14 - removed, torch.tensor([[7, 8, 9]] * 3)
    whole = torch.cat([ids[:, :kept], more], 1)
    prefix = torch.cat([prefix[:, :kept], torch.zeros(3, 3, dtype=torch.bool)], 1)
    expected = model(whole, prefix_mask=prefix).last_hidden_state[:, kept:]
    close(model(more, cache=cache).last_hidden_state, expected)


@torch.no_grad()
def test_a_part_of_a_prefix_cannot_be_taken_back(model):
    cache = RecurrentCache(model.config)
    cache.activate_past_recording()
    model(IDS[:, :9], cache=cache, prefix_mask=PREFIX[:, :9])
    with pytest.raises(RnnzooError, match="part of a prefix"):
        cache.crop(-5)
    assert cache.get_seq_length() == 9
    cache.crop(-9)
    close(model(IDS, cache=cache).last_hidden_state, model(IDS).last_hidden_state)


@torch.no_grad()
def recomputed(model, ids, prefix, steps):
    for _ in range(steps):
        whole = torch.nn.functional.pad(prefix, (0, ids.shape[1] - prefix.shape[1]))
        logits = model(ids, use_cache=False, prefix_mask=whole).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


def test_generate_takes_the_prompt_as_the_prefix(causal_lm):
    ids, prefix = IDS[:, :7], torch.ones(2, 7, dtype=torch.bool)
    expected = recomputed(causal_lm, ids, prefix, 8)
    assert not torch.equal(expected, causal_lm.generate(ids, **GREEDY))
    assert torch.equal(causal_lm.generate(ids, prefix_mask=prefix, **GREEDY), expected)
    assert torch.equal(causal_lm.generate(ids, prefix_mask=prefix, use_cache=False, **GREEDY), expected)
    embeds = causal_lm.get_input_embeddings()(ids)
    assert torch.equal(causal_lm.generate(inputs_embeds=embeds, prefix_mask=prefix, **GREEDY), expected[:, 7:])
    one = causal_lm.generate(ids[:1], prefix_mask=prefix[:1], prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(one, expected[:1])
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    # Of columns that are padding, the prefix mask may say anything.
    left = causal_lm.generate(padded, attention_mask=mask, prefix_mask=torch.ones_like(padded).bool(), **GREEDY)
    assert torch.equal(left[:, 3:], expected)
    beams = GREEDY | {"num_beams": 3, "prefix_mask": prefix}
    assert torch.equal(causal_lm.generate(ids, **beams), causal_lm.generate(ids, use_cache=False, **beams))
    with pytest.raises(RnnzooError, match="prefill_chunk_size"):
        causal_lm.generate(ids, prefix_mask=prefix, prefill_chunk_size=3, **GREEDY)


@torch.no_grad()
def test_a_prefix_in_pieces_is_refused_and_the_cache_left_as_it_was(model, make_model):
    cache = model(IDS[:, :3], use_cache=True, prefix_mask=PREFIX[:, :3])[CACHE_NAME]
    with pytest.raises(RnnzooError, match="whole prefix has to arrive in the call"):
        model(IDS[:, 3:], cache=cache, prefix_mask=PREFIX[:, 3:])
    with pytest.raises(ShapeError, match=r"prefix_mask has shape \(2, 14\), expected \(2, 11\)"):
        model(IDS[:, 3:], cache=cache, prefix_mask=PREFIX)
    assert cache.get_seq_length() == 3
    with pytest.raises(RnnzooError, match="No layer of this model"):
        make_model(("based",)).model(IDS, prefix_mask=PREFIX)
    cut = PREFIX & (torch.arange(14) < 3)
    close(
        model(IDS[:, 3:], cache=cache).last_hidden_state,
        model(IDS, prefix_mask=cut).last_hidden_state[:, 3:],
    )


def test_gradients_through_a_prefix_are_those_of_the_equation():
    torch.manual_seed(0)
    model = JRTForCausalLM(JRTConfig(vocab_size=61, hidden_size=24, num_hidden_layers=1)).double()
    mixer, x = model.model.layers[0].mixer, torch.randn(2, 14, 24, dtype=torch.float64)
    ctx = model.model.make_context(2, 14, x.device)
    ctx.prefix = PREFIX
    direction, parameters = torch.randn(2, 14, 24, dtype=torch.float64), list(mixer.parameters())
    ours = torch.autograd.grad((mixer(x, None, ctx)[0] * direction).sum(), parameters)
    expected = torch.stack([pairs(mixer, x[row], PREFIX[row]) for row in range(2)])
    for a, b in zip(ours, torch.autograd.grad((expected * direction).sum(), parameters), strict=True):
        close(a, b)


def test_a_student_reads_with_the_teachers_matrices_both_times():
    config = JRTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, attention_bias=True)
    mixer = JRTMixer(JRTConfig(**(config.to_diff_dict() | JRTConfig.student_fields(4, 4, 6))), 0)
    q, k, v, o = torch.randn(4, 24, 24)
    mixer.init_from_attention(AttentionWeights(q, k, v, o, 4, 4, 6, k_bias=torch.ones(24)))
    for name, matrix in zip("qkvo", (q, k, v, o), strict=True):
        assert torch.equal(getattr(mixer.proj, f"{name}_proj").weight, matrix)
    assert torch.equal(mixer.encoder_k_proj.weight, k) and torch.equal(mixer.encoder_v_proj.weight, v)
    assert mixer.encoder_k_proj.bias.eq(1).all() and not mixer.encoder_v_proj.bias.any()
