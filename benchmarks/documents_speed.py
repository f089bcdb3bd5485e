"""Parts of the documents about speed and memory, made from raw results."""

import json
import math
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from benchmarks.decode import SHAPES, fastest, floor, ratio
from benchmarks.operators import median
from benchmarks.results import RESULTS, made_on, measured, versions
from benchmarks.train import GOALS
from linearize.ops.liger import DELTA


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
    data = json.loads((RESULTS / "kernels_h200.json").read_text(encoding="utf-8"))
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


def peers() -> str:
    """Milliseconds of the fused operator beside FlexAttention and fla."""
    if (data := measured("peers_h200")) is None:
        return "Not measured yet."
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in data["rows"]:
        side, gate = row["operator"].split(" ", 1)
        shape = tuple(row[name] for name in ("B", "T", "H", "KV", "D"))
        found.setdefault((*shape, gate, row["backward"]), {})[side] = row
    lines = ["| B × T, heads, D | gate | pass | fused | FlexAttention and fla | fla's recurrence alone |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: |")
    for (B, T, H, KV, D, gate, backward), sides in found.items():
        ours = median(sides["fused"]["seconds"])
        cells = [f"{1000 * ours:.2f}"]
        for name in ("separate", "fla"):
            theirs = sides.get(name)
            if theirs is not None and theirs["seconds"]:
                seconds = median(theirs["seconds"])
                cells.append(f"{1000 * seconds:.2f} ({seconds / ours:.1f}×)")
            else:
                refused = theirs is not None and theirs["error"].startswith("RuntimeError: Triton >=")
                cells.append("refused" if refused else "–" if theirs is None else theirs["error"])
        what = f"| {B} × {T:,}, {H}/{KV}, {D} | {gate} | {'forward + backward' if backward else 'forward'} |"
        lines.append(f"{what} {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Medians. {made_on(data)}."])


ERRORS = {  # columns, and whose worst errors stand in them; where there are several, a slash parts them
    "forward": (("output",), ("state",)),
    "gradients": (
        ("dq", "dk", "dv"),
        ("dmixing", "dlog_g", "dbeta"),
        ("dstate",),
    ),
}
SIZES = (64, 128)


def errors() -> str:
    """The kernels against float64 on a GPU: the worst relative errors by inputs and head size."""
    found = [measured(name) for name in ("errors_h100", "delta_h100", "decode_smoke_h100")]
    if None in found:
        return "Not measured yet."
    fused, alone, step = (data for data in found if data is not None)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in [*fused["rows"], *alone["errors"]]:
        rule = "delta rule, any gates"
        if "gate" in row:
            rule = "Liger Attention, delta rule" if row["gate"] in DELTA else "Liger Attention, decay"
        groups.setdefault((rule, f"{row['T']:,} tokens" if row["T"] > 1000 else row["kind"]), []).append(row)
    lines = ["| kernels | inputs | " + " | ".join(f"{what}, D = {D}" for what in ERRORS for D in SIZES) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(ERRORS) * len(SIZES))
    for (rule, kind), rows in groups.items():
        cells = [_worst([row for row in rows if row["D"] == D], names) for names in ERRORS.values() for D in SIZES]
        lines.append(f"| {rule} | {kind} | {' | '.join(cells)} |")
    steps = [1000 * max(error for name, error in step["found"].items() if f" D={D} " in name) for D in SIZES]
    lines.append(f"| decoding step, every gate | ten steps | {' | '.join(f'{x:.1f}' for x in steps)} | – | – |")
    gates = ", ".join(f"`{gate}`" for gate in sorted({row["gate"] for row in fused["rows"]}))
    commits = ", ".join(dict.fromkeys(x for data in (fused, alone, step) for x in data["commit"].split(", ")))
    return "\n".join(
        [
            *lines,
            "",
            f"Thousandths of the norm, the worst of all gates: {gates}. {fused['hardware']}, "
            f"{versions(fused['versions'])}, commits {commits}.",
        ]
    )


def _worst(rows: list[dict[str, Any]], names: tuple[tuple[str, ...], ...]) -> str:
    """In thousandths."""
    found = [[row[name] for row in rows for name in some if name in row] for some in names]
    return " / ".join(f"{1000 * max(some):.1f}" for some in found) if all(found) else "–"


