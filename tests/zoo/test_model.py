"""The generic model around the mixers: loading, training, losses, heads, configuration."""

from __future__ import annotations

import pytest
import torch
import transformers

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.zoo.core.cache import CACHE_NAME
from rnnzoo.zoo.core.configuration import RecurrentConfig
from rnnzoo.zoo.core.heads import RecurrentForCausalLM, RecurrentForSequenceClassification
from rnnzoo.zoo.core.model import RecurrentModel
from rnnzoo.zoo.core.registry import architectures, config_class, mixer_class

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
LABELS = IDS.masked_fill(torch.arange(9) < 2, -100)


@pytest.fixture(params=architectures())
def architecture(request) -> type[RecurrentConfig]:
    return config_class(request.param)


def small(config_type: type[RecurrentConfig], **fields) -> RecurrentConfig:
    return config_type(vocab_size=61, hidden_size=32, num_hidden_layers=2, **fields)


# Loading and saving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_by_the_auto_classes_it_gives_the_same_logits(architecture, tied, tmp_path):
    config = small(architecture, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(IDS).logits, expected)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_a_hybrid_of_several_architectures_keeps_their_options_through_a_file(architecture, tmp_path):
    config = small(architecture, layer_types=["mamba2", "supra"], ssm_state_size=4, num_labels=3)
    assert config.ssm_num_heads * config.ssm_head_dim == 64
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.ssm_state_size == 4 and loaded.config.num_labels == 3
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_loading_leaves_no_parameter_at_its_random_start(architecture, tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(small(architecture))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded[name], parameter), name


def test_modules_initialise_themselves_even_without_parameters_of_their_own(make_model):
    model = make_model(("supra",), norm_type="rms_offset")
    assert all(layer.mixer.phi.bias.any() for layer in model.model.layers)  # the core alone would leave zeros
    assert not model.model.norm.weight.any()


def test_a_bfloat16_copy_is_close(architecture):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(small(architecture)).eval()
    expected = model(IDS).logits
    torch.testing.assert_close(model.bfloat16()(IDS).logits.float(), expected, rtol=0.1, atol=0.1)


# Configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [9, 32, 100, 192, 576])
def test_three_sizes_make_a_model(architecture, width):
    config = architecture(vocab_size=7, hidden_size=width, num_hidden_layers=1)
    assert config.num_attention_heads % config.num_key_value_heads == 0
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["supra", "quantum"]}, "quantum"),
        ({"layer_types": ["supra"]}, "1 entries"),
        ({"layer_types": ["supra", "sliding_attention"]}, "sliding_window"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple"),
        ({"norm_type": "batch"}, "norm_type"),
        ({"mlp_type": "kan"}, "mlp_type"),
        ({"hidden_size": "large"}, "hidden_size"),
    ],
)
def test_a_wrong_configuration_is_refused_and_named(fields, message):
    with pytest.raises(Exception, match=message):
        RecurrentConfig(**({"vocab_size": 7, "hidden_size": 32, "num_hidden_layers": 2} | fields))


def test_an_unknown_mixer_is_refused_with_the_known_ones():
    with pytest.raises(RnnzooError, match="quantum.*full_attention.*mamba2.*supra"):
        mixer_class("quantum")


def test_a_teachers_rope_parameters_are_not_written_to():
    shared = {"rope_theta": 100.0}
    RecurrentConfig(hidden_size=32, num_hidden_layers=1, rope_parameters=shared)
    assert shared == {"rope_theta": 100.0}


# Training ------------------------------------------------------------------------------------------------------------


# A linear state of width 0 has nothing to map, decay or scale.
IDLE = {"hedgehog:widths": ("query_map", "key_map", "query_bias", "log_decay", "log_scale")}


def test_gradients_reach_every_parameter(stack, make_model, columns):
    model = make_model(stack).train()
    model(IDS, labels=LABELS, **columns(model, IDS)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        idle = name.removeprefix("model.layers.0.mixer.") in IDLE.get(stack[0], ())
        assert parameter.grad.isfinite().all() and (parameter.grad.abs().sum() > 0) != idle, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(stack, make_model, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = make_model(stack).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=LABELS).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_gradient_checkpointing_with_states_passed_between_chunks_changes_no_gradient(stack, make_model):
    grads = []
    for checkpointing in (False, True):
        model = make_model(stack).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        first = model(IDS, use_cache=True)
        model(IDS, labels=LABELS, cache=first[CACHE_NAME]).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("count", [None, 5, torch.tensor(5)])
def test_the_fused_loss_equals_the_plain_one_and_makes_no_logits(make_model, count):
    model = make_model(("supra",)).train()
    extra = {} if count is None else {"num_items_in_batch": count}
    fused = model(IDS, labels=LABELS, **extra)
    model.config.fused_loss = False
    plain = model(IDS, labels=LABELS, **extra)
    assert fused.logits is None and plain.logits is not None
    torch.testing.assert_close(fused.loss.float(), plain.loss)  # transformers computes it in float32
    fused_grads, plain_grads = (torch.autograd.grad(out.loss, list(model.parameters())) for out in (fused, plain))
    for a, b in zip(fused_grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
    model.config.fused_loss = True
    torch.testing.assert_close(model(IDS, labels=LABELS, shift_labels=shifted, **extra).loss, fused.loss)


def test_evaluation_returns_loss_and_logits(make_model):
    model = make_model(("supra",))
    out = model(IDS, labels=LABELS)
    assert out.logits.shape == (2, 9, 61)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_replaced_head_or_loss_is_not_passed_by(make_model):
    model = make_model(("supra",)).train()
    model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 7
    assert model(IDS, labels=LABELS).loss == 7
    model = make_model(("supra",)).train()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert model(IDS, labels=LABELS).logits is not None


def test_training_makes_no_cache_unless_asked(make_model):
    model = make_model(("supra",)).train()
    assert CACHE_NAME not in model(IDS)
    assert CACHE_NAME in model(IDS, use_cache=True)
    assert CACHE_NAME in model.eval()(IDS)


def test_detached_states_stop_the_gradient(make_model):
    model = make_model(("mamba2", "supra")).train()
    cache = model(IDS, use_cache=True)[CACHE_NAME]
    assert any(t.requires_grad for s in cache.states for t in s.tensors())
    assert not any(t.requires_grad for s in cache.detach().states for t in s.tensors())


# Calling -------------------------------------------------------------------------------------------------------------


def test_logits_to_keep_keeps_the_last(make_model):
    model = make_model(("supra",))
    whole = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])


