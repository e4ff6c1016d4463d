"""LoRA with PEFT on a hybrid: Mamba-2 layers with one layer of attention among them.

    python examples/lora_hybrid.py [MODEL] [--steps N] [--out DIR]

Adapters on the projections of recurrent layers work as those on attention do: they are saved apart, load onto the
model, and can be merged into it, so that decoding costs nothing more.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shared import TEXTS, arguments, complete, load
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

args = arguments(__doc__, steps=100)
layer_types = ("mamba2", "mamba2", "full_attention", "mamba2")
model, tokenizer = load(args.model, layer_types)
adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
adapted.print_trainable_parameters()

ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]
rows = [{"input_ids": row, "labels": row} for row in ids]
trainer = Trainer(
    model=adapted,
    args=TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-2 if args.model is None else 2e-4,
        logging_steps=args.steps // 4 or 1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=rows,
    eval_dataset=rows,
    data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads the labels too, and keeps an end that is also the padding
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
adapted.save_pretrained(args.out)  # the adapter alone

base, _ = load(args.model, layer_types)
merged = PeftModel.from_pretrained(base, args.out).merge_and_unload().to(adapted.device).eval()
with torch.no_grad():
    batch = {name: value.to(adapted.device) for name, value in trainer.data_collator(rows[:2]).items()}
    difference = (merged(**batch).logits - adapted.eval()(**batch).logits).abs().max().item()
print(f"loss {before:.2f} -> {after:.2f}; merged and adapted logits differ by {difference:.1e}; adapter in {args.out}")
print(f"The owl lives in{complete(merged, tokenizer, 'The owl lives in')}")
