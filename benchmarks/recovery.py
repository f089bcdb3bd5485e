"""How much of the teacher comes back, by recipe: rows of (recipe, overrides), each trained and scored once.

    python -m benchmarks.recovery --recipes default window-only lolcats-like --out docs/results/recovery.json
    python -m benchmarks.recovery ROWS.yaml --data TEXT --heldout TEXT --out docs/results/screening.json

ROWS.yaml (`benchmarks/rows` has some) maps a row's name to `--set` overrides of the default recipe; those under
`common` come first in each, and `recipe=NAME` starts from another recipe. Finished rows are kept, so that an
interrupted run goes on where it was; results are printed and written as they come. Several GPUs take rows in turn.
"""

import argparse
import hashlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from benchmarks.results import provenance, write
from linearize import recipe as recipes
from linearize.checkpoint import unwrapped
from linearize.evaluate.ablation import ablations, recurrence_off
from linearize.evaluate.late_gap import Texts, texts
from linearize.evaluate.layers import layer_statistics
from linearize.evaluate.perplexity import score, summarize
from linearize.evaluate.recall import TASKS, recall
from linearize.inspect import inspect
from linearize.recipe import Recipe
from linearize.train.documents import heldout_documents
from linearize.train.sequences import tokenize
from linearize.variants import Base, load_base, train_variant


def main() -> None:
    """Run the rows that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="?")
    parser.add_argument("--recipes", nargs="+", default=[], help="shipped recipes or files, each a row")
    parser.add_argument("--only", nargs="+", help="these rows alone, in this order")
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--heldout", default="wiki")
    parser.add_argument("--distances", type=int, nargs="*", default=[], help="of recall, which is left out by default")
    parser.add_argument("--trials", type=int, default=24, help="of recall, for each task and distance")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of recall")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/recovery"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further row after this long")
    parser.add_argument("--devices", type=int, default=1, help="GPUs that take rows in turn")
    parser.add_argument("--workers", type=int, default=1, help="rows at once on each GPU")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {**provenance(), "rows": {}}
    rows = read_rows(arguments)
    missing = {name: given for name, given in rows.items() if "late_loss" not in results["rows"].get(name, {})}
    until = time.time() + arguments.seconds
    arguments.teacher = "teacher" not in results  # it is scored once
    todo = [(name, given, list(rows.values()), arguments, until) for name, given in missing.items()]
    for name, row in _in_turn(todo, arguments.devices, arguments.workers):
        if name == "teacher":
            results["teacher"] = row
        else:
            results["rows"][name] = {"set": rows[name], **row}
        print(name, _line(row), flush=True)
        write(arguments.out, results)


def read_rows(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Overrides by row, those under `common` first."""
    rows = {name: [f"recipe={name}"] for name in arguments.recipes}
    given = yaml.safe_load(arguments.rows.read_text()) if arguments.rows else {}
    common = given.pop("common", [])
    rows |= {name: [*common, *own] for name, own in given.items()}
    return rows if arguments.only is None else {name: rows[name] for name in arguments.only}


