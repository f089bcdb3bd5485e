"""The parts of README and docs that are made from code and raw results: `make docs` writes them, a test holds them.

A part stands between `<!-- part: NAME -->` and `<!-- end -->`.
"""

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from benchmarks.decode import SHAPES, fastest, floor, ratio
from benchmarks.operators import median
from linearize.config import MixerConfig, MixerSettings
from linearize.evaluate.state_tracking import table as tracking_table
from linearize.evaluate.tracker import Result, Settings
from linearize.families import FAMILIES, Family
from linearize.recipe import Recipe
from linearize.report import figures, table, verdict
from linearize.results import Report
from linearize.results import read as read_report
from linearize.structures import STRUCTURES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PAGES = (
    "README.md",
    "docs/families.md",
    "docs/performance.md",
    "docs/recipe.md",
    "docs/report.md",
    "docs/recovery.md",
    "docs/selection.md",
    "docs/settings.md",
    "docs/state-tracking.md",
    "docs/structures.md",
    "docs/training-text.md",
)
PART = re.compile(r"(<!-- part: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SKIPPED = {"__pycache__", "linearize.egg-info", "results", "images"}


def main() -> None:
    """Write every part, and the README's picture."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
    picture = ROOT / "docs" / "images" / "loss_by_position.svg"
    picture.parent.mkdir(exist_ok=True)
    picture.write_text(figures(read_report(RESULTS / "demo.json"))["loss_by_position"], encoding="utf-8")


def rendered(page: str) -> str:
    """A page with all its parts made anew."""
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", page)


def tree() -> str:
    """Every source file with the first sentence of what it says of itself."""
    lines = ["```"]
    for folder in ("src/linearize", "benchmarks", "docs", "tests"):
        lines.append(f"{folder}/")
        lines.extend(_entries(ROOT / folder, "  ", deep=folder == "src/linearize"))
    return "\n".join([*lines, "```"])


def _entries(folder: Path, indent: str, deep: bool) -> Iterator[str]:
    paths = sorted(path for path in folder.iterdir() if path.name not in SKIPPED and not path.name.startswith("."))
    for path in (*(p for p in paths if p.is_file()), *(p for p in paths if p.is_dir())):
        if path.is_file() and path.name != "__init__.py" and (deep or folder.name != "tests"):
            yield f"{indent}{path.name} ".ljust(32) + _says(path)
        elif path.is_dir() and deep:
            init = path / "__init__.py"
            yield f"{indent}{path.name}/ ".ljust(32) + (_says(init) if init.exists() else "")
            yield from _entries(path, indent + "  ", deep)


def _says(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        first = text.split('"""')[1]
    else:
        first = next(line.lstrip("# ") for line in text.splitlines() if line.strip("# "))
    return re.split(r"\.(\s|$)|\n", first)[0].strip()


def demo_table() -> str:
    """The demo's table and verdict."""
    report = read_report(RESULTS / "demo.json")
    return f"{table(report)}\n\n{verdict(report)}\n\n{_made_on(report)}"


def default_table() -> str:
    """The default recipe's table and verdict."""
    report = read_report(RESULTS / "default.json")
    return f"{table(report)}\n\n{verdict(report)}\n\n{_made_on(report)}"


def screening() -> str:
    """The rows of the screening on the articles to choose on."""
    data = json.loads((RESULTS / "screening.json").read_text(encoding="utf-8"))
    base = data["rows"]["window"]["late_by_sequence"]
    lines = ["| row | set | perplexity | late loss | recurrence off | gain over `window`, nats | seconds |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in data["rows"].items():
        gains = [b - x for b, x in zip(base, row["late_by_sequence"], strict=True)]
        mean = sum(gains) / len(gains)
        error = (sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains)) ** 0.5
        off = row.get("late_loss_recurrence_off")
        own = ", ".join(f"`{setting}`" for setting in row["set"] if setting not in data["common"]) or "–"
        lines.append(
            f"| {name} | {own} | {row['perplexity']:.2f} | {row['late_loss']:.4f} | {f'{off:.4f}' if off else '–'} | "
            f"{mean:+.4f} ± {error:.4f} | {sum(row['seconds'].values()):.0f} |"
        )
    teacher = data["teacher"]
    lines.append(f"| teacher | – | {teacher['perplexity']:.2f} | {teacher['late_loss']:.4f} | – | – | – |")
    common = ", ".join(f"`{setting}`" for setting in data["common"])
    return "\n".join([*lines, "", f"All rows: {common}. {data['hardware']}, {_versions(data['versions'])}."])


def selection() -> str:
    """What the layers that each selector chose can do, left full in an untrained conversion."""
    path = RESULTS / "selection.json"
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    window, teacher = data["rows"]["window"], data["rows"]["teacher"]
    lines = ["| layers by | full layers | late loss | late gap closed | needles found | log-probability | seconds |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in data["rows"].items():
        full = {"teacher": "all", "window": "none"}.get(name, ", ".join(map(str, row["layers"])))
        closed = (window["late_loss"] - row["late_loss"]) / (window["late_loss"] - teacher["late_loss"])
        seconds = data["selectors"].get(name.rpartition(" ")[0], {}).get("seconds")
        lines.append(
            f"| {name} | {full} | {row['late_loss']:.4f} | {closed:.0%} | {row['accuracy']:.0%} | "
            f"{row['recall']:.2f} | {'–' if seconds is None else seconds} |"
        )
    return "\n".join([*lines, "", f"{data['hardware']}, {_versions(data['versions'])}."])


def training_text() -> str:
    """What the rebuilt training text is made of."""
    path = RESULTS / "training_text.json"
    if not path.exists():
        return "Not made yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| source | documents | characters | tokens |", "| --- | ---: | ---: | ---: |"]
    for name, row in (*data["sources"].items(), ("in all", data["total"])):
        lines.append(f"| {name} | {row['documents']:,} | {row['characters']:,} | {row['tokens']:,} |")
    refused = ", ".join(f"{count} of {name}" for name, count in data["refused"].items()) or "none"
    missing = "; ".join(data["missing"]) or "none"
    return "\n".join([*lines, "", f"Documents left out as held out: {refused}. Packages left out: {missing}."])


def recurrences() -> str:
    """Rows of different recurrences, against the window that was trained in the same way."""
    data = json.loads((RESULTS / "recurrences.json").read_text(encoding="utf-8"))
    rows = {name: row for name, row in data["rows"].items() if "late_loss" in row}
    common = [
        setting for setting in next(iter(rows.values()))["set"] if all(setting in r["set"] for r in rows.values())
    ]
    window, teacher = rows["window-full-3e-4"], data["teacher"]
    base, best = window["late"]["1024"], teacher["late"]["1024"]
    gap = sum(base) - sum(best)
    lines = [
        "| row | set | perplexity | late loss | recurrence off | of the gap of `window-full-3e-4` | new parameters |"
    ]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["late_loss"]):
        gains = [len(base) * (b - x) / gap for b, x in zip(base, row["late"]["1024"], strict=True)]
        mean = sum(gains) / len(gains)
        error = (sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains)) ** 0.5
        off = row.get("late_loss_recurrence_off")
        own = ", ".join(f"`{setting}`" for setting in row["set"] if setting not in common)
        new = row["new_parameters"] // (1 if "lora=null" in row["set"] else 2)  # PEFT keeps a copy of what it trains
        lines.append(
            f"| {name} | {own} | {row['perplexity']:.2f} | {row['late_loss']:.4f} | {f'{off:.4f}' if off else '–'} | "
            f"{mean:+.1%} ± {error:.1%} | {new:,} |"
        )
    lines.append(f"| teacher | – | {teacher['perplexity']:.2f} | {teacher['late_loss']:.4f} | – | – | – |")
    made = f"{data['hardware']}, {_versions(data['versions'])}, commit {data['commit']}"
    return "\n".join([*lines, "", f"All rows: {', '.join(f'`{setting}`' for setting in common)}. {made}."])


