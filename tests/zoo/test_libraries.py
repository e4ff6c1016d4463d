"""The libraries around transformers' models work on ours: pipeline and chat, Trainer, PEFT, collators, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from rnnzoo.zoo.core.cache import CACHE_NAME
from rnnzoo.zoo.core.registry import architectures, config_class

from ..conversions.tiny import tiny_tokenizer
from ..families import often

TOKENIZER = tiny_tokenizer()


@pytest.fixture(params=architectures())
def model(request):
    return small(request.param)


@pytest.fixture(params=often(architectures()))
def trained(request):
    """The same for tests that take seconds: one of each family, the others are slow."""
    return small(request.param)


def small(architecture: str):
    torch.manual_seed(0)
    config = config_class(architecture)(
        vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rows(count: int = 16, time: int = 12) -> list[dict]:
    ids = torch.randint(3, 60, (count, time), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def test_text_and_chat_pipelines_answer_like_generate(model):
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=TOKENIZER)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    prompts = ["the sea", "it was the best of times"]
    batched = pipe(prompts, batch_size=2, return_full_text=False, **arguments)
    for prompt, answer in zip(prompts, batched, strict=True):
        ids = TOKENIZER(prompt, return_tensors="pt").input_ids
        tokens = model.generate(ids, **arguments)[0, ids.shape[1] :]
        assert answer[0]["generated_text"] == TOKENIZER.decode(tokens, skip_special_tokens=True)
    chat = [{"role": "user", "content": "who goes there"}]
    assert pipe(chat, **arguments)[0]["generated_text"][-1]["role"] == "assistant"


def train(model, folder, **arguments) -> transformers.Trainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": 20,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
    }
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**(settings | arguments)),
        train_dataset=rows(),
        eval_dataset=rows(4),
        data_collator=transformers.DataCollatorForSeq2Seq(TOKENIZER),
    )
    trainer.train()
    return trainer


def test_twenty_steps_of_trainer_lower_the_loss(trained, tmp_path):
    before = trained(**_batch()).loss.item()
    trainer = train(trained, tmp_path, per_device_train_batch_size=8, gradient_checkpointing=True, bf16=True)
    assert trainer.evaluate()["eval_loss"] < before - 0.3


def _batch() -> dict:
    return transformers.DataCollatorForSeq2Seq(TOKENIZER)(rows(4))


def test_gradient_accumulation_is_exact(trained, tmp_path):
    other = copy.deepcopy(trained)
    fixed = {
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    train(trained, tmp_path, per_device_train_batch_size=16, **fixed)
    train(other, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, **fixed)
    for a, b in zip(trained.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_packing_by_the_flattening_collator_gives_the_loss_of_separate_rows(model):
    data = [{"input_ids": r["input_ids"][:n]} for r, n in zip(rows(3), (5, 12, 8), strict=True)]
    separate = [model(torch.tensor([d["input_ids"]]), labels=torch.tensor([d["input_ids"]])) for d in data]
    total = sum(out.loss * (out.logits.shape[1] - 1) for out in separate) / (4 + 11 + 7)
    for extra in ({}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True}):
        batch = transformers.DataCollatorWithFlattening(return_tensors="pt", **extra)(data)
        if "cu_seq_lens_q" in batch:
            batch.pop("position_ids")
        torch.testing.assert_close(model(**batch).loss, total)


def test_lora_trains_saves_loads_and_merges(trained, tmp_path):
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(trained)
    adapted = peft.get_peft_model(trained, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = train(adapted, tmp_path, per_device_train_batch_size=8, gradient_checkpointing=True)
    assert trainer.evaluate()["eval_loss"] < base(**_batch()).loss.item()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    ids = _batch()["input_ids"]
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(merged.generate(ids, **arguments), adapted.generate(input_ids=ids, **arguments))


def test_training_under_autocast_gives_finite_gradients(model, columns):
    model.train()
    batch = _batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, **columns(model, batch["input_ids"])).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_a_copied_cache_continues_on_its_own(model):
    ids = _batch()["input_ids"]
    cache = model(ids, use_cache=True)[CACHE_NAME]
    other, more = copy.deepcopy(cache), ids[:, :3]
    expected = model(more, cache=cache).logits
    torch.testing.assert_close(model(more, cache=other).logits, expected)
