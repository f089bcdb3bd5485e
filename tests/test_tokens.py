"""What is known of a batch: documents, padding, and where the sinks are."""

import pytest
import torch
from torch import Tensor

from linearize.cache import MixerCacheLayer
from linearize.errors import LinearizeError
from linearize.ops.local import NEVER
from linearize.tokens import Tokens, describe

CPU = torch.device("cpu")


def filled(seen: int, real: list[int], sink_time: list[list[int]]) -> MixerCacheLayer:
    layer = MixerCacheLayer()
    layer.seen, layer.real, layer.sink_time = seen, torch.tensor(real), torch.tensor(sink_time)
    return layer


def filled_slots(tokens: Tokens) -> list[list[int | None]]:
    """The token of this call that fills each slot; None where the slot stays as it is."""
    assert tokens.sink_index is not None
    new = torch.ones_like(tokens.sink_index, dtype=torch.bool) if tokens.sink_new is None else tokens.sink_new
    pairs = zip(tokens.sink_index.tolist(), new.tolist(), strict=True)
    return [[i if fresh else None for i, fresh in zip(*row, strict=True)] for row in pairs]


def test_one_document_a_row():
    tokens = describe((2, 6), 3, CPU)
    assert tokens.valid is None
    assert tokens.document is None
    assert tokens.sink_time.tolist() == [[0, 1, 2]] * 2
    assert filled_slots(tokens) == [[0, 1, 2]] * 2
    assert tokens.real.tolist() == [6, 6]
    assert tokens.start == 0


def test_a_mask_of_ones_is_no_padding():
    assert describe((2, 6), 3, CPU, torch.ones(2, 6)).valid is None


def test_fewer_tokens_than_sinks():
    tokens = describe((1, 2), 4, CPU)
    assert tokens.sink_time.tolist() == [[0, 1, NEVER, NEVER]]
    assert filled_slots(tokens) == [[0, 1, None, None]]


def test_no_sinks():
    assert describe((2, 6), 0, CPU).sink_time.shape == (2, 0)


def test_left_padding():
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    tokens = describe((3, 6), 3, CPU, mask)
    assert tokens.valid is not None
    assert torch.equal(tokens.valid, mask.bool())
    assert tokens.sink_time.tolist() == [[0, 1, 2], [2, 3, 4], [5, NEVER, NEVER]]
    assert filled_slots(tokens) == [[0, 1, 2], [2, 3, 4], [5, None, None]]
    assert tokens.real.tolist() == [6, 4, 1]


def positions(*rows: list[int]) -> Tensor:
    """Position ids of rows of documents of the given lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def test_packed_documents():
    tokens = describe((2, 6), 2, CPU, position_ids=positions([3, 1, 2], [4, 2]))
    assert tokens.document is not None
    assert tokens.document.tolist() == [[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 1, 1]]
    assert tokens.sink_time.tolist() == [[0, 1, 3, NEVER, 4, 5], [0, 1, 4, 5, NEVER, NEVER]]
    assert tokens.sink_document is not None
    assert tokens.sink_document.tolist() == [[0, 0, 1, 1, 2, 2]] * 2


def test_one_row_of_positions_for_all():
    tokens = describe((2, 5), 1, CPU, position_ids=positions([2, 3]))
    assert tokens.document is not None
    assert tokens.document.tolist() == [[0, 0, 1, 1, 1]] * 2


def test_positions_that_run_on_are_one_document():
    assert describe((1, 6), 2, CPU, position_ids=torch.arange(7, 13)[None]).document is None


def test_positions_under_a_padding_mask_are_no_documents():
    mask = torch.tensor([[0, 0, 1, 1]])
    assert describe((1, 4), 2, CPU, mask, torch.tensor([[1, 1, 0, 1]])).document is None


def test_continuation_fills_what_slots_are_left():
    past = filled(3, real=[3, 1, 0], sink_time=[[0, 1, 2, NEVER], [2, NEVER, NEVER, NEVER], [NEVER] * 4])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    tokens = describe((3, 2), 4, CPU, mask, past=past)
    assert tokens.start == 3
    assert tokens.sink_time.tolist() == [[0, 1, 2, 3], [2, 3, 4, NEVER], [4, NEVER, NEVER, NEVER]]
    assert filled_slots(tokens) == [[None, None, None, 0], [None, 0, 1, None], [1, None, None, None]]
    assert tokens.real.tolist() == [5, 3, 1]
    assert tokens.sink_time_from_start.tolist()[1] == [-1, 0, 1, NEVER]


def test_continuation_after_full_slots_fills_none():
    tokens = describe((1, 2), 2, CPU, torch.ones(1, 9), past=filled(7, real=[7], sink_time=[[0, 1]]))
    assert tokens.sink_index is None
    assert tokens.sink_time.tolist() == [[0, 1]]
    assert tokens.real.tolist() == [9]


def test_continuation_with_positions_is_one_document():
    past = filled(3, real=[3], sink_time=[[0]])
    assert describe((1, 2), 1, CPU, position_ids=torch.tensor([[0, 1]]), past=past).document is None


def test_a_mask_of_four_dimensions_is_refused():
    with pytest.raises(LinearizeError, match=r"\(1, 1, 6, 6\).*\[batch, tokens\]"):
        describe((1, 6), 2, CPU, torch.ones(1, 1, 6, 6))


def test_a_mask_covers_all_tokens_so_far():
    for columns in (3, 5):
        with pytest.raises(LinearizeError, match=f"{columns} columns; .* 0 before this call and 4 in it"):
            describe((1, 4), 2, CPU, torch.ones(1, columns))


def test_with_a_mask_there_are_no_documents():
    """As in transformers, so that converted and softmax layers of one model agree."""
    assert describe((1, 4), 2, CPU, torch.ones(1, 4), torch.tensor([[0, 1, 0, 1]])).document is None
