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
