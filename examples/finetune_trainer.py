"""Full fine-tuning with transformers' Trainer: all parameters learn a handful of sentences.

    python examples/finetune_trainer.py [MODEL] [--steps N] [--out DIR]

Nothing here is special to a recurrent model. It is saved with its tokenizer, and AutoModelForCausalLM loads it again.
"""

from __future__ import annotations

from shared import TEXTS, arguments, complete, load
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

args = arguments(__doc__, steps=120)
model, tokenizer = load(args.model)
ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]
rows = [{"input_ids": row, "labels": row} for row in ids]

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3 if args.model is None else 5e-5,
        lr_scheduler_type="cosine",
        logging_steps=args.steps // 4 or 1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=rows,
    eval_dataset=rows,
    data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads the labels too, and keeps an end that is also the padding
    processing_class=tokenizer,
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
trainer.save_model(args.out)

again = AutoModelForCausalLM.from_pretrained(args.out).to(model.device)
answer = complete(again, tokenizer, "The fox lives in")
print(f"loss {before:.2f} -> {after:.2f}, saved in {args.out}")
print(f"The fox lives in{answer}")