def _in_turn(todo: list[Any], devices: int, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results as they come: of this process, or of several for each GPU."""
    if devices * workers == 1:
        for task in todo:
            yield from run_row(*task)
        return
    context = get_context("spawn")
    tasks, found = context.Queue(), context.Queue()
    for task in [*todo, *[None] * devices * workers]:
        tasks.put(task)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices)))).split(",")
    if len(visible) < devices:
        raise SystemExit(f"--devices {devices}, but CUDA_VISIBLE_DEVICES has {len(visible)}: {','.join(visible)}")
    for number in range(devices * workers):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % devices]  # read when the process starts
        context.Process(target=_work_off, args=(tasks, found), daemon=True).start()
    for _ in range(devices * workers):
        yield from iter(found.get, None)


def _work_off(tasks: Any, found: Any) -> None:
    for task in iter(tasks.get, None):
        for result in run_row(*task):
            found.put(result)
    found.put(None)


_kept: dict[tuple[str, int], Base] = {}  # of this process: what rows of one text share


def run_row(
    name: str, given: list[str], every: list[list[str]], arguments: argparse.Namespace, until: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train and score one row; before a process's first one, the teacher. What fails is told in its result."""
    if time.time() > until:
        return
    recipe = recipe_of(given, arguments)
    try:
        first, base = not _kept, _base(recipe, [recipe_of(row, arguments) for row in every])
        if first and arguments.teacher:
            yield "teacher", measure(recipe, base.teacher, "teacher", arguments)
        yield name, _row(name, recipe, base, arguments)
    except Exception as error:  # whatever it is, other rows do not depend on it
        traceback.print_exc()
        yield name, {"error": f"{type(error).__name__}: {error}"[:500]}


def recipe_of(given: list[str], arguments: argparse.Namespace) -> Recipe:
    """The recipe of a row."""
    source = next((item.removeprefix("recipe=") for item in given if item.startswith("recipe=")), "default")
    own = [item for item in given if not item.startswith("recipe=")]
    return recipes.read(source, [f"data.train={arguments.data}", f"data.heldout={arguments.heldout}", *own])


def _base(recipe: Recipe, every: list[Recipe]) -> Base:
    """The teacher, and tokens of the row's training text, as many as the row needs that needs most of it."""

    def text(recipe: Recipe) -> tuple[str, int]:
        return recipe.data.train, recipe.data.shortest

    def most(recipe: Recipe) -> int:
        return max((stage.tokens for stage in (recipe.align, recipe.distill) if stage is not None), default=0)

    if text(recipe) not in _kept:
        longest = max((other for other in every if text(other) == text(recipe)), key=most)
        base = load_base(longest, train=most(longest) > 0)
        for other in _kept.values():
            base = base._replace(teacher=other.teacher)
        _kept[text(recipe)] = base
    return _kept[text(recipe)]


def _row(name: str, recipe: Recipe, base: Base, arguments: argparse.Namespace) -> dict[str, Any]:
    trained = train_variant(recipe, "converted", base, work_of(name, recipe, arguments.work))
    model = unwrapped(trained.student).eval()
    row = measure(recipe, model, name, arguments)
    row["tokens"] = trained.tokens
    row["seconds"] = {curve.stage: curve.seconds for curve in trained.curves}
    row["last_losses"] = {curve.stage: curve.loss[-1] for curve in trained.curves}
    found = inspect(model)
    row["new_parameters"] = found.new_parameters
    row["cache_bytes"] = found.cache_bytes(recipe.evaluation.sequence_length)
    if ablations(model):
        with recurrence_off(model):
            row["recurrence_off"] = measure(recipe, model, f"{name} without recurrence", arguments)
        layers = layer_statistics(model, next(iter(_texts(recipe))).ids[0])
        row["mean_mixing"] = sum(sum(x.mixing) / len(x.mixing) for x in layers) / len(layers)
        row["mean_decay_tokens"] = sum(sum(x.decay_tokens) / len(x.decay_tokens) for x in layers) / len(layers)
    if torch.cuda.is_available():
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return row


def work_of(name: str, recipe: Recipe, work: Path) -> Path:
    """Where a row's weights are kept: others of its name, in other files of rows, were trained by another recipe."""
    how = recipe.model_dump_json(exclude={"evaluation"})
    return work / f"{name}-{hashlib.sha256(how.encode()).hexdigest()[:8]}"


def _texts(recipe: Recipe) -> Iterator[Texts]:
    """Held-out sequences of every length of the recipe, as far as there are texts as long as that."""
    settings, tokenizer = recipe.evaluation, next(iter(_kept.values())).tokenizer
    documents = heldout_documents(recipe.data.heldout, settings.articles, recipe.data.train)
    tokens = tokenize(list(documents.values()), tokenizer)
    for length in settings.lengths:
        if (found := texts(tokens, list(documents), length, settings.sequences)) is not None:
            yield found


def measure(recipe: Recipe, model: PreTrainedModel, label: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Losses at the first length, the late loss of every sequence of all lengths, and recall."""
    row: dict[str, Any] = {}
    for found in _texts(recipe):
        scores, length = score(model, found.ids, label), found.ids.shape[1]
        if not row:
            keys = {"perplexity", "early_loss", "late_loss"}
            row = summarize(scores, None, length).model_dump(include=keys) | {"late": {}, "articles": {}}
        row["late"][str(length)] = [round(x, 4) for x in scores.loss[:, length // 2 :].double().mean(1).tolist()]
        row["articles"][str(length)] = found.articles
    if arguments.distances:
        documents = heldout_documents(recipe.data.heldout, recipe.evaluation.articles, recipe.data.train)
        filler, tokenizer = list(documents.values()), next(iter(_kept.values())).tokenizer
        given = recall(model, tokenizer, filler, arguments.distances, arguments.trials, arguments.tasks, label=label)
        row["recall"] = [cell.model_dump() for cell in given]
    return row


def _line(row: dict[str, Any]) -> str:
    keys = ("perplexity", "early_loss", "late_loss", "mean_mixing", "peak_gib")
    line = " ".join(f"{key}={row[key]:.4f}" for key in keys if row.get(key) is not None)
    if "recurrence_off" in row:
        line += f" recurrence off {row['recurrence_off']['late_loss']:.4f}"
    return f"{line} {row.get('seconds', '')} {row.get('error', '')}"


if __name__ == "__main__":
    main()
