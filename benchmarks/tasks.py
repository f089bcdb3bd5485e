"""The whole sets of the paper's tasks, for a row that `benchmarks.recovery` trained and for its teacher.

    python -m benchmarks.tasks benchmarks/rows/claim.yaml converted-0 --data TEXT --heldout ARTICLES --out tasks.json

The row is read from --work, where `benchmarks.recovery` left it, and trained if it is not there. Written after each
task; a result file that is there already is gone on from.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks.recovery import read_rows, recipe_of
from benchmarks.results import provenance, write
from linearize.checkpoint import unwrapped
from linearize.evaluate.choice import LOCAL, Answers, answers, short_tasks, task_scores
from linearize.measures import TaskScore
from linearize.variants import load_base, train_variant


def main() -> None:
    """Score the teacher and the row in one task after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("row")
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--heldout", default="wiki")
    parser.add_argument("--tasks", nargs="+", default=list(LOCAL))
    parser.add_argument("--limit", type=int, help="items of each task at most")
    parser.add_argument("--work", type=Path, default=Path("out/recovery"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.recipes, arguments.only = [], [arguments.row]
    recipe = recipe_of(read_rows(arguments)[arguments.row], arguments)
    base = load_base(recipe)  # the training text is read where there is something to train
    teacher, tokenizer = base.teacher, base.tokenizer
    student = unwrapped(train_variant(recipe, "converted", base, arguments.work / arguments.row).student).eval()
    kept = arguments.out.with_suffix(".answers.json")
    found: dict[str, list[Answers]] = {"teacher": [], "converted": []}
    if kept.is_file():
        found = {name: [Answers(*one) for one in every] for name, every in json.loads(kept.read_text()).items()}
    for task in arguments.tasks:
        if task in {one.task for one in found["converted"]}:
            continue
        start = time.perf_counter()
        for name, model in (("teacher", teacher), ("converted", student)):
            found[name] += answers(model, tokenizer, [task], arguments.limit, label=f"{task} {name}")
        scores = {"teacher": task_scores(found["teacher"], None)}
        scores["converted"] = task_scores(found["converted"], found["teacher"])
        ours = short_tasks(found["converted"], found["teacher"])
        results = {
            **provenance(),
            "row": arguments.row,
            "tasks": {name: [score.model_dump() for score in every] for name, every in scores.items()},
            "short_tasks": {"converted": ours.model_dump()} if ours else {},
        }
        write(arguments.out, results)
        write(kept, found)
        lines = [describe(score) for score in scores["converted"] if score.task == task]
        print(f"{task}, {time.perf_counter() - start:.0f} s", *lines, sep="\n", flush=True)


def describe(score: TaskScore) -> str:
    """A line for the terminal."""
    apart = score.difference
    assert apart is not None
    return (
        f"    {score.task} {score.metric} {score.score:.4f}, {apart.value:+.4f} ({apart.low:+.4f} to {apart.high:+.4f})"
    )


if __name__ == "__main__":
    main()
