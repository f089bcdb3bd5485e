"""Sequences: budgets, ends of documents, no leak between those packed together, passages said again."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from linearize.errors import LinearizeError
from linearize.train.sequences import heldout_sequences, heldout_windows, pack, tokenize


def tokenizer(eos: str | None = "</s>", bos: bool = False) -> PreTrainedTokenizerFast:
    """A token for each character."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "?", *"abcdefgh "])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, bos_token="<s>", model_max_length=4)


def test_documents_end_with_eos(capfd):
    assert [list(ids) for ids in tokenize(["ab", "abcdefgh"], tokenizer())] == [[3, 4, 1], [*range(3, 11), 1]]
    assert [list(ids) for ids in tokenize(["ab"], tokenizer(bos=True))] == [[0, 3, 4, 1]]
    assert [list(ids) for ids in tokenize(["ab"], tokenizer(eos=None))] == [[3, 4]]
    assert capfd.readouterr() == ("", "")  # no bar for what is quick, no warning about lengths


def test_tokenising_stops_at_the_limit(monkeypatch):
    class Counting:
        eos_token_id = 1
        seen = 0

        def __call__(self, texts, verbose):
            self.seen += len(texts)
            return {"input_ids": [[5] * 9 for _ in texts]}

    counting = Counting()
    assert len(tokenize(["text"] * 10_000, counting, limit=995)) == 100
    assert counting.seen < 200


def documents(*lengths: int) -> list[np.ndarray]:
    """Documents of these lengths whose tokens are all different: 100, 101, ...; 200, 201, ...; ..."""
    return [np.arange(length, dtype=np.int32) + 100 * number for number, length in enumerate(lengths, start=1)]


def test_packed_sequences_in_full():
    first, second = pack(documents(3, 5, 1), sequence_length=5, tokens=10)
    assert first["input_ids"].tolist() == [100, 101, 102, 200, 201]
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert first["targets"].tolist() == [101, 102, -100, 201, -100]
    assert second["input_ids"].tolist() == [202, 203, 204, 300, 100]  # one token of the second round
    assert second["position_ids"].tolist() == [0, 1, 2, 0, 0]
    assert second["targets"].tolist() == [203, 204, -100, -100, -100]
    assert {tensor.dtype for tensor in (*first.values(), *second.values())} == {torch.int64}


def test_no_target_leaks_between_documents():
    sequences = pack(documents(7, 1, 20, 13, 2), sequence_length=8, tokens=150)
    assert len(sequences) == 19
    for sequence in sequences:
        ids, targets, positions = (sequence[name] for name in ("input_ids", "targets", "position_ids"))
        inside = targets != -100
        assert (targets[inside] == ids[inside] + 1).all()  # the next of the same document
        assert (positions[1:][inside[:-1]] == positions[:-1][inside[:-1]] + 1).all()
        assert (positions[1:][~inside[:-1]] == 0).all()


def test_a_single_document_starts_over_as_a_new_one():
    (sequence,) = pack([*documents(6), np.array([], dtype=np.int32)], sequence_length=4, tokens=3)
    assert sequence["position_ids"].tolist() == [0, 1, 2, 3]
    _, second = pack(documents(6), sequence_length=4, tokens=8)
    assert second["input_ids"].tolist() == [104, 105, 100, 101]
    assert second["targets"].tolist() == [105, -100, 101, -100]


def test_text_shorter_than_one_sequence():
    with pytest.raises(LinearizeError, match="the text has 9 tokens, fewer than one sequence of 10"):
        pack(documents(4, 5), sequence_length=10, tokens=100)


@pytest.mark.parametrize(("length", "tokens"), [(1, 10), (0, 10), (4, 0), (4, -5)])
def test_lengths_out_of_range(length, tokens):
    with pytest.raises(LinearizeError, match="must be"):
        pack(documents(9), length, tokens)


def test_heldout_windows_take_turns():
    windows = heldout_sequences(documents(9, 3, 13), sequence_length=4, count=4)
    assert windows[:, 0].tolist() == [100, 300, 104, 304]
    assert windows.shape == (4, 4)
    assert heldout_sequences(documents(9, 3, 13), 4, count=99)[-1].tolist() == [308, 309, 310, 311]


def test_windows_know_their_documents():
    texts = [np.arange(size) for size in (12, 3, 9)]
    found, places = heldout_windows(texts, 4, 10)
    assert places == [0, 2, 0, 2, 0]
    assert torch.equal(found, heldout_sequences(texts, 4, 10))


def test_heldout_too_short():
    with pytest.raises(LinearizeError, match="longest held-out document has 9 tokens, fewer than 10"):
        heldout_sequences(documents(9, 3), sequence_length=10, count=1)
    with pytest.raises(LinearizeError, match="must be 1 or more"):
        heldout_sequences(documents(9), sequence_length=4, count=0)


def test_documents_that_are_too_short_are_left_out():
    texts = ["ab", "abcdefgh", "abc", "abcdefg", "abcdefghi"]
    assert [len(ids) for ids in tokenize(texts, tokenizer(), shortest=8)] == [9, 8, 10]
    assert [len(ids) for ids in tokenize(texts, tokenizer(), limit=10, shortest=8)] == [9, 8]


def test_passages_that_are_said_again():
    """Some tokens give way to passages from before in the same document; all else stays, and targets follow."""
    texts = [np.arange(start, start + length) for start, length in ((0, 90), (1000, 700), (2000, 500))]
    plain, changed = (pack(texts, 1290, 1290, repeats=repeats)[0] for repeats in (0.0, 0.4))
    assert pack(texts, 1290, 1290, repeats=0.4)[0]["input_ids"].equal(changed["input_ids"])
    assert plain["position_ids"].equal(changed["position_ids"])
    ids, before = changed["input_ids"], plain["input_ids"]
    again = ids != before
    assert 0.25 < again.double().mean() < 0.55
    assert (ids[again] < before[again]).all()  # tokens rise within a document
    assert (ids[again] // 1000 == before[again] // 1000).all()
    starts = torch.nonzero(again & ~again.roll(1))[:, 0].tolist()
    assert len(starts) > 5
    for start in starts:
        passage = ids[start : start + 8]
        assert (ids[:start].unfold(0, 8, 1) == passage).all(1).any()
    inside = changed["targets"] != -100
    assert inside.equal(plain["targets"] != -100)
    assert changed["targets"][inside].equal(ids[1:][inside[:-1]])
