"""A converted model fine-tunes with Trainer and with PEFT."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import rnnzoo  # noqa: F401  (registers the Auto classes)

TEXT = "The quiet river crosses the old garden. The painter remembers the winter and the heavy letter. "


def train(model, tokenizer, folder, steps: int) -> list[float]:
    """Trains on one repeated text; returns the losses."""
    data = [{"input_ids": tokenizer(TEXT * repeats)["input_ids"]} for repeats in (1, 2, 1, 2)] * 10
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def model(converted):
    return AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(converted):
    return AutoTokenizer.from_pretrained(converted)


def test_trainer_lowers_the_loss_in_20_steps(model, tokenizer, tmp_path):
    losses = train(model, tokenizer, tmp_path, 20)
    assert len(losses) == 20 and sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_trainer_goes_on_from_its_own_checkpoint(model, tokenizer, tmp_path):
    data = [{"input_ids": tokenizer(TEXT)["input_ids"]}] * 8
    settings = dict(output_dir=str(tmp_path), per_device_train_batch_size=2, report_to=[], disable_tqdm=True)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    for steps in (2, 4):
        arguments = TrainingArguments(max_steps=steps, save_steps=2, use_cpu=True, **settings)
        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
        trainer.train(resume_from_checkpoint=steps > 2)
    assert trainer.state.global_step == 4


def test_lora_trains_saves_loads_and_merges(model, converted, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    train(adapted, tokenizer, tmp_path / "run", 5)
    adapted.eval().save_pretrained(tmp_path / "adapter")

    inputs = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        trained = adapted(**inputs).logits
        plain = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
        assert not torch.allclose(plain(**inputs).logits, trained, atol=1e-4)
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**inputs).logits, trained, rtol=1e-4, atol=1e-4)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, trained, rtol=1e-3, atol=1e-3)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        torch.testing.assert_close(again(**inputs).logits, trained, rtol=1e-3, atol=1e-3)


def test_query_and_key_norms_train_under_autocast():
    from rnnzoo.zoo.hedgehog.configuration_hedgehog import HedgehogConfig

    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    config = HedgehogConfig(**sizes, qk_norm=True, window_sizes=[[8, 8]])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