def test_hidden_states_are_the_block_inputs_and_the_normed_output(make_model):
    model = make_model(("supra", "mamba2"))
    out = model.model(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(IDS))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 3
    assert model(IDS).hidden_states is None


def test_tuples_are_returned_on_request(make_model):
    model = make_model(("supra",))
    assert torch.equal(model(IDS, return_dict=False)[0], model(IDS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_grow(make_model, tied):
    model = make_model(("supra",), tie_word_embeddings=tied)
    before = model(IDS).logits.detach()
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    torch.testing.assert_close(model(IDS).logits[..., :61], before)
    model.train()(IDS, labels=LABELS).loss.backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, RnnzooError, "either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 9, 9)}, ShapeError, r"\(2, 1, 9, 9\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 8)}, ShapeError, r"\(2, 8\)"),
        ({"input_ids": IDS, "seq_ids": torch.ones(9)}, ShapeError, "seq_ids"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make_model, arguments, error, message):
    with pytest.raises(error, match=message):
        make_model(("supra",))(**arguments)


@pytest.mark.parametrize("hook", ["before", "behind", "in place of forward"])
def test_a_hook_on_the_head_is_called_in_training_too(make_model, hook):
    model, called = make_model(("gla",)).train(), []
    head = model.lm_head
    if hook == "in place of forward":  # as accelerate puts them
        original = head.forward
        head.forward = lambda x: called.append(x) or original(x)
    else:
        register = head.register_forward_pre_hook if hook == "before" else head.register_forward_hook
        register(lambda module, *given: called.append(given))
    out = model(IDS, labels=LABELS)
    assert len(called) == 1 and out.loss.isfinite()


# Classification ------------------------------------------------------------------------------------------------------


def test_classification_pools_the_last_token_whatever_the_padding(stack, make_config):
    torch.manual_seed(0)
    config = make_config(stack, num_labels=3)
    model = RecurrentForSequenceClassification(config).double().eval()
    alone = torch.cat([model(IDS[:1, :5]).logits, model(IDS[1:]).logits])
    for side in ((4, 0), (0, 4)):
        ids = torch.stack([torch.nn.functional.pad(IDS[0, :5], side, value=2), IDS[1]])
        mask = torch.stack([torch.nn.functional.pad(torch.ones(5, dtype=torch.long), side), torch.ones(9).long()])
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone)
    with pytest.raises(RnnzooError, match="pad_token_id"):
        model(IDS)
    model.config.pad_token_id = 2
    for side in ((4, 0), (0, 4), (1, 3)):
        padded = torch.stack([torch.nn.functional.pad(IDS[0, :5], side, value=2), IDS[1]])
        torch.testing.assert_close(model(padded).logits, alone)
    model.config.bos_token_id = 2
    begun = torch.nn.functional.pad(IDS[:1, :5], (1, 0), value=2)  # by the token that pads, too
    mask = torch.ones_like(begun)
    torch.testing.assert_close(model(begun).logits, model(begun, attention_mask=mask).logits)
    with pytest.raises(RnnzooError, match="attention_mask"):
        model(torch.nn.functional.pad(IDS[:1, :5], (2, 0), value=2))
    out = model.train()(IDS, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2])))


def test_a_classifier_starts_from_a_language_model_on_disk(architecture, tmp_path):
    transformers.AutoModelForCausalLM.from_config(small(architecture)).save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert model(IDS[:1]).logits.shape == (1, 5)
    base = RecurrentModel.from_pretrained(tmp_path, config=model.config)
    assert torch.equal(base.embed_tokens.weight, model.model.embed_tokens.weight)


# Running one layer alone, as alignment does --------------------------------------------------------------------------


@torch.no_grad()
def test_layers_run_one_by_one_give_the_models_output(stack, make_model):
    model = make_model(stack).model
    seq_ids = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2]).expand(2, -1)
    ctx = model.make_context(2, 9, IDS.device, seq_ids=seq_ids)
    hidden, carried = model.embed_tokens(IDS), None
    for layer in model.layers:
        hidden, state, carried = layer(hidden, None, ctx, carried)
        assert state is None
    torch.testing.assert_close(model.norm(hidden), model(IDS, seq_ids=seq_ids).last_hidden_state)


def test_the_generic_model_is_what_every_architecture_is(architecture):
    model = transformers.AutoModelForCausalLM.from_config(small(architecture))
    assert isinstance(model, RecurrentForCausalLM)
    assert model.config.layer_types == [architecture.mixer] * 2
    assert model.config.model_type.startswith("rnnzoo-")
