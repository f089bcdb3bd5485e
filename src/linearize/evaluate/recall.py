"""Recall from beyond the window: needles, lookups and copies at set distances, generated from a seed.

What is asked for was said `distance` tokens before the place where it must be given, with running text between, and
nothing else in the text tells it. So a model that sees only its last W tokens is right as often as chance beyond W, but
for what its layers hand on, one window after the other; the same layers without a recurrence, beside it, show how
much that is. One forward pass scores a trial: the logarithmic probability of ten answers at the place where one is
due, and whether greedy decoding would give exactly the right one.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.errors import LinearizeError, unknown
from linearize.evaluate.perplexity import last_hidden
from linearize.families import Head
from linearize.measures import RecallScore
from linearize.train.sequences import begin_of

DISTANCES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CHOICES = 10
PASSAGE, CUE = 40, 8  # tokens of a passage to copy, and how many of them are given
LEAD = 32  # tokens of text before all that matters, at least
GAP = 8  # tokens of text between two facts, on average at least
AT_ONCE = {"cuda": 32768, "cpu": 8192}  # tokens of a batch
VALUES = """
apple arrow basket bell boat book bottle bread bridge brush bucket candle card castle chair clock cloud coin copper
cotton crown cup desk diamond dog door drum eagle engine feather fish flag flower forest garden ghost glass gold guitar
hammer hat honey horse island jacket key king knife ladder lamp leaf lemon letter lion map milk mirror moon mountain
needle ocean orange oven paper pearl pencil piano pillow planet plate queen rain ring river road rocket rope rose
salt sand ship silver snow spoon star stone sugar sword table tiger tower train tree turtle violin wagon wheel window
wine wolf wood
"""
KEYS = """
Amber Boston Cairo Delta Echo Falcon Geneva Harbor Iris Jasper Kenya Lisbon Mango Nova Oslo Paris Quartz Rome Sigma
Tokyo Umbra Vienna Willow Xenon York Zurich
"""
NAMES = """
Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nathan Olivia Peter Quentin Rachel Simon Teresa
Victor Walter Yvonne Zoe
"""


class Language(NamedTuple):
    """What trials are made of, in one tokenizer's tokens."""

    encode: Callable[[str], list[int]]
    begin: list[int]  # what the tokenizer puts before every text
    filler: np.ndarray  # running text
    words: list[list[int]]  # words of that text, to make passages of that no language model can guess
    space: list[int]  # what all answers begin with, where a space is a token of its own
    values: list[list[int]]  # possible answers without that


class Trial(NamedTuple):
    """A text that ends with the answer; the model is asked for the tokens of `answer`."""

    ids: list[int]
    answer: list[int]
    options: list[int]  # first tokens of the choices; none where there is nothing to choose
    right: list[bool]  # which of them are right


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[str],
    distances: Iterable[int] = DISTANCES,
    trials: int = 24,
    tasks: Iterable[str] = (),
    seed: int = 0,
    label: str = "",
) -> list[RecallScore]:
    """How much of what lies `distances` tokens back `model` can give, by task (all of them by default) and distance.

    `filler` is running text, the more the better. Equal arguments give every model the same texts. On a GPU the
    forward pass is in bf16. Raises LinearizeError for an unknown task and for a distance too short for a question.
    """
    language = read_language(tokenizer, filler)
    chosen = list(tasks) or list(TASKS)
    for name in chosen:
        if name not in TASKS:
            raise unknown("recall task", name, TASKS)
    scores = []
    cells = [(name, distance) for name in chosen for distance in sorted(distances)]
    with tqdm(desc=f"recall {label}", unit="tok", unit_scale=True, delay=1, leave=False) as bar:
        bar.total = sum(trials * (distance + 2 * LEAD) for _, distance in cells)  # about: what facts take comes on top
        for name, distance in cells:
            random = np.random.default_rng([seed, sorted(TASKS).index(name), distance])
            made = [TASKS[name](language, distance, random) for _ in range(trials)]
            scores.append(_scored(model, name, distance, made, len(language.begin)))
            bar.update(trials * (distance + 2 * LEAD))
    return scores


def check_trials(tokenizer: PreTrainedTokenizerBase, filler: Sequence[str], distance: int) -> None:
    """Raise LinearizeError where some task has no trial at this distance, in this text and tokenizer."""
    language = read_language(tokenizer, filler)
    for make in TASKS.values():
        make(language, distance, np.random.default_rng(0))


