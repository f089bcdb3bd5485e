"""Parts of the documents about speed and memory, made from raw results."""

import json
import math
from typing import Any

from benchmarks.decode import SHAPES, fastest, floor, ratio
from benchmarks.operators import median
from benchmarks.results import RESULTS, made_on, measured, versions


def operators() -> str:
    """Milliseconds of each operator on the CPU."""
    data = json.loads((RESULTS / "operators_cpu.json").read_text(encoding="utf-8"))
    times = {(r["operator"], r["length"], r["backward"]): 1000 * median(r["seconds"]) for r in data["rows"]}
    lengths = sorted({r["length"] for r in data["rows"]})
    lines = ["| operator | pass | " + " | ".join(f"T = {length:,}" for length in lengths) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(lengths))
    floors = {r["length"]: 1000 * r["floor"] for r in data["rows"]}
    lines.append(
        "| floor: q, k, v and output once | forward | " + " | ".join(f"{floors[n]:.2f}" for n in lengths) + " |"
    )
    for backward in (False, True):
        for name in dict.fromkeys(r["operator"] for r in data["rows"]):
            cells = []
            for length in lengths:
                ours, theirs = times[name, length, backward], times["causal softmax", length, backward]
                cells.append(f"{ours:.1f}" + (f" ({theirs / ours:.1f}×)" if name != "causal softmax" else ""))
            lines.append(f"| {name} | {'forward + backward' if backward else 'forward'} | {' | '.join(cells)} |")
    made = made_on(data)
    return "\n".join([*lines, "", f"Milliseconds, median of {len(data['rows'][0]['seconds'])}; {made}."])


def kernels() -> str:
    """Milliseconds of fused Liger Attention on a GPU, beside causal softmax attention's and the floor."""
    data = json.loads((RESULTS / "kernels_h100.json").read_text(encoding="utf-8"))
    found: dict[tuple[int, ...], dict[tuple[str, bool], dict[str, Any]]] = {}
    for row in data["rows"]:
        shape = tuple(row[name] for name in ("B", "T", "H", "KV", "D"))
        found.setdefault(shape, {})[row["operator"], row["backward"]] = row
    operators = [name for name in dict.fromkeys(row["operator"] for row in data["rows"]) if name != "causal softmax"]
    lines = ["| B × T, heads, D | pass | floor | causal softmax | " + " | ".join(operators) + " |"]
    lines.append("| --- | --- | ---: | ---: |" + " ---: |" * len(operators))
    for (B, T, H, KV, D), rows in found.items():
        for backward in (False, True):
            base = rows.get(("causal softmax", backward))
            cells = [_milliseconds(rows.get((name, backward)), base) for name in operators]
            any_row = next((row for (_, b), row in rows.items() if b == backward), None)
            if any_row is not None:
                start = f"| {B} × {T:,}, {H}/{KV}, {D} | {'forward + backward' if backward else 'forward'} | "
                lines.append(f"{start}{1000 * any_row['floor']:.2f} | {_milliseconds(base)} | {' | '.join(cells)} |")
    made = made_on(data)
    return "\n".join([*lines, "", f"Milliseconds, median; {made}. {data.get('note', '')}".rstrip()])


def _milliseconds(row: dict[str, Any] | None, base: dict[str, Any] | None = None) -> str:
    """With how many times faster than `base` it is."""
    if row is None or not row["seconds"]:
        return "–"
    ours = median(row["seconds"])
    return f"{1000 * ours:.2f}" + (f" ({median(base['seconds']) / ours:.1f}×)" if base else "")


TRAINED = {  # how a step was run, by the file with what was measured then
    "train_eager_h100": "operation by operation",
    "train_graph_h100": "one CUDA graph",
    "train_h100": "one CUDA graph, whole layers compiled",
}


