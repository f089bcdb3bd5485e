"""How much of the teacher comes back, by recipe: rows of (recipe, overrides), each trained and scored once.

    python -m benchmarks.recovery ROWS.yaml --data TEXT --heldout TEXT --out docs/results/recovery.json

ROWS.yaml (`benchmarks/screening.yaml` is one) maps a row's name to `--set` overrides of the default recipe; those under
`common` come first in each. Finished rows are kept, so that an interrupted run goes on where it was; results are
printed and written as they come.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.results import provenance, write
from linearize import recipe as recipes
from linearize.checkpoint import unwrapped
from linearize.evaluate import recurrence_off
from linearize.evaluate.layers import layer_statistics
from linearize.evaluate.perplexity import Scores, score, summarize
from linearize.run import Base, load_base, train_variant
from linearize.train.data import heldout_documents, heldout_sequences, tokenize


def main() -> None:
    """Run the rows that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--heldout", default="wiki")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/recovery"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further row after this long")
    arguments = parser.parse_args()
    started = time.perf_counter()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {**provenance(), "rows": {}}
    base = expected = None
    rows = yaml.safe_load(arguments.rows.read_text())
    results["common"] = common = rows.pop("common", [])
    for name, own in rows.items():
        overrides = [*common, *own]
        if name in results["rows"] or time.perf_counter() - started > arguments.seconds:
            continue
        given = [f"data.train={arguments.data}", f"data.heldout={arguments.heldout}", *overrides]
        recipe = recipes.read("default", given)
        base = base or load_base(recipe)
        heldout = _heldout(recipe, base)
        if expected is None:
            expected = score(base.teacher, heldout, "teacher")
            results["teacher"] = summarize(expected, None, 32).model_dump(exclude={"loss_by_position"})
            print("teacher", _line(results["teacher"]), flush=True)
        results["rows"][name] = {"set": overrides, **_row(recipe, base, heldout, expected, arguments.work / name)}
        print(name, _line(results["rows"][name]), flush=True)
        write(arguments.out, results)


def _heldout(recipe: recipes.Recipe, base: Base) -> torch.Tensor:
    texts = heldout_documents(recipe.data.heldout, recipe.evaluation.articles, recipe.data.train)
    documents = tokenize(list(texts.values()), base.tokenizer)
    return heldout_sequences(documents, recipe.evaluation.sequence_length, recipe.evaluation.sequences)


def _row(recipe: recipes.Recipe, base: Base, heldout: torch.Tensor, expected: Scores, work: Path) -> dict[str, Any]:
    trained = train_variant(recipe, "converted", base, work)
    model = unwrapped(trained.student).eval()
    scores = score(model, heldout)
    measured = summarize(scores, expected, 32, trained_tokens=trained.tokens)
    row = measured.model_dump(exclude={"loss_by_position", "window"}) | {
        "seconds": {c.stage: c.seconds for c in trained.curves}
    }
    row["late_by_sequence"] = score_late(scores)
    row["last_losses"] = {curve.stage: curve.loss[-1] for curve in trained.curves}
    if recipe.mixer.values("structure") != ["none"]:
        with recurrence_off(model):
            row["late_loss_recurrence_off"] = summarize(score(model, heldout), expected, 32).late_loss
        layers = layer_statistics(model, heldout[0])
        row["mean_mixing"] = sum(sum(x.mixing) / len(x.mixing) for x in layers) / len(layers)
        row["mean_decay_tokens"] = sum(sum(x.decay_tokens) / len(x.decay_tokens) for x in layers) / len(layers)
    if torch.cuda.is_available():
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return row


def score_late(scores: Scores) -> list[float]:
    """The late loss of each sequence, for intervals."""
    return [round(x, 4) for x in scores.loss[:, (scores.loss.shape[1] + 1) // 2 :].double().mean(1).tolist()]


def _line(row: dict[str, Any]) -> str:
    keys = ("perplexity", "early_loss", "late_loss", "late_loss_recurrence_off", "agreement", "mean_mixing", "peak_gib")
    line = " ".join(f"{key}={row[key]:.4f}" for key in keys if row.get(key) is not None)
    return f"{line} {row.get('seconds', '')}"


if __name__ == "__main__":
    main()
