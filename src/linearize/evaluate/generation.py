"""Continuations of fifty fixed prompts: how much they repeat themselves, and what the teacher thinks of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from linearize.convert import decoder
from linearize.families import Head
from linearize.measures import Generation

NGRAM = 4
NEW_TOKENS = 256  # several windows long: what goes wrong beyond them shows
ROWS = 8  # continuations that the teacher judges at once
PROMPTS = (
    "The history of the city begins with",
    "In the early morning, the fishermen",
    "Scientists have recently discovered that",
    "The main difference between a virus and a bacterium is",
    "Once upon a time, in a village by the sea,",
    "To bake a good loaf of bread, you first need to",
    "The president announced on Tuesday that",
    "My grandmother used to tell me a story about",
    "A computer program is a set of instructions that",
    "The book describes the life of a young woman who",
    "During the winter, many animals",
    "The most important lesson I learned at school was",
    "The river flows from the mountains to",
    "There are three reasons why people move to cities.",
    "The museum's new exhibition shows",
    "When the train finally arrived, the passengers",
    "Dear Sir or Madam, I am writing to",
    "The recipe calls for two eggs, a cup of flour and",
    "In mathematics, a prime number is",
    "The detective looked at the letter and noticed",
    "Photosynthesis is the process by which",
    "The team won the championship after",
    "Many people believe that money",
    "The old castle on the hill was built",
    "If you want to learn a new language, the best way is",
    "The ship left the harbour in 1912 and",
    "According to the report, the economy",
    "The first thing you notice about the desert is",
    "Music has always been an important part of",
    "The doctor told her patient that",
    "A democracy is a form of government in which",
    "The forest was silent except for",
    "How do airplanes stay in the air? The answer is",
    "The company was founded by two brothers who",
    "The Roman Empire reached its greatest extent",
    "On the last day of the holiday, the children",
    "Climate change affects agriculture because",
    "The painter mixed the colours and began",
    "The speed of light is",
    "After the war, the country",
    "Some birds fly thousands of kilometres every year in order to",
    "The door opened slowly, and behind it stood",
    "Good writing is clear and simple. For example,",
    "The new law requires that all drivers",
    "The human heart is a muscle that",
    "She had never seen the ocean before, and",
    "The library is open from Monday to Friday and",
    "Volcanoes are formed when",
    "The coach said that the young player",
    "In the year 2050, most people will",
)


def generation(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
) -> Generation:
    """Up to `new_tokens` after each prompt, greedy and, from a fixed seed, sampled at temperature 1.

    Repetition is of the continuation alone. The teacher judges what was sampled: greedy text that repeats itself is
    easy to foresee, so its loss would be praised for what is wrong with it.
    """
    greedy = continuations(model, tokenizer, prompts, new_tokens, sample=False)
    sampled = continuations(model, tokenizer, prompts, new_tokens, sample=True)
    return Generation(
        prompts=len(prompts),
        tokens=new_tokens,
        greedy_repetition=_mean([repetition(tokens) for tokens in greedy]),
        sampled_repetition=_mean([repetition(tokens) for tokens in sampled]),
        judged_loss=judged_loss(teacher, [tokenizer(prompt)["input_ids"] for prompt in prompts], sampled),
    )


@torch.no_grad()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int, sample: bool
) -> list[list[int]]:
    """The tokens generated after each prompt, all prompts at once, up to the end of the text (which is left out)."""
    ends, rows = ends_of(model, tokenizer), [tokenizer(prompt)["input_ids"] for prompt in prompts]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    longest = max(map(len, rows))
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    with torch.random.fork_rng(), unchanged_scores(model, tokenizer):
        torch.manual_seed(0)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=sample, pad_token_id=padding, **given
        )
    return [list(takewhile(lambda token: token not in ends, row)) for row in output[:, longest:].tolist()]


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: the tokenizer's, and those that the model's generation config has."""
    config: Any = model.generation_config
    given = [] if config is None else config.eos_token_id
    listed = given if isinstance(given, list) else [given]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


@contextmanager
def unchanged_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Without what else that config asks for, as a penalty on repetition, which is measured here."""
    kept: Any = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends_of(model, tokenizer)) or None)
    try:
        yield
    finally:
        model.generation_config = kept


def repetition(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that were in `tokens` before; 0 of a text shorter than that."""
    runs = [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@torch.no_grad()
def judged_loss(teacher: PreTrainedModel, prompts: Sequence[list[int]], texts: Sequence[list[int]]) -> float:
    """The mean loss of `teacher` on the tokens of `texts`, each after its prompt, in nats; 0 where there are none."""
    head, total, count = Head(teacher), 0.0, 0
    for start in range(0, len(texts), ROWS):
        rows = [(p, t) for p, t in zip(prompts, texts, strict=True)][start : start + ROWS]
        longest = max(len(prompt) + len(text) for prompt, text in rows)
        padded = [[*p, *t, *[0] * (longest - len(p) - len(t))] for p, t in rows]  # at the end: no token sees it
        ids = torch.tensor(padded, device=teacher.device)
        hidden: Tensor = decoder(teacher)(input_ids=ids, use_cache=False).last_hidden_state
        for state, row, (prompt, text) in zip(hidden, ids, rows, strict=True):
            span = slice(len(prompt) - 1, len(prompt) + len(text) - 1)
            targets = row[len(prompt) : len(prompt) + len(text)]
            loss = torch.nn.functional.cross_entropy(head(state[span]).float(), targets, reduction="sum")
            total, count = total + loss.item(), count + len(text)
    return total / max(1, count)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
