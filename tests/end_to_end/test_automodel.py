"""A converted model is an ordinary model: in a fresh process it loads, generates, chats and trains as any other."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import rnnzoo  # noqa: F401  (registers the Auto classes)
from rnnzoo.zoo.core.cache import CACHE_NAME

PROMPTS = ["The quiet river crosses", "Once", "The old painter remembers the bright garden in the winter and"]


@pytest.fixture(scope="module")
def model(converted):
    return AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    tokenizer.padding_side = "left"
    return tokenizer


def test_fresh_process_gives_the_same_logits(workshop, converted, model, tokenizer):
    script = (
        "import sys, json, torch, rnnzoo\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "with torch.no_grad(): print(json.dumps(model(torch.tensor([json.loads(sys.argv[2])])).logits[0].tolist()))"
    )
    ids = tokenizer(" ".join(PROMPTS))["input_ids"]
    fresh = torch.tensor(json.loads(workshop.python(script, str(converted), json.dumps(ids)).splitlines()[-1]))
    with torch.no_grad():
        here = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(fresh, here, rtol=1e-5, atol=1e-5)


def test_model_is_recurrent_and_its_state_has_one_size(model):
    assert model.config.model_type.startswith("rnnzoo-")
    ids = torch.randint(3, 300, (1, 200))
    with torch.no_grad():
        short = model(ids[:, :150], use_cache=True)[CACHE_NAME]
        sizes = [
            short.num_bytes(),
            model(ids[:, 150:], cache=short, use_cache=True)[CACHE_NAME].num_bytes(),
        ]
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize(
    "choice", [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"do_sample": False, "num_beams": 3}]
)
def test_generate_with_left_padding_equals_each_prompt_alone(model, tokenizer, choice):
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    together = model.generate(**batch, max_new_tokens=12, **choice)
    assert together.shape[1] > batch["input_ids"].shape[1]
    if choice["do_sample"]:
        return  # the draws of a batch are not those of its rows
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, **choice)
        want = tokenizer.decode(alone[0], skip_special_tokens=True)
        assert tokenizer.decode(together[row], skip_special_tokens=True) == want


def test_sampling_is_reproducible_by_seed(model, tokenizer):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model.generate(**inputs, do_sample=True, max_new_tokens=16).tolist())
    assert draws[0] == draws[1] != draws[2]


def test_chat_template_and_pipeline_work(model, tokenizer):
    speak = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answer = speak(PROMPTS[0], max_new_tokens=5, do_sample=False)
    assert answer[0]["generated_text"].startswith(PROMPTS[0])
    chat = speak([{"role": "user", "content": "Who paints?"}], max_new_tokens=5, do_sample=False)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"


def test_generate_command_streams_and_counts(workshop, converted):
    done = workshop.rnnzoo("generate", str(converted), "Who paints?", "--greedy", "--max-new-tokens", "6", "--json")
    answer = json.loads(done.stdout)
    assert 0 < answer["new_tokens"] <= 6 and answer["prompt_tokens"] > len("Who")
    plain = workshop.rnnzoo("generate", str(converted), "The", "--raw", "--max-new-tokens", "6")
    assert plain.stdout.strip() and "tokens/s" in plain.stderr