def delta_times() -> str:
    """Milliseconds of the delta rule of one layer in training, by its kernels and by PyTorch's chunks."""
    if (data := measured("delta_h100")) is None:
        return "Not measured yet."
    rows = [row for row in data["times"] if "error" not in row]
    shape = itemgetter("B", "T", "D", "backward")
    chunked = {shape(row): 1000 * median(row["seconds"]) for row in rows if row["operator"] == "chunked"}
    lines = ["| B × T, D | pass | PyTorch's chunks | kernels |", "| --- | --- | ---: | ---: |"]
    for row in (row for row in rows if row["operator"] == "kernels"):
        ours, theirs = 1000 * median(row["seconds"]), chunked.get(shape(row))
        compared = f"– | {ours:.3f}" if theirs is None else f"{theirs:.3f} | {ours:.3f} ({theirs / ours:.1f}×)"
        what = "forward + backward" if row["backward"] else "forward"
        lines.append(f"| {row['B']} × {row['T']:,}, {row['D']} | {what} | {compared} |")
    return "\n".join([*lines, "", f"Milliseconds, median; {made_on(data)}."])


def training(name: str) -> str:
    """Distillation: tokens per second, beside the window alone and the original attention, and the goals."""
    if (data := measured(name)) is None:
        return "Not measured yet."
    lines = [
        "| student | batch × T | documents in all | step, ms | teacher's forward | tokens/s | GPU idle | peak, GiB |"
    ]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = sorted((row for row in data["rows"] if "error" not in row), key=_place)
    for row in rows:
        lines.append(
            f"| {row['side']} | {_batch(row)} | {_gpus(row) * row['batch'] * row['documents']} | "
            f"{1000 * median(row['seconds']):.1f} | "
            f"{_teachers(row)} | {_speed(row):,.0f} | {row['idle']:.1%} | "
            f"{row['peak_bytes'] / 2**30:.1f} |"
        )
    lines += ["", "| goal of the default recipe | reached | met |", "| --- | ---: | :-: |"]
    goals = [goal for length in (2048, 32768) for goal in _training_goals(rows, length)]
    lines += [f"| {goal} | {reached} | {'✓' if met else '–'} |" for goal, reached, met in goals]
    return "\n".join([*lines, "", f"`python -m benchmarks.train`, medians; {made_on(data)}."])


def training_models() -> str:
    """Distillation of larger models."""
    if (data := measured("train_models_h200")) is None:
        return "Not measured yet."
    lines = [
        "| model | student | batch × T | gradient checkpointing | step, ms | teacher's forward | tokens/s | peak, GiB |"
    ]
    lines.append("| --- | --- | --- | :-: | ---: | ---: | ---: | ---: |")
    for row in data["rows"]:
        lines.append(
            f"| {row['model']} | {row['side']} | {_batch(row)} | {'✓' if row['gradient_checkpointing'] else '–'} | "
            f"{1000 * median(row['seconds']):.1f} | {_teachers(row)} | {_speed(row):,.0f} | "
            f"{row['peak_bytes'] / 2**30:.1f} |"
        )
    return "\n".join([*lines, "", f"Medians; {made_on(data)}."])


def _place(row: dict[str, Any]) -> tuple[int, ...]:
    """In the table: one GPU first, large steps before small ones, and the default before what it is compared with."""
    return _gpus(row), row["length"], -row["batch"], row["documents"], GOALS.index(row["side"])


def _gpus(row: dict[str, Any]) -> int:
    """Processes, of a GPU each, that had a batch of their own."""
    return row.get("processes", 1)


def _batch(row: dict[str, Any]) -> str:
    """Sequences and their length, of each GPU."""
    batch = f"{row['batch']} × {row['length']:,}"
    return batch if _gpus(row) == 1 else f"{_gpus(row)} GPUs, {batch} each"


def _speed(row: dict[str, Any]) -> float:
    """Tokens per second, of all GPUs."""
    return _gpus(row) * row["batch"] * row["length"] / median(row["seconds"])


def _teachers(row: dict[str, Any]) -> str:
    """Milliseconds of its forward pass, if it was timed as it runs in a step."""
    return f"{1000 * median(row['teacher_seconds']):.1f}" if "teacher_seconds" in row else "–"


def _students(row: dict[str, Any]) -> float:
    """The student's part of a step: all but the teacher's forward pass."""
    return median(row["seconds"]) - median(row["teacher_seconds"])


def _training_goals(rows: list[dict[str, Any]], length: int) -> Iterator[tuple[str, str, bool]]:
    """Each goal, what was reached, and whether that is enough."""
    long = length == 32768  # of one document, where softmax attention has most to do
    alone = [row for row in rows if _gpus(row) == 1]
    step = [row for row in alone if row["length"] == length and row["batch"] * length == 32768]
    sides = {row["side"]: row for row in step if row["documents"] == 1 or not long}
    if not {"default", "window only", "original attention"} <= sides.keys():
        yield f"{length:,} tokens{' in one document' if long else ''}: all of it", "not measured", False
        return
    ours, window, original = (sides[name] for name in ("default", "window only", "original attention"))
    what, least = "the student's part {}.0 times the original attention's speed", 1 if length < 32768 else 4
    if all("teacher_seconds" in row for row in (ours, original)):
        faster = _students(original) / _students(ours)
        reached = f"{faster:.2f}"
    else:  # where its whole step is the longer one, its part of it is no better
        faster = median(original["seconds"]) / median(ours["seconds"])
        assert faster < 1
        reached = f"at most {faster:.2f}"
    yield f"{length:,} tokens: {what.format(least)}", reached, faster >= least
    if length < 32768:
        share = _speed(ours) / _speed(window)
        yield f"{length:,} tokens: 0.9 of the tokens/s of the window alone", f"{share:.2f}", share >= 0.9
        yield f"{length:,} tokens: 150,000 tokens/s", f"{_speed(ours):,.0f}", _speed(ours) >= 150_000
    yield f"{length:,} tokens: GPU idle for less than 10 % of a step", f"{ours['idle']:.1%}", ours["idle"] < 0.1