def recovered() -> str:
    """The default recipe's row among those of `recurrences`, the window it is to beat, and the teacher."""
    data = json.loads((RESULTS / "recurrences.json").read_text(encoding="utf-8"))
    rows = {
        "teacher": data["teacher"],
        "window only, all parameters trained": data["rows"]["window-full-3e-4"],
        "the same with the delta rule (`gdn-full-3e-4`)": data["rows"]["gdn-full-3e-4"],
        "the delta rule with data-dependent mixing (LoRA)": data["rows"]["gdn-dd"],
    }
    lines = ["| model | perplexity | loss, first 128 | late loss |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {n} | {r['perplexity']:.2f} | {r['early_loss']:.3f} | {r['late_loss']:.3f} |" for n, r in rows.items()
    ]
    return "\n".join([*lines, "", f"{data['hardware']}, {_versions(data['versions'])}, commit {data['commit']}."])


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
    made = f"{data['hardware']}, {_versions(data['versions'])}, commit {data['commit']}"
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
    made = f"{data['hardware']}, {_versions(data['versions'])}, commit {data['commit']}"
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
        if (found := _measured(name)) is None:
            continue
        data = found
        commits.append(f"{kind}: commit {data['commit']}")
        for row in (row for row in data["rows"] if "error" not in row):
            speed = row["batch"] * row["length"] / median(row["seconds"])
            lines.append(
                f"| {row['side']} | {kind} | {row['batch']} × {row['length']:,} | {speed:,.0f} | {row['idle']:.0%} | "
                f"{row['peak_bytes'] / 2**30:.1f} |"
            )
    made = f"{data['hardware']}, {_versions(data['versions'])}"
    return "\n".join([*lines, "", f"`python -m benchmarks.train`, medians; {made}; {'; '.join(commits)}."])


