"""Parts of the documents about what comes back and what the recurrence adds, made from rows of raw results."""

import json
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.gap import KINDS
from benchmarks.results import RESULTS, interval, made_on, measured, rows_of, versions
from linearize import drawing
from linearize.evaluate.late_gap import closed
from linearize.measures import Interval

MILLIONS = (2, 5, 10, 20)
LAYERS = 30  # of SmolLM2-135M
SHARES = {"window-5M": 0.0, "quarter": 0.25, "half": 0.5, "default-5M": 1.0}  # of the layers that have a state


def tokens() -> str:
    """What more training tokens bring, and what a window of equal memory has by then."""
    rows, data = rows_of("scaling")
    lines = ["| tokens | window only | window of 128 | default | closed of window only | closed of window of 128 |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for millions in MILLIONS:
        ours = rows[f"default-{millions}M"]
        window, longer = (rows.get(f"{name}-{millions}M") for name in ("window", "window-128"))
        losses = " | ".join(f"{row['late_loss']:.4f}" if row else "–" for row in (window, longer, ours))
        shares = " | ".join(interval(_closed(row, ours, data)) if row else "–" for row in (window, longer))
        lines.append(f"| {millions} M | {losses} | {shares} |")
    return "\n".join([*lines, "", f"Teacher {data['teacher']['late_loss']:.4f}. {made_on(data)}."])


def state_size() -> str:
    """What states in some of the layers bring."""
    rows, data = rows_of("scaling")
    lines = ["| layers with a state | late loss | closed of window only | bytes of cache at 1,024 tokens |"]
    lines.append("| ---: | ---: | ---: | ---: |")
    for name, share in SHARES.items():
        row = rows[name]
        found = "–" if share == 0 else interval(_closed(rows["window-5M"], row, data))
        lines.append(f"| {share:.0%} | {row['late_loss']:.4f} | {found} | {row['cache_bytes']:,} |")
    return "\n".join([*lines, "", f"{made_on(data)}."])


def recipes() -> str:
    """The shipped recipes, 2 million tokens each."""
    rows, data = rows_of("recipes")
    lines = ["| recipe | late loss | closed of a window of 64 | needles at 128, 512 | new parameters | cache, MB |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["late_loss"]):
        share = "–" if name == "window-64" else interval(_closed(rows["window-64"], row, data))
        new, cache = f"{row['new_parameters']:,}", f"{row['cache_bytes'] / 1e6:.1f}"
        lines.append(f"| {name} | {row['late_loss']:.4f} | {share} | {_needles(row)} | {new} | {cache} |")
    old = [name for name, row in rows.items() if "commit" in row]
    made = "".join(f" {', '.join(old)}: {rows[name]['hardware']}, commit {rows[name]['commit']}." for name in old[:1])
    return "\n".join([*lines, "", f"Teacher {data['teacher']['late_loss']:.4f}. {made_on(data)}.{made}"])


def changes() -> str:
    """Each row that differs from the default at 5 million tokens in one thing."""
    rows, data = rows_of("scaling")
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
    rows, data = rows_of("changes")
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
    rows, data = rows_of("behind")
    tried, _ = rows_of("tried")
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
        f"`{name}` {interval(_closed(rows['window'], rows[name], data))}" for name in ("beside", "behind")
    )
    note = f"Closed of the gap of `window`: {shares}. The error is one standard error over sequences."
    return "\n".join([*lines, "", f"{note} {made_on(data)}."])


def behind_both() -> str:
    """Changes to a recurrence behind the window that reads the window's keys, in late loss and in needles found."""
    rows, data = rows_of("behind_both")
    lines = ["| row | change | late loss | worse than `both` by, nats | early loss | needles at 128, 512 |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["late_loss"]):
        own = row.get("what") or ", ".join(f"`{x}`" for x in row["set"] if x not in rows["both"]["set"]) or "–"
        mean, error = _difference(row["late"]["1024"], rows["both"]["late"]["1024"])
        losses = f"{row['late_loss']:.4f} | {mean:+.4f} ± {error:.4f} | {row['early_loss']:.4f}"
        lines.append(f"| {name} | {own} | {losses} | {_needles(row) if 'recall' in row else '–'} |")
    return "\n".join([*lines, "", f"The error is one standard error over sequences. {made_on(data)}."])


def by_length(name: str, against: str) -> str:
    """Changes to one row, in late loss by length, in early loss and in needles found."""
    rows, data = rows_of(name)
    base, lengths = rows[against], list(data["teacher"]["late"])
    columns = " | ".join(f"T = {int(length):,}" for length in lengths)
    lines = [f"| row | change | {columns} | early loss | needles at 128, 512 |"]
    lines.append("| --- | --- |" + " ---: |" * (len(lengths) + 2))
    for row_name, row in rows.items():
        own = row.get("what") or ", ".join(f"`{_brief(x)}`" for x in row["set"] if x not in base["set"]) or "–"
        cells = []
        for length in lengths:
            mean, error = _difference(row["late"][length], base["late"][length])
            apart = "" if row is base else f", {mean:+.4f} ± {error:.4f}"
            cells.append(f"{np.mean(row['late'][length]):.4f}{apart}")
        found = _needles(row) if "recall" in row else "–"
        lines.append(f"| {row_name} | {own} | {' | '.join(cells)} | {row['early_loss']:.4f} | {found} |")
    teacher = data["teacher"]
    best = " | ".join(f"{np.mean(teacher['late'][length]):.4f}" for length in lengths)
    found = _needles(teacher) if "recall" in teacher else "–"
    lines.append(f"| teacher | | {best} | {teacher['early_loss']:.4f} | {found} |")
    note = f"Late loss, and how much worse than `{against}`, with one standard error over sequences."
    return "\n".join([*lines, "", f"{note} {made_on(data)}."])


def layers() -> str:
    """Which layers have a recurrence, keys and windows of which size; beside a window of 64 and of equal memory."""
    rows, data = rows_of("layers")
    before = rows_of("together")[0]
    plain, lengths = before["window"], list(data["teacher"]["late"])
    common = {"mixer.window=64", *set.intersection(*(set(row["set"]) for row in rows.values()))}
    rows = {**rows, "default": before["few-18-23-wide-4"]}
    lines = ["| row | change | T = " + " | T = ".join(f"{int(length):,}" for length in lengths) + " | early loss |"]
    lines[0] += " closed of a window of 64 | of equal memory | needles at 128, 512 |"
    lines.append("| --- | --- |" + " ---: |" * (len(lengths) + 4))

    def shares(base: dict[str, Any] | None, row: dict[str, Any]) -> str:
        if base is None:
            return "–"
        return ", ".join(f"{_closed(base, row, data, length).value:.0%}" for length in lengths)

    for name, row in rows.items():
        own = "–" if name == "default" else ", ".join(f"`{_brief(x)}`" for x in row["set"] if x not in common)
        losses = " | ".join(f"{np.mean(row['late'][length]):.4f}" for length in lengths)
        closed_of = f"{shares(plain, row)} | {shares(rows.get(f'{name}-window'), row)}"
        lines.append(f"| {name} | {own} | {losses} | {row['early_loss']:.4f} | {closed_of} | {_needles(row)} |")
    note = "`default` and the window of 64 are rows of the table before (`few-18-23-wide-4`, `window`)."
    return "\n".join([*lines, "", f"{note} {made_on(data)}."])


def _brief(setting: str) -> str:
    """A setting whose value lists layers, by what few of them have."""
    key, _, value = setting.partition("=")
    if not value.startswith("["):
        return setting
    values = [item.strip() for item in value.strip("[]").split(",")]
    rare = min(set(values), key=values.count)
    if len(set(values)) != 2 or values.count(rare) == len(values) / 2:
        return setting
    layers = [layer for layer in range(LAYERS) if values[layer * len(values) // LAYERS] == rare]
    in_a_row = len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1))
    named = f"{layers[0]} to {layers[-1]}" if in_a_row else ", ".join(map(str, layers))
    return f"{key}={rare} in layers {named}"


def gap() -> str:
    """Late losses by what of a token was said before; each file has its own teacher, as its machine has it."""
    found = [data for name in ("gap", "gap_default") if (data := measured(name)) is not None]
    tokens, best = found[0]["tokens"], found[0]["losses"]["teacher"]
    every = sum(tokens.values())
    models = {
        name: (losses, data["losses"]["teacher"])
        for data in found
        for name, losses in data["losses"].items()
        if name != "teacher"
    }
    lines = ["| the token was said before | of all | teacher | " + " | ".join(models) + " |"]
    lines.append("| --- | ---: | ---: |" + " ---: |" * len(models))
    for kind, said in KINDS.items():
        apart = [(sum(ours[kind]) - sum(teacher[kind])) / tokens[kind] for ours, teacher in models.values()]
        shown = " | ".join(f"{x:+.3f}" for x in apart)
        lines.append(f"| {said} | {tokens[kind] / every:.0%} | {sum(best[kind]) / tokens[kind]:.3f} | {shown} |")

    def whole(losses: dict[str, list[float]]) -> float:
        return sum(sum(x) for x in losses.values()) / every

    shown = " | ".join(f"{whole(ours) - whole(teacher):+.3f}" for ours, teacher in models.values())
    lines.append(f"| all | 100% | {whole(best):.3f} | {shown} |")
    note = "The teacher's late loss in nats, and how much more the others have."
    return "\n".join([*lines, "", f"{note} {made_on(found[0])}. `default-20M`: {made_on(found[1])}."])


def _needles(row: dict[str, Any]) -> str:
    found = {cell["distance"]: cell["accuracy"] for cell in row["recall"] if cell["task"] == "needle"}
    return f"{found[128]:.0%}, {found[512]:.0%}"


def _base_of(name: str) -> str:
    if name.startswith(("long-batch-4-", "long-batch-2")):
        return "long-batch-4"
    return "default" if not name.startswith("long") else "long-20M" if name.endswith("-20M") else "long"


def pictures() -> dict[str, Figure]:
    """How the share closed grows."""
    return {"scaling": _scaling()}


def _scaling() -> Figure:
    rows, data = rows_of("scaling")
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


def selection(name: str, what: str) -> str:
    """What the layers or heads that each selector chose can do, left full in an untrained conversion."""
    if (data := measured(name)) is None:
        return "Not measured yet."
    window, teacher = data["rows"]["window"], data["rows"]["teacher"]
    lines = [f"| {what} by | full {what} | late loss | late gap closed | needles found | log-probability | seconds |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in data["rows"].items():
        full = {"teacher": "all", "window": "none"}.get(name, ", ".join(map(str, row.get("kept", row.get("layers")))))
        closed = (window["late_loss"] - row["late_loss"]) / (window["late_loss"] - teacher["late_loss"])
        seconds = data["selectors"].get(name.rpartition(" ")[0], {}).get("seconds")
        lines.append(
            f"| {name} | {full} | {row['late_loss']:.4f} | {closed:.0%} | {row['accuracy']:.0%} | "
            f"{row['recall']:.2f} | {'–' if seconds is None else seconds} |"
        )
    made = f"{data['hardware']}, {versions(data['versions'])}. {data.get('note', '')}".rstrip()
    return "\n".join([*lines, "", made])


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


def _closed(base: dict[str, Any], ours: dict[str, Any], data: dict[str, Any], length: str = "1024") -> Interval:
    baseline, mine, best = ([row["late"][length]] for row in (base, ours, data["teacher"]))
    found = closed(baseline, mine, best, ours["articles"][length])
    assert found is not None
    return found


def _difference(ours: list[float], base: list[float]) -> tuple[float, float]:
    """The mean of ours - base, and its standard error over sequences."""
    found = np.array(ours) - np.array(base)
    return float(found.mean()), float(found.std(ddof=1) / len(found) ** 0.5)
