"""No document of a packed row reads another's memory: through TRL's own trainer, packing and collator."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.byte_tokenizer import byte_tokenizer
from rnnzoo.zoo.core.registry import architectures, config_class

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

HYBRID = ("mamba2", "full_attention", "gla", "sliding_attention")
STACKS = [(name,) for name in architectures()] + [HYBRID]
QUESTIONS = {
    "Who is there?": "A friend.",
    "How far is it to the sea?": "Two days on foot, or one with a horse.",
    "Why?": "Because.",
    "What does the lamp say to the night?": "Nothing that the night has not heard.",
}
BEGIN_AGAIN = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def trainer_of(stack: tuple[str, ...], folder):
    """An SFTTrainer with packing over the questions; all documents fit into one row."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    # RWKV's matrices into the residual stream start at zero, so that a new model's mixers say nothing at all.
    rwkv = {"rwkv_zero_init": False} if stack[0].startswith("rwkv") else {}
    config = config_class(stack[0])(
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=max(2, len(stack)),
        layer_types=list(stack) if len(stack) > 1 else None,
        initializer_range=0.2,
        sliding_window=8 if "sliding_attention" in stack else None,
        eos_token_id=256,
        pad_token_id=257,
        **rwkv,
    )
    rows = [{"prompt": question + " ", "completion": answer} for question, answer in QUESTIONS.items()]
    settings = {"packing": True, "max_length": 512, "per_device_train_batch_size": 1, "seed": 0}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "bf16": False, "use_cpu": True}
    return SFTTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=SFTConfig(output_dir=str(folder), **settings, **quiet),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )


def packed_batch(trainer) -> tuple[dict, list[slice]]:
    """The one batch that the trainer trains on, and where its documents lie."""
    (batch,) = list(trainer.get_train_dataloader())
    starts = batch["cu_seq_lens_q"].tolist()
    documents = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
    assert len(documents) == len(QUESTIONS) and batch["input_ids"].shape == (1, starts[-1])
    return dict(batch), documents


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_packed_documents_have_the_logits_and_the_loss_of_separate_ones(stack, tmp_path):
    trainer = trainer_of(stack, tmp_path)
    batch, documents = packed_batch(trainer)
    model = trainer.model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        packed = model(**inputs, use_cache=False).logits
        total, count = 0.0, 0
        for document in documents:
            ids, labels = batch["input_ids"][:, document], batch["labels"][:, document]
            alone = model(ids, labels=labels, use_cache=False)
            torch.testing.assert_close(packed[:, document], alone.logits, rtol=1e-4, atol=1e-4)
            predicted = int((labels[:, 1:] != -100).sum())
            total, count = total + alone.loss * predicted, count + predicted
        loss = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_without_the_collators_marks_documents_would_leak(stack, tmp_path):
    """That the comparison above can fail: the same row without position_ids, seq_idx and lengths differs."""
    trainer = trainer_of(stack, tmp_path)
    batch, documents = packed_batch(trainer)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", *BEGIN_AGAIN)}
    with torch.no_grad():
        mixed = trainer.model.eval()(**inputs, use_cache=False).logits[:, documents[-1]]
        alone = trainer.model(batch["input_ids"][:, documents[-1]], use_cache=False).logits
    assert (mixed - alone).abs().max() > 1e-3


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_no_gradient_flows_from_a_document_into_those_before_it(stack, tmp_path):
    trainer = trainer_of(stack, tmp_path)
    batch, documents = packed_batch(trainer)
    model = trainer.model.train()
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    batch.pop("labels")
    logits = model(inputs_embeds=embedded, use_cache=False, **batch).logits
    logits[:, documents[-1]].square().sum().backward()
    size = embedded.grad[0].norm(dim=-1)
    assert size[documents[-1]].max() > 0
    assert size[: documents[-1].start].max() == 0
