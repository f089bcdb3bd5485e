"""`--suite full`: what short benchmarks and perplexity cannot see, for the teacher, the converted model and baselines.

Each part is a function of one model that stands alone: `late_gap`, `recall`, `choice`, `generation`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.evaluate import choice
from linearize.evaluate.ablation import ablations, recurrence_off, window_off
from linearize.evaluate.generation import NEW_TOKENS, PROMPTS, generation
from linearize.evaluate.kept import Kept
from linearize.evaluate.late_gap import late_gap, late_losses, texts
from linearize.evaluate.recall import check_trials, recall
from linearize.measures import Generation, LateGap, RecallScore, Suite
from linearize.recipe import EvaluationSettings
from linearize.train.sequences import tokenize

Models = Mapping[str, PreTrainedModel]
OFF = {"recurrence_off": recurrence_off, "window_off": window_off}


def check(settings: EvaluationSettings) -> None:
    """Raise LinearizeError for what the suite would miss in the end: the harness, its data."""
    if settings.suite == "full" and settings.tasks:
        choice.check(settings.tasks)


def check_text(settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """The same for what cannot be asked in this tokenizer's tokens, or hidden in these texts."""
    if settings.suite == "full" and settings.distances:
        check_trials(tokenizer, texts, min(settings.distances))


def measure(
    settings: EvaluationSettings,
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    documents: Mapping[int, str],
    seconds: dict[str, float],
    kept: Kept,
) -> Suite:
    """All parts, for `models` ("teacher", "converted" and its baselines); `documents` are the held-out texts by number.

    What each part took is added to `seconds`, less what was `kept` before an interruption.
    """
    suite = Suite()
    with tqdm(total=4 * len(models), desc="suite", unit="part", delay=1) as bar:

        @contextmanager
        def part(name: str) -> Iterator[None]:
            started = time.perf_counter()
            yield
            seconds[name] = round(time.perf_counter() - started, 2)
            bar.update(len(models))

        with part("late gap"):
            suite.late = late_gaps(settings, models, tokenizer, documents, kept)
        with part("recall"):
            suite.recall = recalls(settings, models, tokenizer, documents, kept)
        with part("tasks"):
            add_tasks(suite, settings, models, tokenizer, kept)
        with part("generation"):
            suite.generation = generations(settings, models, tokenizer, kept)
    return suite


def late_gaps(
    settings: EvaluationSettings,
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    documents: Mapping[int, str],
    kept: Kept,
) -> list[LateGap]:
    """For each length that a document reaches."""
    tokens, numbers, gaps = tokenize(list(documents.values()), tokenizer), list(documents), []
    for length in settings.lengths:
        if (found := texts(tokens, numbers, length, settings.sequences)) is None:
            continue
        losses = {
            name: [kept(f"late {length} {name}", list[float], partial(late_losses, model, found.ids, name))]
            for name, model in _with_ablations(models)
        }
        gaps.append(late_gap(length, found.articles, losses))
    return gaps


def recalls(
    settings: EvaluationSettings,
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    documents: Mapping[int, str],
    kept: Kept,
) -> dict[str, list[RecallScore]]:
    """All tasks at all distances, hidden in the held-out texts."""
    given = tokenizer, list(documents.values()), settings.distances, settings.trials
    return {
        name: kept(f"recall {name}", list[RecallScore], partial(recall, model, *given, label=name))
        for name, model in _with_ablations(models)
    }


def add_tasks(
    suite: Suite, settings: EvaluationSettings, models: Models, tokenizer: PreTrainedTokenizerBase, kept: Kept
) -> None:
    """The multiple-choice tasks of every model, beside the teacher's."""
    if not settings.tasks:
        return
    expected: list[choice.Answers] | None = None
    for name, model in models.items():
        ask = partial(choice.answers, model, tokenizer, settings.tasks, settings.limit, label=name)
        found = kept(f"tasks {name}", list[choice.Answers], ask)
        suite.tasks[name] = choice.task_scores(found, expected)
        if expected is None:
            expected = found
        elif (difference := choice.short_tasks(found, expected)) is not None:
            suite.short_tasks[name] = difference


def generations(
    settings: EvaluationSettings, models: Models, tokenizer: PreTrainedTokenizerBase, kept: Kept
) -> dict[str, Generation]:
    """Of every model, judged by the teacher."""
    prompts = PROMPTS[: settings.limit]
    judge = models["teacher"]
    return {
        name: kept(f"generation {name}", Generation, partial(generation, model, judge, tokenizer, prompts, NEW_TOKENS))
        for name, model in models.items()
    }


def _with_ablations(models: Models) -> Iterator[tuple[str, PreTrainedModel]]:
    """Each model by its name, then the converted one without its recurrence and without its window."""
    yield from models.items()
    if "converted" in models and ablations(models["converted"]):
        for name, off in OFF.items():
            with off(models["converted"]):
                yield name, models["converted"]