def training() -> str:
    """Tokens per second of distillation: as it was, with steps as CUDA graphs, with whole layers compiled as well."""
    lines = [
        "| student | steps | batch × T | tokens/s | GPU idle | peak, GiB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    commits = []
    for name, kind in TRAINED.items():
        if (found := measured(name)) is None:
            continue
        data = found
        commits.append(f"{kind}: commit {data['commit']}")
        for row in (row for row in data["rows"] if "error" not in row):
            speed = row["batch"] * row["length"] / median(row["seconds"])
            lines.append(
                f"| {row['side']} | {kind} | {row['batch']} × {row['length']:,} | {speed:,.0f} | {row['idle']:.0%} | "
                f"{row['peak_bytes'] / 2**30:.1f} |"
            )
    made = f"{data['hardware']}, {versions(data['versions'])}"
    return "\n".join([*lines, "", f"`python -m benchmarks.train`, medians; {made}; {'; '.join(commits)}."])


def decoding() -> str:
    """A step's milliseconds, converted and as it was, beside the floor and the goal."""
    if (data := measured("decode_h100")) is None:
        return "Not measured yet."
    lines = ["| model | batch | context | floor | linearized | original | its GB/s | faster | goal | met |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | :-: |")
    order = {name: place for place, name in enumerate(SHAPES)}
    for row in sorted(data["rows"], key=lambda row: (order[row["model"]], row["batch"], row["context"])):
        lines.append(_decoding_row(row, data["copy_bytes_per_second"]))
    made = made_on(data)
    copy = f"copy {data['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    return "\n".join([*lines, "", f"Milliseconds of a step, median; {made}, {copy}."])


def decoding_at_16k() -> str:
    """The rows of `decoding` with 16 sequences of 16,384 tokens."""
    rows = [line for line in decoding().splitlines() if " | 16 | 16,384 | " in line]
    return "\n".join([*decoding().splitlines()[:2], *rows, "", decoding().splitlines()[-1]])


def _decoding_row(row: dict[str, Any], copy: float) -> str:
    start = f"| {row['model']} | {row['batch']} | {row['context']:,} | {1000 * floor(row, copy):.2f} |"
    goal, best, seconds = _decoding_goal(row), fastest(row), row["linearized"]["seconds"]
    if not seconds:
        return f"{start} {row['linearized']['error']} | | | | {goal:.2f}× | – |"
    ours = median(seconds)
    share = f"{1000 * ours:.2f} ({floor(row, copy) / ours:.0%})"
    if best is None:
        why = "; ".join(dict.fromkeys(form["error"] for form in row["original"].values()))
        return f"{start} {share} | {why} | – | – | {goal:.2f}× | – |"
    form, theirs = best
    speed = (row["weights_read"] + row["key_value"]) / theirs / 1e9
    met = "✓" if theirs / ours >= 0.98 * goal else "–"
    return (
        f"{start} {share} | {1000 * theirs:.2f} ({form}) | {speed:,.0f} | {theirs / ours:.2f}× | {goal:.2f}× | {met} |"
    )


def _decoding_goal(row: dict[str, Any]) -> float:
    """How many times faster a step is to be: by bytes, where bytes are what it waits for."""
    if row["model"] == "SmolLM2-135M":
        return 4 if (row["batch"], row["context"]) == (16, 16384) else 1
    return 1 + 0.75 * (ratio(row) - 1)


def generation() -> str:
    """The paper's table: seconds and GB to go from 128 tokens to a length, 16 sequences at once."""
    if (data := measured("decode_h100")) is None:
        return "Not measured yet."
    rows = sorted((row for row in data["rows"] if (row["model"], row["batch"]) == ("Llama-3-8B", 16)), key=_context)
    if len(rows) < 2:  # what lies between is summed up from the ends
        return "Not measured yet."
    lines = ["| up to | original | linearized |", "| ---: | ---: | ---: |"]
    spent = {"original": 0.0, "linearized": 0.0}
    before: dict[str, tuple[int, float]] = {}
    for row in rows:
        best, cells = fastest(row), []
        made = {"linearized": (median(row["linearized"]["seconds"]), row["linearized"]["bytes"])}
        if best is not None:
            made["original"] = best[1], row["original"][best[0]]["bytes"]
        for side in ("original", "linearized"):
            if side not in made:
                cells.append("out of memory")
                continue
            step, used = made[side]
            since, earlier = before.get(side, (128, step))
            spent[side] += (row["context"] - since) * (step + earlier) / 2
            before[side] = row["context"], step
            cells.append(f"{spent[side]:.1f} s, {(row['weights'] + used) / 1e9:.1f} GB")
        lines.append(f"| {row['context']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _context(row: dict[str, Any]) -> int:
    return row["context"]


def decoding_cpu() -> str:
    """Tokens per second on a CPU."""
    if (data := measured("decode_cpu")) is None:
        return "Not measured yet."
    medians = {row["side"]: median(row["seconds"]) for row in data["rows"]}
    lines = ["| side | tokens/s | linearized is faster by | cache, MiB |", "| --- | ---: | ---: | ---: |"]
    for row in data["rows"]:
        name, seconds = row["side"], medians[row["side"]]
        gain = "" if name == "linearized" else f"{seconds / medians['linearized']:.2f}×"
        lines.append(f"| {name} | {1 / seconds:.1f} | {gain} | {row['cache_bytes'] / 2**20:.1f} |")
    made = made_on(data)
    return "\n".join([*lines, "", f"After {data['context']:,} tokens, batch 1, fp32, median; {made}."])


def long_prompt() -> str:
    """A long prompt read in chunks: speed and memory by tokens."""
    if (data := measured("prompt_h100")) is None:
        return "Not measured yet."
    rows = [row for row in data["rows"] if math.log2(row["tokens"] / data["chunk"]).is_integer()]
    rows += [] if rows[-1] is data["rows"][-1] else data["rows"][-1:]
    lines = ["| tokens read | seconds | cache, bytes | peak, MiB |", "| ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {r['tokens']:,} | {r['seconds']:.1f} | {r['cache_bytes']:,} | {r['peak_bytes'] / 2**20:,.0f} |"
        for r in rows
    ]
    others = ", ".join(f"{error:.1e}" for error in data["other_chunks"])
    made = made_on(data)
    return "\n".join(
        [
            *lines,
            "",
            f"{data['model']}, chunks of {data['chunk']:,}, bf16; {made}. The last layer's state "
            f"after 20,000 tokens in chunks of 1,000, and in one call, differs by {others} of its norm.",
        ]
    )