def decoding() -> str:
    """A step's milliseconds, converted and as it was, beside the floor and the goal."""
    if (data := _measured("decode_h100")) is None:
        return "Not measured yet."
    lines = ["| model | batch | context | floor | linearized | original | its GB/s | faster | goal | met |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | :-: |")
    order = {name: place for place, name in enumerate(SHAPES)}
    for row in sorted(data["rows"], key=lambda row: (order[row["model"]], row["batch"], row["context"])):
        lines.append(_decoding_row(row, data["copy_bytes_per_second"]))
    made = f"{data['hardware']}, {_versions(data['versions'])}, commit {data['commit']}"
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
    if (data := _measured("decode_h100")) is None:
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
    if (data := _measured("decode_cpu")) is None:
        return "Not measured yet."
    medians = {row["side"]: median(row["seconds"]) for row in data["rows"]}
    lines = ["| side | tokens/s | linearized is faster by | cache, MiB |", "| --- | ---: | ---: | ---: |"]
    for row in data["rows"]:
        name, seconds = row["side"], medians[row["side"]]
        gain = "" if name == "linearized" else f"{seconds / medians['linearized']:.2f}×"
        lines.append(f"| {name} | {1 / seconds:.1f} | {gain} | {row['cache_bytes'] / 2**20:.1f} |")
    made = f"{data['hardware']}, {_versions(data['versions'])}, commit {data['commit']}"
    return "\n".join([*lines, "", f"After {data['context']:,} tokens, batch 1, fp32, median; {made}."])


def long_prompt() -> str:
    """A long prompt read in chunks: speed and memory by tokens."""
    if (data := _measured("prompt_h100")) is None:
        return "Not measured yet."
    rows = [row for row in data["rows"] if math.log2(row["tokens"] / data["chunk"]).is_integer()]
    rows += [] if rows[-1] is data["rows"][-1] else data["rows"][-1:]
    lines = ["| tokens read | seconds | cache, bytes | peak, MiB |", "| ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {r['tokens']:,} | {r['seconds']:.1f} | {r['cache_bytes']:,} | {r['peak_bytes'] / 2**20:,.0f} |"
        for r in rows
    ]
    others = ", ".join(f"{error:.1e}" for error in data["other_chunks"])
    made = f"{data['hardware']}, {_versions(data['versions'])}, commit {data['commit']}"
    return "\n".join(
        [
            *lines,
            "",
            f"{data['model']}, chunks of {data['chunk']:,}, bf16; {made}. The last layer's state "
            f"after 20,000 tokens in chunks of 1,000, and in one call, differs by {others} of its norm.",
        ]
    )


