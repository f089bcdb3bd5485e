"""From documents to what training and evaluation take: token ids, cut into sequences."""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm import tqdm

from linearize.errors import LinearizeError
from linearize.train.documents import Chat, Document

BATCH = 64  # documents tokenised at once: enough for the tokenizer's threads, few enough to stop early
PASSAGES = 8, 64  # tokens of a passage that is said again
IGNORED = -100  # what cross_entropy takes for "no target here"


# --- tokens ----------------------------------------------------------------------------------------------------------


def tokenize(
    documents: Sequence[Document], tokenizer: Any, limit: int | None = None, shortest: int = 0
) -> list[np.ndarray]:
    """Token ids (int32) of each document, ended by the tokenizer's end-of-text token if it has one.

    A beginning-of-text token is there only if the tokenizer, or for a chat its template, adds it itself. Documents of
    fewer than `shortest` tokens are left out. Stops after the document with which `limit` tokens are reached.
    Raises LinearizeError for a chat where there is no template, or one that does not take it.
    """
    found: list[np.ndarray] = []
    tokens = read = 0
    characters = sum(map(_size, documents))
    with tqdm(desc="tokenizing", unit="tok", unit_scale=True, delay=1, leave=False) as bar:
        for start in range(0, len(documents), BATCH):
            batch = list(documents[start : start + BATCH])
            for document, ids in zip(batch, _encoded(batch, tokenizer), strict=True):
                ended = _ended(ids, tokenizer.eos_token_id)
                read += _size(document)
                if len(ended) < shortest:
                    continue
                found.append(ended)
                tokens += len(ended)
                if limit is not None and tokens >= limit:
                    return found
            expected = tokens * characters // max(read, 1)
            bar.total = expected if limit is None else min(expected, limit)
            bar.update(tokens - bar.n)
    return found


