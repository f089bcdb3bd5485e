"""Where the late gap is: losses by what of a token was said before, and where.

    python -m benchmarks.gap benchmarks/rows/together.yaml default --data TEXT --heldout ARTICLES --out gap.json

Every late token is put into one of `KINDS`: by the longest run of up to three tokens, itself the last, that was there
before, and by whether that was in the window or beyond it. A row is read from --work, where `benchmarks.recovery` left
it, and trained if it is not there; the first one's length and articles count. Written after each row; rows of a result
file that is there already are kept.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.recovery import read_rows, recipe_of
from benchmarks.results import provenance, write
from linearize.checkpoint import unwrapped
from linearize.evaluate.late_gap import texts
from linearize.evaluate.perplexity import score
from linearize.train.documents import heldout_documents
from linearize.train.sequences import tokenize
from linearize.variants import load_base, train_variant

KINDS = {
    "near": "with the token before it, in the window",
    "three": "with both tokens before it, beyond the window",
    "two": "with the token before it, beyond the window",
    "window": "by itself, in the window",
    "one": "by itself, beyond the window",
    "new": "not yet",
}


def main() -> None:
    """Score the teacher and the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("only", nargs="+")
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--heldout", default="wiki")
    parser.add_argument("--window", type=int, default=64, help="tokens that count as near")
    parser.add_argument("--work", type=Path, default=Path("out/recovery"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.recipes = []
    given = {name: recipe_of(row, arguments) for name, row in read_rows(arguments).items()}
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else provenance() | {"losses": {}}
    first = next(iter(given.values()))
    base, settings = load_base(first), first.evaluation  # the training text is read where there is something to train
    documents = heldout_documents(first.data.heldout, settings.articles, first.data.train)
    tokens = tokenize(list(documents.values()), base.tokenizer)
    found = texts(tokens, list(documents), settings.lengths[0], settings.sequences)
    assert found is not None
    kinds = np.stack([kinds_of(row.tolist(), arguments.window) for row in found.ids])[:, found.ids.shape[1] // 2 :]
    results["tokens"] = {kind: int((kinds == kind).sum()) for kind in KINDS}
    for name in ("teacher", *given):
        if name in results["losses"]:
            continue
        model: Any = base.teacher
        if name != "teacher":
            model = unwrapped(train_variant(given[name], "converted", base, arguments.work / name).student).eval()
        results["losses"][name] = sums(score(model, found.ids, name).loss, kinds)
        print(name, {kind: round(sum(x) / results["tokens"][kind], 4) for kind, x in results["losses"][name].items()})
        write(arguments.out, results)


def kinds_of(ids: Sequence[int], window: int) -> np.ndarray:
    """Of `KINDS`, that of every token but the first: `[T - 1]`."""
    earliest: list[dict[tuple[int, ...], int]] = [{}, {}, {}]  # where a run of one, two and three tokens first ended
    latest: list[dict[tuple[int, ...], int]] = [{}, {}, {}]
    found = []
    for t in range(len(ids)):
        runs = [tuple(ids[t - n : t + 1]) for n in range(min(3, t + 1))]
        edge = t - window  # the query before the token sees from here on
        inside = [run in last and last[run] >= edge for run, last in zip(runs, latest, strict=False)]
        beyond = [start.get(run, t) < edge for run, start in zip(runs, earliest, strict=False)]
        if any(inside[1:2]):
            found.append("near")
        elif any(beyond[2:]):
            found.append("three")
        elif any(beyond[1:2]):
            found.append("two")
        else:
            found.append("window" if inside[0] else "one" if beyond[0] else "new")
        for run, start, last in zip(runs, earliest, latest, strict=False):
            start.setdefault(run, t)
            last[run] = t
    return np.array(found[1:])


def sums(loss: Float[Tensor, "N T-1"], kinds: np.ndarray) -> dict[str, list[float]]:
    """Nats of the late tokens of each kind, summed over each sequence."""
    late: Int[np.ndarray, "N late"] = loss[:, -kinds.shape[1] :].double().numpy()
    return {kind: [round(x, 4) for x in (late * (kinds == kind)).sum(1).tolist()] for kind in KINDS}


if __name__ == "__main__":
    with torch.no_grad():
        main()
