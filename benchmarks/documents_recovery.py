"""Parts of the documents about what comes back and what the recurrence adds, made from raw results."""

import json

from benchmarks.results import RESULTS, made_on, report_made_on, versions
from linearize.report import table, verdict
from linearize.results import read as read_report


def demo_table() -> str:
    """The demo's table and verdict."""
    report = read_report(RESULTS / "demo.json")
    return f"{table(report)}\n\n{verdict(report)}\n\n{report_made_on(report)}"


def default_table() -> str:
    """The default recipe's table and verdict."""
    report = read_report(RESULTS / "default.json")
    return f"{table(report)}\n\n{verdict(report)}\n\n{report_made_on(report)}"


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
    return "\n".join([*lines, "", f"{data['hardware']}, {versions(data['versions'])}."])


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
    made = made_on(data)
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
    return "\n".join([*lines, "", f"{data['hardware']}, {versions(data['versions'])}, commit {data['commit']}."])