def _measured(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def recipe_keys() -> str:
    """Every key of a recipe."""
    return _keys(Recipe)


def mixer_keys() -> str:
    """Every setting of a converted layer."""
    return _keys(MixerConfig)


def report_keys() -> str:
    """Every key of report.json."""
    return _keys(Report)


def structures() -> str:
    """Every structure: the paper's equation as its file gives it, and its operator."""
    lines = ["| name | what it is | operator |", "| --- | --- | --- |"]
    for name, structure in STRUCTURES.items():
        module = inspect.getmodule(structure.inputs)
        said = (inspect.getdoc(module) or "").split("\n")[0].rstrip(".")
        lines.append(f"| `{name}` | {said} | `{structure.operator.__name__}` |")
    return "\n".join(lines)


def settings() -> str:
    """Which structure takes which value of which setting."""
    names = [name for name in STRUCTURES if name != "gated_retention"]
    lines = ["| setting | " + " | ".join(f"`{name}`" for name in names) + " |", "| --- |" + " :-: |" * len(names)]
    for setting, value in _grid():
        cells = ["✓" if _refusal(name, setting, value) is None else "–" for name in names]
        lines.append(f"| `{setting}: {json.dumps(value).strip(chr(34))}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def refusals() -> str:
    """Why a value is refused where it is."""
    reasons: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # to settings and structures, in order
    for setting, value in _grid():
        for name in STRUCTURES:
            if reason := _refusal(name, setting, value):
                reason = re.sub(rf"^{setting} \S+ has no effect: |, not of {name}$", "", reason)
                reason = reason.replace(f"{setting} {value} ", "it ").replace(name, "the structure")
                what, where = reasons.setdefault(reason, ({}, {}))
                what[f"`{setting}: {json.dumps(value).strip(chr(34))}`"] = where[f"`{name}`"] = None
    return "\n".join(
        f"- {', '.join(what)}, with {', '.join(where) if len(where) < 5 else 'the others'}: {reason}."
        for reason, (what, where) in reasons.items()
    )


def _grid() -> Iterator[tuple[str, Any]]:
    """Every setting with each of its named values, or one other than its default."""
    numbers = {"gate_temperature": 256, "time_scales": 4096, "convolution": 4, "slots": 32}
    for name, field in MixerConfig.model_fields.items():
        if name in ("structure", "window", "sinks", "mixing_weight", "score_power"):
            continue  # numbers that every structure takes
        for value in get_args(field.annotation) if name not in numbers else [numbers[name]]:
            yield name, value
        if field.annotation is bool:
            yield name, True


def _refusal(structure: str, setting: str, value: Any) -> str | None:
    try:
        MixerConfig(structure=structure, **{setting: value})
    except ValueError as error:
        return str(error).split("Value error, ")[1].split(" [type=")[0]
    return None


def families() -> str:
    """Every row of families.py."""
    plain = Family("")
    lines = ["| model type | classes | q, k, v | linear layers | besides |", "| --- | --- | --- | --- | --- |"]
    for name, row in FAMILIES.items():
        special = [f"logits: {_first(row.logits)}"] if row.logits is not plain.logits else []
        special += [f"`{row.softcap}` on scores"] if row.softcap else []
        special += [f"`{row.null_logits}`: one more score for each head"] if row.null_logits else []
        special += ["rotates the first channels"] if row.rotates_first else []
        special += [] if row.rotates_halves else ["no fused kernel for its RoPE"]
        made = f"`{row.project.__name__}`" if row.project is not plain.project else ""
        layers = ", ".join(f"`{layer}`" for layer in row.projections) if row.projections != plain.projections else ""
        lines.append(f"| `{name}` | `{row.prefix}…` | {made} | {layers} | {'; '.join(special)} |")
    projections = ", ".join(f"`{layer}`" for layer in plain.projections)
    return "\n".join([*lines, "", f"Where nothing is said: `{plain.project.__name__}`, {projections}."])


def _first(function: Callable[..., Any]) -> str:
    said = (inspect.getdoc(function) or "").split("\n")[0].rstrip(".")
    return said[0].lower() + said[1:]


def tracking_settings() -> str:
    """Every setting of the benchmark, with the defaults of the full preset's."""
    return _keys(Settings)


def tracking(name: str) -> str:
    """Scaled accuracies by structure, task and format."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet."
    data = json.loads(path.read_text(encoding="utf-8"))
    results = [Result.model_validate(result) for result in data["results"]]
    settings, defaults = data["settings"], Settings().model_dump()
    changed = ", ".join(f"`{key}={value}`" for key, value in settings.items() if value != defaults[key])
    longest = max(results, key=lambda result: result.seconds)
    made = (
        f"{data['hardware']}, {_versions(data['versions'])}; {sum(r.seconds for r in results):.0f} s of training, "
        f"{longest.seconds:.0f} of them for {longest.task} with {longest.structure}."
    )
    return "\n".join([tracking_table(results), "", f"Settings: {changed or 'the defaults'}. {made}"])


def _keys(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    lines.extend(_rows(schema, schema, "", {}))
    return "\n".join(lines)


def _rows(node: dict[str, Any], schema: dict[str, Any], prefix: str, told: dict[str, str]) -> Iterator[str]:
    for name, field in node.get("properties", {}).items():
        options = field.get("anyOf", [field])
        inner = next((o["$ref"].rpartition("/")[2] for o in options if "$ref" in o), None)
        inner = inner or field.get("items", {}).get("$ref", "").rpartition("/")[2]
        kind = " or ".join(_kind(option) for option in options)
        default = f"`{json.dumps(field['default'])}`" if "default" in field and not inner else ""
        said = field.get("description", "").split("\n")[0] or (f"as `{told[inner]}`" if inner in told else "")
        yield f"| `{prefix}{name}` | {kind} | {default} | {said} |"
        if inner == MixerSettings.__name__:  # a mapping of settings to values or lists
            yield from _rows(MixerConfig.model_json_schema(), schema, f"{prefix}{name}.", told)
        elif inner and inner not in told:
            told[inner] = prefix + name
            mark = "[]." if "items" in field else "."
            yield from _rows(schema["$defs"][inner], schema, f"{prefix}{name}{mark}", told)


def _kind(option: dict[str, Any]) -> str:
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    if "$ref" in option:
        return "section"
    if option.get("type") == "array":
        return "list"
    if option.get("type") == "object" and isinstance(option.get("additionalProperties"), dict):
        return "mapping"
    return str(option.get("type", "any"))


def _made_on(report: Report) -> str:
    return f"{report.hardware}, {_versions(report.versions)}; {report.eval_tokens:,} held-out tokens."


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(
        f"{name} {number}" for name, number in versions.items() if name in ("torch", "transformers", "triton")
    )


PARTS: dict[str, Callable[[], str]] = {
    "tree": tree,
    "demo": demo_table,
    "default": default_table,
    "screening": screening,
    "recurrences": recurrences,
    "recovered": recovered,
    "training": training,
    "selection": selection,
    "training-text": training_text,
    "operators": operators,
    "kernels": kernels,
    "decoding": decoding,
    "decoding-at-16k": decoding_at_16k,
    "generation": generation,
    "decoding-cpu": decoding_cpu,
    "long-prompt": long_prompt,
    "recipe-keys": recipe_keys,
    "mixer-keys": mixer_keys,
    "report-keys": report_keys,
    "settings": settings,
    "refusals": refusals,
    "structures": structures,
    "families": families,
    "state-tracking-settings": tracking_settings,
    "state-tracking-cpu": partial(tracking, "state-tracking-cpu"),
    "state-tracking": partial(tracking, "state-tracking"),
}


if __name__ == "__main__":
    main()
