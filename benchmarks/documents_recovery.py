"""Parts of the documents about what comes back and what the recurrence adds, made from raw results."""

import json
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.results import RESULTS, made_on, measured, report_made_on, versions
from linearize import drawing
from linearize.drawing import LABELS
from linearize.evaluate.late_gap import closed, late_gap, pooled
from linearize.figures import by_distance
from linearize.measures import Interval, LateGap, RecallScore, Suite
from linearize.report import table, verdict
from linearize.results import Report
from linearize.results import read as read_report

SEEDS = (0, 1)
MILLIONS = (2, 5, 10, 20)
SHARES = {"window-5M": 0.0, "quarter": 0.25, "half": 0.5, "default-5M": 1.0}  # of the layers that have a state
ORDER = ("teacher", "window_only", "window_equal_memory", "converted", "recurrence_off", "window_off")
BASELINES = ("window_only", "window_equal_memory")


def demo_table() -> str:
    """The demo's table and verdict."""
    report = read_report(RESULTS / "demo.json")
    return f"{table(report)}\n\n{verdict(report)}\n\n{report_made_on(report)}"


def claim() -> str:
    """Late losses of the default recipe and its baselines by length, over both seeds, and the shares closed."""
    return "\n".join([*_by_length(_claimed(), LABELS), "", f"{made_on(_claims()[0])}."])


def _claims() -> list[dict[str, Any]]:
    found = [measured(f"claim-seed-{seed}") for seed in SEEDS]
    assert all(found)
    return found  # type: ignore[return-value]


def _claimed() -> list[LateGap]:
    """By length, over the seeds."""
    return _over_seeds([Suite.model_validate(data["suite"]) for data in _claims()])


def _over_seeds(suites: list[Suite]) -> list[LateGap]:
    return [pooled(found) for found in zip(*(suite.late for suite in suites), strict=True)]


def _claimed_recall() -> dict[str, list[RecallScore]]:
    """By model, the mean of the seeds."""
    suites = [Suite.model_validate(data["suite"]).recall for data in _claims()]
    return {
        model: [_mean(cells) for cells in zip(*(suite[model] for suite in suites), strict=True)]
        for model in suites[0]
        if model in ORDER[:4]
    }


def _mean(cells: tuple[RecallScore, ...]) -> RecallScore:
    accuracy, exact = (float(np.mean([getattr(x, key) for x in cells])) for key in ("accuracy", "exact"))
    return cells[0].model_copy(update={"trials": sum(x.trials for x in cells), "accuracy": accuracy, "exact": exact})


