"""Padding and packing in one form: positions, documents and progress of a call."""

from __future__ import annotations

import torch

from rnnzoo.zoo.core.documents import Progress, documents_from_lengths, documents_from_positions, lay_out, padding_mask


def rows(*values) -> torch.Tensor:
    return torch.tensor(values)


def test_positions_count_the_tokens_before_and_go_on_after_the_cache():
    layout = lay_out(Progress(torch.tensor([5, 2])), None, None, False, (2, 3), "cpu")
    assert layout.positions.tolist() == [[5, 6, 7], [2, 3, 4]]
    assert layout.progress.seen.tolist() == [8, 5]


def test_positions_skip_padding_wherever_it_stands():
    mask = rows([0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]).bool()
    layout = lay_out(Progress(torch.tensor([0, 3, 4])), mask, None, False, (3, 4), "cpu")
    assert layout.positions[mask].tolist() == [0, 1, 3, 4]
    assert layout.progress.seen.tolist() == [2, 5, 4]


def test_positions_start_again_with_each_document_and_the_first_goes_on():
    ids = rows([7, 7, 9, 9, 9, 2])
    layout = lay_out(Progress(torch.tensor([3]), torch.tensor([7])), None, ids, True, (1, 6), "cpu")
    assert layout.seq_ids.tolist() == [[0, 0, 1, 1, 1, 2]]
    assert layout.positions.tolist() == [[3, 4, 0, 1, 2, 0]]
    assert not layout.restart.any()
    assert layout.progress.seen.tolist() == [1] and layout.progress.last_id.tolist() == [2]


def test_a_call_that_begins_with_another_document_restarts_that_row():
    ids = rows([8, 8], [7, 7], [8, 8])
    mask = rows([1, 1], [1, 1], [0, 0]).bool()
    layout = lay_out(Progress(torch.tensor([3, 3, 3]), torch.tensor([7, 7, 7])), mask, ids, True, (3, 2), "cpu")
    assert layout.restart.tolist() == [True, False, False]
    assert layout.positions[:2].tolist() == [[0, 1], [3, 4]]
    assert layout.progress.seen.tolist() == [2, 5, 3] and layout.progress.last_id.tolist() == [8, 7, 7]


def test_the_ids_of_padding_mean_nothing():
    ids, mask = rows([-1, 4, -1, 4, 5, -1]), rows([0, 1, 0, 1, 1, 0]).bool()
    layout = lay_out(None, mask, ids, True, (1, 6), "cpu")
    assert layout.seq_ids[mask].tolist() == [0, 0, 1]
    assert layout.positions[mask].tolist() == [0, 1, 0]
    assert layout.progress.seen.tolist() == [1] and layout.progress.last_id.tolist() == [5]


def test_documents_are_found_in_positions_only_where_they_start_again():
    assert documents_from_positions(rows([0, 1, 2, 0, 1, 0]), None, 1, 6).tolist() == [[0, 0, 0, 1, 1, 2]]
    assert documents_from_positions(rows([4, 5, 6]), None, 1, 3) is None
    assert documents_from_positions(rows([0]), None, 1, 1) is None
    # generate() gives padding position 0, on either side.
    assert documents_from_positions(rows([0, 0, 0, 1]), rows([0, 0, 1, 1]).bool(), 1, 4) is None
    assert documents_from_positions(rows([0, 1, 0, 0]), rows([1, 1, 0, 0]).bool(), 1, 4) is None


def test_documents_are_found_in_cumulative_lengths():
    assert documents_from_lengths(torch.tensor([0, 2, 3, 6]), 1, 6).tolist() == [[0, 0, 1, 2, 2, 2]]


def test_a_mask_over_the_past_is_cut_to_this_call():
    mask = rows([0, 1, 1, 1], [1, 1, 0, 1])
    assert padding_mask(mask, 2, 2).tolist() == [[True, True], [False, True]]
    assert padding_mask(mask, 2, 1) is None
    assert padding_mask({"full_attention": mask, "other": None}, 2, 4).equal(mask.bool())
    assert padding_mask({"full_attention": None}, 2, 4) is None
