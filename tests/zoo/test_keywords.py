"""What a model is asked for by keyword or by mask is honoured, or refused in a sentence; nothing is ignored."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.errors import RnnzooError, ShapeError
from rnnzoo.zoo.core.cache import CACHE_NAME

IDS = torch.arange(18).view(2, 9)
NUMBERS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 1, 2, 2, 2, 3, 3, 3, 3]])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_mask_that_numbers_documents_keeps_them_apart(stack, make_model):
    model, tokens = make_model(stack), NUMBERS > 0
    expected = model(IDS, seq_ids=NUMBERS, attention_mask=tokens).logits[tokens]
    close(model(IDS, attention_mask=NUMBERS).logits[tokens], expected)
    cache = model(IDS[:, :5], attention_mask=NUMBERS[:, :5], use_cache=True)[CACHE_NAME]
    rest = model(IDS[:, 5:], attention_mask=NUMBERS[:, 5:], **{CACHE_NAME: cache}).logits
    close(rest[tokens[:, 5:]], model(IDS, attention_mask=NUMBERS).logits[:, 5:][tokens[:, 5:]])


@torch.no_grad()
def test_cumulative_lengths_go_by_either_name(stack, make_model):
    model, lengths = make_model(stack), torch.tensor([0, 3, 9], dtype=torch.int32)
    expected = model(IDS[:1], seq_ids=torch.tensor([[0] * 3 + [1] * 6])).logits
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        close(model(IDS[:1], **{name: lengths}).logits, expected)


@pytest.fixture
def model(make_model):
    return make_model(("gla", "gla"))


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q"])
@pytest.mark.parametrize("lengths", [[0, 3, 10], [1, 3, 9], [0, 5, 3, 9], [9]])
def test_lengths_that_are_not_of_the_row_are_refused(model, name, lengths):
    with pytest.raises(ShapeError, match="Cumulative lengths"):
        model(IDS[:1], **{name: torch.tensor(lengths)})
    with pytest.raises(ShapeError, match="one row, but the call has 2"):
        model(IDS, **{name: torch.tensor([0, 3, 9])})


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 9) - 1e9, NUMBERS.float(), -NUMBERS], ids=["added", "floats", "negative"]
)
def test_masks_of_other_values_are_refused(model, mask):
    with pytest.raises(RnnzooError, match="expected 1 for tokens and 0 for padding"):
        model(IDS, attention_mask=mask)


def test_document_numbers_for_columns_of_earlier_calls_are_refused(model):
    with pytest.raises(RnnzooError, match="pass seq_ids"):
        model(IDS[:, 4:], attention_mask=NUMBERS)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("atention_mask", "attention_mask"),
        ("state", "cache"),
        ("postion_ids", "position_ids"),
        ("doc_ids", "seq_ids"),
        ("document_numbers", None),
    ],
)
def test_unknown_keywords_are_refused_with_what_was_meant(model, name, meant):
    with pytest.raises(RnnzooError, match=f"^{name} is no argument.*({meant}|leave it out)"):
        model(IDS, **{name: IDS})
    model(IDS, **{name: None})


def test_what_trainers_and_collators_pass_is_known(model):
    batch = {
        "labels": IDS,
        "num_items_in_batch": 3,
        "token_type_ids": IDS,
        "return_dict": True,
        "output_attentions": False,
    }
    batch |= {"cu_seq_lens_k": torch.tensor([0, 3, 9]), "max_length_q": 6, "max_length_k": 6, "assistant_masks": IDS}
    assert model(IDS, **batch).loss.isfinite()