def decoding(name: str) -> str:
    """A step's milliseconds, converted and as it was, beside the floor and the goal, of the results called `name`."""
    if (data := measured(name)) is None:
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
    """Milliseconds of a step of 16 sequences of 16,384 tokens, converted and as it was."""
    if (data := measured("decode_default_h200")) is None:
        return "Not measured yet."
    lines = ["| model | original | linearized | faster |", "| --- | ---: | ---: | ---: |"]
    for row in data["rows"]:
        if (row["batch"], row["context"]) == (16, 16384) and (best := fastest(row)) is not None:
            ours, theirs = median(row["linearized"]["seconds"]), best[1]
            cells = f"{1000 * theirs:.2f} | {1000 * ours:.2f} | {theirs / ours:.2f}×"
            lines.append(f"| {row['model']} | {cells} |")
    return "\n".join([*lines, "", f"Milliseconds, median; {made_on(data)}."])


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
    if met == "✓" and "compiled" not in row["original"]:
        met = "(✓)"
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
    if (data := measured("decode_default_h200")) is None:
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
    return "\n".join([*lines, "", f"{made_on(data)}."])


def _context(row: dict[str, Any]) -> int:
    return row["context"]


def decoding_cpu() -> str:
    """Tokens per second on a CPU."""
    if (data := measured("decode_cpu")) is None:
        return "Not measured yet."
    medians = {row["side"]: median(row["seconds"]) for row in data["rows"]}
    others = [side for side in medians if side not in ("gla", "default")]
    lines = [
        f"| side | tokens/s | faster than {' | than '.join(others)} | cache, MiB |",
        "| --- | ---: |" + " ---: |" * (len(others) + 1),
    ]
    for row in data["rows"]:
        seconds = medians[row["side"]]
        gains = [f"{medians[name] / seconds:.2f}×" if row["side"] in ("gla", "default") else "" for name in others]
        lines.append(f"| {row['side']} | {1 / seconds:.1f} | {' | '.join(gains)} | {row['cache_bytes'] / 2**20:.1f} |")
    made = made_on(data)
    alone = " and ".join(f"{1000 * median(taken):.1f} ms {name}" for name, taken in data["products"].items())
    note = f"The default's matrix products alone take {alone}."
    return "\n".join([*lines, "", f"After {data['context']:,} tokens, batch 1, fp32, median. {note} {made}."])


def products() -> str:
    """Microseconds of the products of a decoding step: cuBLAS's with what goes with them, and the best kernel's."""
    if (data := measured("products_h100")) is None:
        return "Not measured yet."
    before = {"product": "norm", "swiglu": "norm and SwiGLU", "add": "residual"}
    found: dict[tuple[Any, ...], dict[tuple[bool, bool], float]] = {}
    for row in data["rows"]:
        if "seconds" in row:
            key, side = (
                (row["kernel"], row["rows"], row["columns"], row["batch"]),
                (row["overlap"], "cuBLAS" in row["launch"]),
            )
            sides = found.setdefault((*key, row["floor"]), {})
            sides[side] = min(sides.get(side, math.inf), row["seconds"])
    lines = ["| weight | with | batch | floor | cuBLAS | one kernel | overlapping |", "| --- | --- |" + " ---: |" * 5]
    for (kernel, N, K, batch, low), sides in sorted(found.items(), key=lambda item: (item[0][1] * item[0][2], item[0])):
        cells = [
            f"{1e6 * sides[side]:.1f}" if side in sides else "–"
            for side in ((False, True), (False, False), (True, False))
        ]
        name = f"{'2 × ' if kernel == 'swiglu' else ''}{N:,} × {K:,}"
        lines.append(f"| {name} | {before[kernel]} | {batch} | {1e6 * low:.1f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Microseconds, median, the best launch settings; {made_on(data)}."])


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
            f"{data['model']}, {data['structure']}, chunks of {data['chunk']:,}, bf16; {made}. The last layer's state "
            f"after 20,000 tokens in chunks of 1,000, and in one call, differs by {others} of its norm.",
        ]
    )
