r"""Ways to choose what stays softmax attention, against each other: late loss and recall of what they chose.

    python -m benchmarks.selection --data TEXT --heldout ARTICLES --out docs/results/selection.json
    python -m benchmarks.selection --heads --data TEXT --heldout ARTICLES --articles 1-20 \
        --out docs/results/selection_heads.json

Layers, or key/value heads, are chosen on the training text; the chosen ones, left full in an untrained conversion to
window and sinks, are measured on other texts, as are evenly spaced ones, those given by `--sets`, the window alone and
the teacher. Finished rows are kept, so that the same command goes on where it was; results are printed and written as
they come.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import provenance, write
from linearize import recipe as recipes
from linearize.convert import choose_layers
from linearize.probes import probes
from linearize.select import Candidates, by_alignment, by_gain, uniform
from linearize.train.documents import heldout_documents, load_documents
from linearize.variants import load_base, mixer_of

KEEP = (1, 3, 4)
KEEP_HEADS = (3, 9, 18)
SELECTORS = ("gradient", "late", "recall", "both")


def main() -> None:
    """Run the rows that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--heldout", default="wiki")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=8, help="to choose on")
    parser.add_argument("--trials", type=int, default=12, help="needles of each length to choose on")
    parser.add_argument("--heldout-sequences", type=int, default=20)
    parser.add_argument("--heldout-trials", type=int, default=50)
    parser.add_argument("--align-tokens", type=int, default=32_768, help="0: do not align")
    parser.add_argument("--articles", help="held-out documents by their numbers, like 1-20; else all")
    parser.add_argument("--heads", action="store_true", help="choose key/value heads, not layers")
    parser.add_argument("--window", type=int, default=64, help="in all layers")
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    parser.add_argument("--no-greedy", action="store_true", help="score each for itself alone")
    parser.add_argument("--sets", nargs="*", default=[], help="more layers to measure, as in 20,21,23")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing further after this long")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    started = time.perf_counter()
    what = ("out", "seconds", "sets", "selectors", "no_greedy")  # may differ from call to call
    given = {name: value for name, value in vars(arguments).items() if name not in what}
    results: dict[str, Any] = {**provenance(), "settings": given, "selectors": {}, "rows": {}}
    if arguments.out.is_file():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
        if results["settings"] != given:
            raise SystemExit(f"{arguments.out} was made with {results['settings']}, not {given}; give another --out")
    choosing, measuring, align = prepare(arguments)
    count, counts = len(measuring.units), KEEP_HEADS if arguments.heads else KEEP

    def measure(name: str, units: list[int]) -> None:
        if name not in results["rows"] and time.perf_counter() - started < arguments.seconds:
            row = {"kept": [measuring.name(unit) for unit in sorted(units)], **measuring.measure(units).model_dump()}
            results["rows"][name] = row | {"function": measuring.function(units)[:12]}
            print(name, json.dumps(results["rows"][name]), flush=True)
            write(arguments.out, results)

    measure("teacher", list(range(count)))
    measure("window", [])
    for keep in counts:
        measure(f"uniform {keep}", uniform(keep, count))
    for layers in arguments.sets:
        chosen = choose_layers(layers, None, len(measuring.units) // measuring.of_layer)
        heads = range(measuring.of_layer)
        measure(layers, [layer * measuring.of_layer + head for layer in chosen for head in heads])
    selectors: dict[str, Callable[[], Any]] = {"align": align} if arguments.align_tokens and not arguments.heads else {}
    for name in arguments.selectors:
        selectors[name] = partial(by_gain, choosing, max(counts), name, greedy=False)
        if not arguments.no_greedy:
            selectors[f"{name}, greedy"] = partial(by_gain, choosing, max(counts), name, greedy=True)
    for name, choose in selectors.items():
        if name not in results["selectors"] and time.perf_counter() - started < arguments.seconds:
            begun = time.perf_counter()
            try:
                kept, rounds = choose()
            except Exception as error:  # one selector that fails, as where memory runs out, does not end the others
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                continue
            seconds = round(time.perf_counter() - begun, 1)
            results["selectors"][name] = {"kept": kept, "rounds": rounds, "seconds": seconds}
            write(arguments.out, results)
        if name in results["selectors"]:
            for keep in counts:
                measure(f"{name} {keep}", results["selectors"][name]["kept"][:keep])


def prepare(arguments: argparse.Namespace) -> tuple[Candidates, Candidates, Callable[[], Any]]:
    """What layers are chosen with, what the chosen are measured with, and the selector that aligns."""
    tokens = arguments.align_tokens
    keys = {
        "model": arguments.model,
        "seed": arguments.seed,
        "data.train": arguments.data,
        "data.heldout": arguments.heldout,
        "data.sequence_length": arguments.length,
        "align.tokens": max(tokens, 1),
        "mixer.window": arguments.window,
    }
    recipe = recipes.read("default", ["distill=null"], keys)
    base = load_base(recipe, ["window_only"], train=tokens > 0)
    mixer = mixer_of(recipe, "window_only", base.teacher)
    chosen = Candidates(
        base.teacher,
        mixer,
        probes(
            load_documents(arguments.data, "train"),
            base.tokenizer,
            arguments.length,
            arguments.sequences,
            arguments.trials,
            arguments.seed,
            arguments.data,
        ),
        arguments.heads,
    )
    other = arguments.seed + 1  # of needles and their places
    texts = list(heldout_documents(arguments.heldout, arguments.articles, arguments.data).values())
    counts = arguments.heldout_sequences, arguments.heldout_trials
    measured = Candidates(
        base.teacher,
        mixer,
        probes(texts, base.tokenizer, arguments.length, *counts, other, arguments.heldout),
        arguments.heads,
    )
    return chosen, measured, partial(by_alignment, recipe, base, max(KEEP), tokens)


if __name__ == "__main__":
    main()