def read_language(tokenizer: PreTrainedTokenizerBase, filler: Sequence[str]) -> Language:
    """The tokens of the text, the answers and the words that trials take; answers of one token where there are enough.

    Raises LinearizeError for too little text.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    text = np.array([token for document in filler for token in encode(document)], dtype=np.int64)
    words = sorted({word for document in filler for word in document[:100_000].split() if word.isalpha()})
    if len(text) < LEAD or len(words) < 2:
        raise LinearizeError(f"{len(text)} tokens of text are too few to hide something in; give a longer text")
    values = [encode(f" {value}") for value in VALUES.split()]
    single = [value for value in values if len(value) == 1]
    values = single if len(single) >= 2 * CHOICES else values
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*values, strict=False))
    space = [column[0] for column in alike]
    values = [value[len(space) :] for value in values]
    begin = begin_of(tokenizer)
    return Language(encode, begin, text, [encode(f" {word}") for word in words], space, values)


# --- trials ----------------------------------------------------------------------------------------------------------


def facts(
    language: Language,
    distance: int,
    random: np.random.Generator,
    *,
    keys: Sequence[str],
    said: str,
    others: int,
    repeated: bool = False,
    together: bool = False,
) -> Trial:
    """`others` + 1 facts in running text, the value of one of them asked for.

    Each says the key and its value as `said` has it. Where `repeated`, all have one key, and each of their values is a
    right answer. The one that is asked for, or the last one, is `distance` tokens back; the others are anywhere, or,
    where `together`, in one paragraph with it.
    """
    encode = language.encode
    names = [str(key) for key in random.choice(keys, size=others + 1, replace=False)]
    names = names[:1] * len(names) if repeated else names
    options = _options(language, random)
    values = options[: others + 1]
    before = [encode(said.format(name)) + language.space for name in names]
    stop = encode(".")
    sentences = [[*start, *value, *stop] for start, value in zip(before, values, strict=True)]
    after = distance - 1 - len(stop) - len(before[0])  # tokens between the sentence that counts and the question
    if after < 0:
        raise LinearizeError(f"distance {distance} has no room for a question of {len(before[0])} tokens; give more")
    lead = LEAD + sum(map(len, sentences)) + GAP * others - len(sentences[0])
    late = _drawn(sentences[1:], 0 if repeated else after, lead, together, random)
    early = [sentence for place, sentence in enumerate(sentences[1:], 1) if place not in late]
    first = _with_filler(language, early, lead, random, at_end=together)
    last = _with_filler(language, [sentences[place] for place in late], after, random, at_start=together)
    ids = [*language.begin, *first, *sentences[0], *last, *before[0], *values[0]]
    random.shuffle(order := np.arange(len(options)))
    right = [int(place) < (len(values) if repeated else 1) for place in order]
    return Trial(ids, values[0], [options[place][0] for place in order], right)


def _options(language: Language, random: np.random.Generator) -> list[list[int]]:
    """Ten values that differ in their first tokens."""
    found: dict[int, list[int]] = {}
    for place in random.permutation(len(language.values)):
        found.setdefault(language.values[place][0], language.values[place])
    if len(found) < CHOICES:
        raise LinearizeError(f"only {len(found)} answers begin differently in this tokenizer; {CHOICES} are needed")
    return list(found.values())[:CHOICES]


def _drawn(
    sentences: Sequence[list[int]], room: int, lead: int, together: bool, random: np.random.Generator
) -> list[int]:
    """Which sentences (from 1 on) stand after the one that counts, as far as `room` tokens allow."""
    late, wanted = (
        [],
        random.integers(len(sentences) + 1) if together else random.binomial(len(sentences), room / (room + lead)),
    )
    for place in random.permutation(len(sentences))[:wanted]:
        size = len(sentences[place]) + (0 if together else GAP)
        if size <= room:
            late.append(int(place) + 1)
            room -= size
    return late


def _with_filler(
    language: Language,
    sentences: Sequence[list[int]],
    size: int,
    random: np.random.Generator,
    at_start: bool = False,
    at_end: bool = False,
) -> list[int]:
    """`size` tokens: running text with the sentences scattered in it, or all at its start or end."""
    left = size - sum(map(len, sentences))
    cuts = sorted(random.integers(left + 1, size=len(sentences)))
    cuts = [0] * len(cuts) if at_start else [left] * len(cuts) if at_end else cuts
    text, ids, done = _text(language, left, random), [], 0
    for cut, sentence in zip(cuts, sentences, strict=True):
        ids += [*text[done:cut], *sentence]
        done = cut
    return ids + text[done:]


def _text(language: Language, size: int, random: np.random.Generator) -> list[int]:
    """`size` tokens of running text from a random place on."""
    start = random.integers(len(language.filler))
    return np.take(language.filler, np.arange(start, start + size), mode="wrap").tolist()


def copy(language: Language, distance: int, random: np.random.Generator) -> Trial:
    """A passage of random words, then again its beginning, from which it is to be gone on with."""
    passage: list[int] = []
    while len(passage) < PASSAGE:
        passage += language.words[random.integers(len(language.words))]
    passage = passage[:PASSAGE]
    between = distance - PASSAGE
    if between < 0:
        passage, between = passage[:distance], 0
    ids = [*language.begin, *_text(language, LEAD, random), *passage, *_text(language, between, random), *passage]
    return Trial(ids, passage[CUE:], [], [])


SECRET = " The secret word of {} is"
TASKS: dict[str, Callable[[Language, int, np.random.Generator], Trial]] = {
    "needle": partial(facts, keys=KEYS.split(), said=SECRET, others=0),
    "multi_key": partial(facts, keys=KEYS.split(), said=SECRET, others=3),
    "multi_value": partial(facts, keys=KEYS.split(), said=SECRET, others=3, repeated=True),
    "lookup": partial(facts, keys=NAMES.split(), said=" {}:", others=4, together=True),
    "copy": copy,
}


# --- scores ----------------------------------------------------------------------------------------------------------


def _scored(model: PreTrainedModel, task: str, distance: int, trials: list[Trial], begin: int) -> RecallScore:
    """Means over the trials, which are cut to one length, after the `begin` tokens that the tokenizer puts first, and
    go through `model` in batches."""
    length = min(len(trial.ids) for trial in trials)
    rows = max(1, AT_ONCE.get(model.device.type, AT_ONCE["cpu"]) // length)
    found: list[tuple[float, float, float]] = []
    for start in range(0, len(trials), rows):
        batch = trials[start : start + rows]
        ids = torch.tensor([_cut(trial.ids, length, begin) for trial in batch])
        most = max(len(trial.answer) for trial in batch)
        guesses, first = _asked(model, ids, most, distance if task == "copy" else None)
        for place, trial in enumerate(batch):
            found.append(_judged(trial, guesses[place], first[place]))
    accuracy, exact, chance = np.mean(found, axis=0).tolist()
    return RecallScore(task=task, distance=distance, trials=len(trials), chance=chance, accuracy=accuracy, exact=exact)


def _cut(ids: list[int], length: int, begin: int) -> list[int]:
    return ids[:begin] + ids[begin + len(ids) - length :]


@torch.no_grad()
def _asked(model: PreTrainedModel, ids: Tensor, most: int, back: int | None) -> tuple[Tensor, Tensor]:
    """For the last `most` tokens of each row the logits that predict them; and greedy guesses, `back` tokens before."""
    device, head = model.device, Head(model)
    hidden = last_hidden(model, ids.to(device))
    logits = head(hidden[:, -most - 1 : -1]).float().cpu()
    if back is None:
        return logits, torch.zeros(len(ids), 0, dtype=torch.long)
    return logits, head(hidden[:, -most - 1 - back : -1 - back]).argmax(-1).cpu()


def _judged(trial: Trial, logits: Tensor, before: Tensor) -> tuple[float, float, float]:
    """Accuracy, whether the greedy answer is exact, and the accuracy of chance."""
    answer = torch.tensor(trial.answer)
    logits = logits[len(logits) - len(answer) :]
    greedy = logits.argmax(-1) == answer
    if not trial.options:
        before = before[len(before) - len(answer) :]
        return greedy.double().mean().item(), float(greedy.all()), (before == answer).double().mean().item()
    right = np.array(trial.right)
    options = torch.tensor(trial.options)
    best = logits[0, options].topk(int(right.sum())).indices.numpy()
    several = right.sum() > 1
    exact = bool((options[torch.from_numpy(right)] == logits[0].argmax()).any()) if several else bool(greedy.all())
    return float(right[best].mean()), float(exact), float(right.mean())