def earlier() -> str:
    """The shares closed, and needles found, by what the default recipe was before."""
    old, second = [_suite(_report(f"default-seed-{seed}")) for seed in SEEDS], _report("larger-steps-seed-1")
    cells = [suite.recall["converted"] for suite in old]
    found = {
        "states in fp32, text of any length, no repeats": (_over_seeds(old), [*map(_mean, zip(*cells, strict=True))]),
        "16,384 tokens a step, a tenth of repeats": (_larger_steps(), _suite(second).recall["converted"]),
        "the default": (_claimed(), _claimed_recall()["converted"]),
    }
    lines = ["| recipe | T | closed of window only | of equal memory | late loss | needles at 128, 512, 1,024 |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for label, (gaps, scores) in found.items():
        needles = {score.distance: f"{score.accuracy:.0%}" for score in scores if score.task == "needle"}
        name, recalled = label, ", ".join(needles[distance] for distance in (128, 512, 1024))
        for gap in gaps:
            shares = " | ".join(_interval(gap.closed[base]) for base in BASELINES)
            loss = f"{np.mean(gap.losses['converted']):.4f}"
            lines.append(f"| {name} | {gap.length:,} | {shares} | {loss} | {recalled} |")
            name = recalled = ""
    scored = made_on(_rows("larger-steps-seed-0")[1])
    return "\n".join([*lines, "", f"{report_made_on(second)} Seed 0 of the second was scored on {scored}."])


def _larger_steps() -> list[LateGap]:
    """By length; seed 0 are rows of `benchmarks.recovery`, seed 1 is a run."""
    rows, data = _rows("larger-steps-seed-0")
    found = []
    for gap in _suite(_report("larger-steps-seed-1")).late:
        length = str(gap.length)
        losses = {"teacher": [data["teacher"]["late"][length]]} | {n: [row["late"][length]] for n, row in rows.items()}
        losses["recurrence_off"] = [rows["converted"]["recurrence_off"]["late"][length]]
        found.append(pooled([late_gap(gap.length, data["teacher"]["articles"][length], losses), gap]))
    return found


def recovered() -> str:
    """The first column of `claim`."""
    gap = _claimed()[0]
    lines = [
        "| model | late loss | closed of the gap of window only | of equal memory |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in ORDER[:4]:
        shares = [_interval(gap.closed[base]) if name == "converted" else "–" for base in BASELINES]
        lines.append(f"| {LABELS[name]} | {np.mean(gap.losses[name]):.3f} | {' | '.join(shares)} |")
    return "\n".join([*lines, "", f"{made_on(_claims()[0])}."])


def three_layers() -> str:
    """With three layers left as softmax attention: beside the same three alone, and beside no full layer."""
    report = _report("three-layers")
    ours, plain = _suite(report).late, _suite(_report("default-seed-0")).late
    names = {name: label if name == "teacher" else f"{label}, three full layers" for name, label in LABELS.items()}
    cells = []
    for gap, other in zip(ours, plain, strict=True):
        found = closed(other.losses["window_only"], gap.losses["converted"], gap.losses["teacher"], gap.articles)
        assert found is not None
        assert gap.articles == other.articles
        cells.append(_interval(found))
    lines = [*_by_length(ours, names), f"| closed of the gap of window only, no full layer | {' | '.join(cells)} |"]
    return "\n".join([*lines, "", report_made_on(report)])


def _by_length(gaps: list[LateGap], names: dict[str, str]) -> list[str]:
    lines = ["| | " + " | ".join(f"T = {gap.length:,}" for gap in gaps) + " |", "| --- |" + " ---: |" * len(gaps)]
    texts = [f"{len(gap.articles)} ({len(set(gap.articles))})" for gap in gaps]
    lines.append("| sequences (of articles) | " + " | ".join(texts) + " |")
    for name in ORDER if "window_off" in gaps[0].losses else ORDER[:-1]:
        lines.append(f"| {names[name]} | " + " | ".join(f"{np.mean(gap.losses[name]):.4f}" for gap in gaps) + " |")
    for base in BASELINES:
        cells = " | ".join(_interval(gap.closed[base]) for gap in gaps)
        lines.append(f"| closed of the gap of {names[base]} | {cells} |")
    return lines


def recalled() -> str:
    """Answers found by distance, without a full layer and with three."""
    full = _suite(_report("three-layers")).recall
    shown = {LABELS["teacher"]: full["teacher"]}
    for kind, recall in (("no full layer", _claimed_recall()), ("three full layers", full)):
        shown |= {f"{LABELS[model]}, {kind}": recall[model] for model in ORDER[1:4]}
    found = {label: {(score.task, score.distance): score for score in scores} for label, scores in shown.items()}
    distances = sorted({distance for scores in found.values() for _, distance in scores})
    lines = ["| task | model | " + " | ".join(f"{distance:,}" for distance in distances) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(distances))
    for task in ("needle", "multi_key", "lookup"):
        for label, cells in found.items():
            shares = " | ".join(f"{cells[task, distance].accuracy:.0%}" for distance in distances)
            lines.append(f"| {task} | {label} | {shares} |")
    trials = sorted({score.trials for cells in found.values() for score in cells.values()})
    return "\n".join([*lines, "", f"{' or '.join(map(str, trials))} trials each; chance is 10 %."])


def tokens() -> str:
    """What more training tokens bring, and what a window of equal memory has by then."""
    rows, data = _rows("scaling")
    lines = ["| tokens | window only | window of 128 | default | closed of window only | closed of window of 128 |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for millions in MILLIONS:
        ours = rows[f"default-{millions}M"]
        window, longer = (rows.get(f"{name}-{millions}M") for name in ("window", "window-128"))
        losses = " | ".join(f"{row['late_loss']:.4f}" if row else "–" for row in (window, longer, ours))
        shares = " | ".join(_interval(_closed(row, ours, data)) if row else "–" for row in (window, longer))
        lines.append(f"| {millions} M | {losses} | {shares} |")
    return "\n".join([*lines, "", f"Teacher {data['teacher']['late_loss']:.4f}. {made_on(data)}."])


def state_size() -> str:
    """What states in some of the layers bring."""
    rows, data = _rows("scaling")
    lines = ["| layers with a state | late loss | closed of window only | bytes of cache at 1,024 tokens |"]
    lines.append("| ---: | ---: | ---: | ---: |")
    for name, share in SHARES.items():
        row = rows[name]
        found = "–" if share == 0 else _interval(_closed(rows["window-5M"], row, data))
        lines.append(f"| {share:.0%} | {row['late_loss']:.4f} | {found} | {row['cache_bytes']:,} |")
    return "\n".join([*lines, "", f"{made_on(data)}."])


def recipes() -> str:
    """The shipped recipes, 2 million tokens each."""
    rows, data = _rows("recipes")
    lines = ["| recipe | late loss | closed of window only | needles at 128, 512 | new parameters | cache, MB |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["late_loss"]):
        share = "–" if name == "window-only" else _interval(_closed(rows["window-only"], row, data))
        new, cache = f"{row['new_parameters']:,}", f"{row['cache_bytes'] / 1e6:.1f}"
        lines.append(f"| {name} | {row['late_loss']:.4f} | {share} | {_needles(row)} | {new} | {cache} |")
    return "\n".join([*lines, "", f"Teacher {data['teacher']['late_loss']:.4f}. {made_on(data)}."])


def changes() -> str:
    """Each row that differs from the default at 5 million tokens in one thing."""
    rows, data = _rows("scaling")
    base = rows["default-5M"]
    lines = ["| row | change | late loss | worse than `default-5M` by, nats | new parameters |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["late_loss"]):
        if name in SHARES or name.startswith(("default", "window")):
            continue
        own = ", ".join(f"`{setting}`" for setting in row["set"] if setting not in base["set"])
        mean, error = _difference(row["late"]["1024"], base["late"]["1024"])
        lines.append(
            f"| {name} | {own} | {row['late_loss']:.4f} | {mean:+.4f} ± {error:.4f} | {row['new_parameters']:,} |"
        )
    return "\n".join([*lines, "", f"The error is one standard error over sequences. {made_on(data)}."])


def trained_otherwise() -> str:
    """What other text, more steps and more weights bring, in late loss and in needles found."""
    rows, data = _rows("changes")
    lines = ["| row | change | late loss | worse than its base by, nats | needles at 128, 512 | new parameters |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, row in rows.items():
        if name in SHARES:
            continue
        base = _base_of(name)
        own = [f"`{setting}`" for setting in row["set"] if setting not in rows[base]["set"]]
        own += [f"not `{setting}`" for setting in rows[base]["set"] if setting not in row["set"]]
        mean, error = _difference(row["late"]["1024"], rows[base]["late"]["1024"])
        against = "–" if base == name else f"{mean:+.4f} ± {error:.4f} (`{base}`)"
        changed, new = ", ".join(own) or "–", f"{row['new_parameters']:,}"
        lines.append(f"| {name} | {changed} | {row['late_loss']:.4f} | {against} | {_needles(row)} | {new} |")
    lines.append(f"| teacher | | {data['teacher']['late_loss']:.4f} | | {_needles(data['teacher'])} | |")
    return "\n".join([*lines, "", f"The error is one standard error over sequences. {made_on(data)}."])


def behind() -> str:
    """A recurrence behind the window, and what was tried beside it, in late loss and in needles found."""
    rows, data = _rows("behind")
    tried, _ = _rows("tried")
    base = rows["beside"]
    lines = ["| row | change | late loss | worse than `beside` by, nats | early loss | needles at 128, 512 |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, row in sorted((rows | tried).items(), key=lambda item: item[1]["late_loss"]):
        own = row.get("what") or ", ".join(f"`{x}`" for x in row["set"] if x not in base["set"]) or "–"
        mean, error = _difference(row["late"]["1024"], base["late"]["1024"])
        against = "–" if name == "beside" else f"{mean:+.4f} ± {error:.4f}"
        losses = f"{row['late_loss']:.4f} | {against} | {row['early_loss']:.4f}"
        lines.append(f"| {name} | {own} | {losses} | {_needles(row)} |")
    best = data["teacher"]
    lines.append(f"| teacher | | {best['late_loss']:.4f} | | {best['early_loss']:.4f} | {_needles(best)} |")
    shares = "; ".join(
        f"`{name}` {_interval(_closed(rows['window'], rows[name], data))}" for name in ("beside", "behind")
    )
    note = f"Closed of the gap of `window`: {shares}. The error is one standard error over sequences."
    return "\n".join([*lines, "", f"{note} {made_on(data)}."])


def behind_claim() -> str:
    """Late losses behind the window after 20 million tokens, by length, beside the window's, and the share closed."""
    rows, data = _rows("behind_20M")
    lengths, best = list(rows["converted"]["late"]), data["teacher"]
    models = {"teacher": best, "window_only": rows["window_only"], "converted": rows["converted"]}
    lines = ["| | " + " | ".join(f"T = {int(length):,}" for length in lengths) + " |"]
    lines.append("| --- |" + " ---: |" * len(lengths))
    for name, row in models.items():
        losses = " | ".join(f"{np.mean(row['late'][length]):.4f}" for length in lengths)
        lines.append(f"| {LABELS[name]} | {losses} |")
    shares = [_interval(_closed(models["window_only"], models["converted"], data, length)) for length in lengths]
    lines.append(f"| closed of the gap of window only | {' | '.join(shares)} |")
    return "\n".join([*lines, "", f"{made_on(data)}."])


def _needles(row: dict[str, Any]) -> str:
    found = {cell["distance"]: cell["accuracy"] for cell in row["recall"] if cell["task"] == "needle"}
    return f"{found[128]:.0%}, {found[512]:.0%}"


def _base_of(name: str) -> str:
    if name.startswith(("long-batch-4-", "long-batch-2")):
        return "long-batch-4"
    return "default" if not name.startswith("long") else "long-20M" if name.endswith("-20M") else "long"


def short_tasks(name: str) -> str:
    """Multiple choice of the models beside their teacher."""
    data = measured(name)
    assert data is not None
    best, models = data["tasks"]["teacher"], [name for name in ORDER[1:4] if name in data["tasks"]]
    lines = ["| task | metric | items | teacher | " + " | ".join(LABELS[name] for name in models) + " |"]
    lines.append("| --- | --- | ---: | ---: |" + " ---: |" * len(models))
    for place, row in enumerate(best):
        cells = [data["tasks"][name][place] for name in models]
        shown = " | ".join(f"{100 * cell['score']:.1f}, {_points(cell['difference'])}" for cell in cells)
        lines.append(f"| {row['task']} | {row['metric']} | {row['items']:,} | {100 * row['score']:.1f} | {shown} |")
    shown = " | ".join(_points(data["short_tasks"][name]) for name in models)
    lines.append(f"| five short tasks | | | | {shown} |")
    note = "In points, with the difference from the teacher's and its 95 % interval, over items."
    return "\n".join([*lines, "", f"{note} {made_on(data)}."])


def _points(found: dict[str, float]) -> str:
    return f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def pictures() -> dict[str, Figure]:
    """How the share closed grows, and recall by distance."""
    found = {"scaling": _scaling()}
    window = _report("three-layers").models.converted.window
    recalls = {"recall": _claimed_recall(), "recall_three_layers": _suite(_report("three-layers")).recall}
    for picture, scores in recalls.items():
        figure = by_distance(scores, window)
        assert figure is not None
        found[picture] = figure
    return found


def _scaling() -> Figure:
    rows, data = _rows("scaling")
    figure, ends = drawing.canvas(drawing.WIDE, 3.0), []
    ax = drawing.panel(figure, (0.06, 0.16, 0.36, 0.72), "Late gap closed, by training", "tokens", "")
    ax.set_xscale("log")
    for base, name, said in (
        ("window", "window_only", "of window only"),
        ("window-128", "window_equal_memory", "of equal memory"),
    ):
        have = [n for n in MILLIONS if f"{base}-{n}M" in rows]
        shares = [_closed(rows[f"{base}-{n}M"], rows[f"default-{n}M"], data) for n in have]
        _with_intervals(ax, [n * 1e6 for n in have], shares, name)
        ends.append((shares[-1].value, said, name))
    drawing.ticks(ax.xaxis, [n * 1e6 for n in MILLIONS], lambda value: f"{value / 1e6:.0f} M")
    drawing.label_right(ax, ends)
    ax = drawing.panel(figure, (0.64, 0.16, 0.33, 0.72), "By states, after 5 M tokens", "layers with a state", "")
    measured_at = {name: share for name, share in SHARES.items() if share > 0}
    shares = [_closed(rows["window-5M"], rows[name], data) for name in measured_at]
    _with_intervals(ax, list(measured_at.values()), shares, "window_only")
    ax.set_xlim(0, 1.05)
    drawing.ticks(ax.xaxis, list(SHARES.values()), lambda value: f"{100 * value:.0f} %")
    return figure


def _with_intervals(ax: Any, x: list[float], shares: list[Interval], name: str) -> None:
    values = np.array([share.value for share in shares])
    below, above = values - [share.low for share in shares], [share.high for share in shares] - values
    drawing.line(ax, np.array(x), values, name, marker="o")
    ax.errorbar(x, values, yerr=[below, above], fmt="none", ecolor=drawing.COLORS[name], elinewidth=0.9, capsize=2)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ax.set_ylim(0, 0.7)


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
    return "\n".join([*lines, "", f"All rows: {common}. {data['hardware']}, {versions(data['versions'])}."])


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
    made = made_on(data)
    return "\n".join([*lines, "", f"All rows: {', '.join(f'`{setting}`' for setting in common)}. {made}."])


def selection() -> str:
    """What the layers that each selector chose can do, left full in an untrained conversion."""
    if (data := measured("selection")) is None:
        return "Not measured yet."
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
    return "\n".join([*lines, "", f"{data['hardware']}, {versions(data['versions'])}."])


def training_text() -> str:
    """What the rebuilt training text is made of."""
    if (data := measured("training_text")) is None:
        return "Not made yet."
    lines = ["| source | documents | characters | tokens |", "| --- | ---: | ---: | ---: |"]
    for name, row in (*data["sources"].items(), ("in all", data["total"])):
        lines.append(f"| {name} | {row['documents']:,} | {row['characters']:,} | {row['tokens']:,} |")
    refused = ", ".join(f"{count} of {name}" for name, count in data["refused"].items()) or "none"
    missing = "; ".join(data["missing"]) or "none"
    return "\n".join([*lines, "", f"Documents left out as held out: {refused}. Packages left out: {missing}."])


def _rows(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    data = measured(name)
    assert data is not None
    return data["rows"], data


def _report(name: str) -> Report:
    return read_report(RESULTS / f"{name}.json")


def _suite(report: Report) -> Suite:
    assert report.suite is not None
    return report.suite


def _closed(base: dict[str, Any], ours: dict[str, Any], data: dict[str, Any], length: str = "1024") -> Interval:
    baseline, mine, best = ([row["late"][length]] for row in (base, ours, data["teacher"]))
    found = closed(baseline, mine, best, ours["articles"][length])
    assert found is not None
    return found


def _difference(ours: list[float], base: list[float]) -> tuple[float, float]:
    """The mean of ours - base, and its standard error over sequences."""
    found = np.array(ours) - np.array(base)
    return float(found.mean()), float(found.std(ddof=1) / len(found) ** 0.5)


def _interval(found: Interval) -> str:
    return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%})"
