"""What candidates of a selection are measured on: sequences, and needles in other stretches of the same documents."""

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.convert import decoder
from linearize.errors import LinearizeError
from linearize.families import Head
from linearize.train.documents import Document
from linearize.train.sequences import begin_of, heldout_sequences, tokenize

NEEDLE_LENGTHS = (256, 512)
WORDS = ("apple", "bridge", "candle", "desert", "engine", "forest", "guitar", "hammer", "island", "jacket")
STATEMENT, QUESTION = "\nThe secret word is {}.\n", "\nThe secret word is"
TEXTS = 64  # documents that are tokenised at once, until there are sequences enough


class Needles(NamedTuple):
    """Texts of one length that state a word early on and ask for it at their end."""

    rows: Int64[Tensor, "N T"]
    answers: Int64[Tensor, "N"]  # index into `choices`
    choices: Int64[Tensor, "C"]  # the token by which each word is told from the others


class Probes(NamedTuple):
    """What candidates are measured on."""

    sequences: Int64[Tensor, "N T"]
    needles: list[Needles]


def probes(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    sequences: int,
    trials: int,
    seed: int,
    source: str = "the text",
) -> Probes:
    """Up to `sequences` of `length` tokens, and needles in other stretches of the same documents, by `seed`."""
    order = random.Random(seed).sample(range(len(documents)), len(documents))
    long: list[np.ndarray] = []
    needed = max(length, *NEEDLE_LENGTHS)
    for start in range(0, len(order), TEXTS):
        some = tokenize([documents[index] for index in order[start : start + TEXTS]], tokenizer)
        long += [ids for ids in some if len(ids) >= needed]
        if len(long) >= sequences:
            break
    if not long:
        raise LinearizeError(f"{source}: no document has {needed} tokens, which sequences and needles take")
    windows = heldout_sequences(long, length, sequences, source)
    return Probes(windows, [needles(long, tokenizer, size, trials, seed) for size in NEEDLE_LENGTHS])


def needles(
    documents: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase, length: int, trials: int, seed: int
) -> Needles:
    """`trials` texts of `length` tokens: a word is stated in the first half of running text and asked for last."""
    draw = random.Random(f"{seed} {length}")
    asked = [tokenizer(f"{QUESTION} {word}", add_special_tokens=False)["input_ids"] for word in WORDS]
    common = next((i for i, ids in enumerate(zip(*asked, strict=False)) if len(set(ids)) > 1), -1)
    choices = [ids[common] for ids in asked]
    if len(set(choices)) < len(choices):
        raise LinearizeError(
            f"this tokenizer begins some of the words {', '.join(WORDS)} alike, and needles need words apart"
        )
    begin = begin_of(tokenizer)
    rows, answers = [], []
    for trial in range(trials):
        answer = trial % len(WORDS)
        stated = tokenizer(STATEMENT.format(WORDS[answer]), add_special_tokens=False)["input_ids"]
        filler = length - len(begin) - len(stated) - common
        text = documents[draw.randrange(len(documents))]
        start = draw.randrange(len(text) - filler + 1)
        place = start + draw.randrange(filler // 8, filler // 2)
        rows.append([*begin, *text[start:place], *stated, *text[place : start + filler], *asked[answer][:common]])
        answers.append(answer)
    return Needles(torch.tensor(np.array(rows)).long(), torch.tensor(answers), torch.tensor(choices))


@torch.no_grad()
def recall(model: PreTrainedModel, needles: Iterable[Needles], rows: int = 8) -> tuple[float, float]:
    """Mean log-probability of the right words among all, and the share of needles where they come first."""
    head, found = Head(model), []
    for texts in needles:
        for ids, answers in zip(texts.rows.split(rows), texts.answers.split(rows), strict=True):
            hidden = decoder(model)(input_ids=ids.to(model.device), use_cache=False).last_hidden_state[:, -1]
            words = head(hidden).float().cpu()[:, texts.choices].log_softmax(-1)
            right = words.gather(1, answers[:, None])[:, 0]
            found.append(torch.stack([right, (words.argmax(-1) == answers).float()], dim=1))
    log_probability, accuracy = torch.cat(found).double().mean(0).tolist()
    return log_probability, accuracy