def begin_of(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text itself."""
    return [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]


def _size(document: Document) -> int:
    """Characters."""
    return len(document) if isinstance(document, str) else sum(len(turn["content"]) for turn in document.messages)


def _encoded(batch: Sequence[Document], tokenizer: Any) -> list[list[int]]:
    texts = [document for document in batch if isinstance(document, str)]
    chats = [_rendered(document, tokenizer) for document in batch if isinstance(document, Chat)]
    # verbose=False: no warning that a document is longer than the model reads; it will be cut
    plain = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
    turns = iter(tokenizer(chats, add_special_tokens=False, verbose=False)["input_ids"] if chats else [])
    return [next(turns if isinstance(document, Chat) else plain) for document in batch]


def _rendered(chat: Chat, tokenizer: Any) -> str:
    """The chat as text, which ends where its last turn does."""
    if tokenizer.chat_template is None:
        raise LinearizeError(
            f"{chat.place}: a row of 'messages' needs a chat template, and this model's tokenizer has none; "
            "give rows of 'text', or a chat model"
        )
    try:
        return tokenizer.apply_chat_template(chat.messages, tokenize=False).rstrip()
    except Exception as error:  # whatever a template raises: templates are programs
        raise LinearizeError(f"{chat.place}: the chat template does not take these 'messages': {error}") from error


def _ended(ids: list[int], eos: int | None) -> np.ndarray:
    if eos is not None and (not ids or ids[-1] != eos):
        ids = [*ids, eos]
    return np.asarray(ids, dtype=np.int32)


# --- sequences -------------------------------------------------------------------------------------------------------


class Packed(Sequence[dict[str, Tensor]]):
    """Sequences of `length` tokens, cut when they are asked for: of tokens `ids` `[N]`, counted round and round, with
    documents that begin where `begins` `[N]` says. `pack` makes them and says what is in them."""

    def __init__(self, ids: np.ndarray, begins: np.ndarray, length: int, number: int, repeats: float) -> None:
        self.ids, self.begins, self.length, self.number, self.repeats = ids, begins, length, number, repeats

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, index: int) -> dict[str, Int64[Tensor, "T"]]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Int64[Tensor, "T"]]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """One sequence, or some."""
        if isinstance(index, slice):
            return [self[i] for i in range(self.number)[index]]
        start, count = range(self.number)[index] * self.length, np.arange(self.length)
        place = (start + count) % len(self.ids)
        begin, ids = self.begins[place], self.ids[place].astype(np.int64)
        begin[0] = True
        if self.repeats:
            ids = repeated(ids, np.flatnonzero(begin), self.repeats, np.random.default_rng(start))
        targets = np.full(self.length, IGNORED)
        targets[:-1] = np.where(begin[1:], IGNORED, ids[1:])
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(count - np.maximum.accumulate(np.where(begin, count, 0))),
            "targets": torch.from_numpy(targets),
        }


def pack(
    documents: Sequence[np.ndarray], sequence_length: int, tokens: int, source: str = "the text", repeats: float = 0.0
) -> Packed:
    """Cut the documents, one after the other, into sequences of `sequence_length` tokens, at least `tokens` in all.

    Text shorter than that starts over. Each sequence has `input_ids`; `position_ids`, which start from 0 at every
    document's beginning and at the sequence's own (which is how a mixer knows where to forget its state); and
    `targets`, the next token of the same document within the sequence, or -100 where there is none. A share `repeats`
    of the tokens, about, gives way to passages that the document had before (`repeated`).
    Raises `LinearizeError` for lengths below 2, budgets below 1, and text shorter than one sequence.
    """
    if sequence_length < 2 or tokens < 1:
        raise LinearizeError(f"sequence_length must be 2 or more and tokens 1 or more, not {sequence_length}, {tokens}")
    total = sum(map(len, documents))
    if total < sequence_length:
        raise LinearizeError(f"{source} has {total} tokens, fewer than one sequence of {sequence_length}")
    ids = np.concatenate([np.asarray(document, dtype=np.int32) for document in documents])
    begins = np.concatenate([np.arange(len(document)) == 0 for document in documents])
    return Packed(ids, begins, sequence_length, -(-tokens // sequence_length), repeats)


def repeated(ids: np.ndarray, begins: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """`ids` `[T]` with passages said again, in place of what stood there: about `share` of the tokens.

    A passage of `PASSAGES` tokens comes from anywhere before its place in the document, whose beginnings are `begins`.
    Running text asks little of a memory; a passage that comes again can be told from it and from nothing else.
    """
    ids, ends = ids.copy(), [*begins[1:], len(ids)]
    shortest, longest = PASSAGES
    pause = (shortest + longest) / 2 * (1 - share) / share  # between two passages, on average
    for begin, end in zip(begins, ends, strict=True):
        place = begin + longest
        while True:
            place += int(random.exponential(pause))
            size = int(random.integers(shortest, longest + 1))
            if place + size >= end:  # a document's last token stays
                break
            start = int(random.integers(begin, place - size + 1))
            ids[place : place + size] = ids[start : start + size]
            place += size
    return ids


def heldout_sequences(
    documents: Sequence[np.ndarray], sequence_length: int, count: int, source: str = "the text"
) -> Int64[Tensor, "N T"]:
    """Up to `count` windows of `sequence_length` tokens: every document's first, then their second ones, and so on.

    Windows do not overlap and shorter tails are dropped. Raises `LinearizeError` if no document is as long as that,
    or if a number is below 1.
    """
    return heldout_windows(documents, sequence_length, count, source)[0]


def heldout_windows(
    documents: Sequence[np.ndarray], sequence_length: int, count: int, source: str = "the text"
) -> tuple[Int64[Tensor, "N T"], list[int]]:
    """As `heldout_sequences`, and for each window the place of its document."""
    if sequence_length < 1 or count < 1:
        raise LinearizeError(f"sequence_length and count must be 1 or more, not {sequence_length}, {count}")
    longest = max(map(len, documents), default=0)
    if longest < sequence_length:
        raise LinearizeError(
            f"{source}: the longest held-out document has {longest} tokens, fewer than {sequence_length}"
        )
    cuts = [
        (place, start)
        for start in range(0, longest - sequence_length + 1, sequence_length)
        for place, document in enumerate(documents)
        if len(document) >= start + sequence_length
    ][:count]
    windows = [documents[place][start : start + sequence_length].astype(np.int64) for place, start in cuts]
    return torch.from_numpy(np.stack(windows)), [place for place, _ in cuts]
