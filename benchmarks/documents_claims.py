"""Parts of the documents about claims: the default recipe and what it was before, the hybrids, tasks."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.results import interval, made_on, measured, report_made_on, report_of, rows_of, suite_of
from linearize.drawing import LABELS
from linearize.evaluate.choice import USUAL
from linearize.evaluate.late_gap import closed, late_gap, pooled
from linearize.figures import by_distance
from linearize.measures import Interval, LateGap, RecallScore, Suite
from linearize.report import table, verdict

SEEDS = (0, 1)
ORDER = ("teacher", "window_only", "window_equal_memory", "converted", "recurrence_off", "window_off")
BASELINES = ("window_only", "window_equal_memory")
PLAIN, FEWER = "window_64", "three_wide"  # a window of 64 in all layers, and so with fewer layers of wide keys
HYBRIDS = {"three full layers": "three_layers_h200", "nine full heads": "heads_h200"}
PARAMETERS = 134_515_008  # of SmolLM2-135M
ROWS = {"window_only": "window", "window_equal_memory": "equal-memory", "converted": "converted"}  # of claim.yaml


def demo_table() -> str:
    """The demo's table and verdict."""
    report = report_of("demo")
    return f"{table(report)}\n\n{verdict(report)}\n\n{report_made_on(report)}"


def claim(name: str, kept: str = "") -> str:
    """Late losses of a recipe and its baselines by length, over the seeds, and the shares closed; `kept` is what all
    of them leave softmax attention."""
    gaps = _claimed(name)
    beside = f", {kept}" if kept else ""
    lines = _by_length(gaps, {key: label if key == "teacher" else label + beside for key, label in LABELS.items()})
    if name not in (PLAIN, FEWER):
        losses = [_losses_of_plain(gap.length) for gap in gaps]
        lines.insert(4, "| window of 64 in all layers | " + " | ".join(f"{np.mean(x):.4f}" for x in losses) + " |")
        shares = " | ".join(interval(_closed_of_plain(gap)) for gap in gaps)
        lines.append(f"| closed of the gap of a window of 64 in all layers | {shares} |")
    return "\n".join([*lines, "", f"{made_on(rows_of(name)[1])}."])


def _losses_of_plain(length: int) -> list[float]:
    """Late losses of a window of 64 in all layers."""
    return rows_of(PLAIN)[0]["window-0"]["late"][str(length)]


def _closed_of_plain(gap: LateGap) -> Interval:
    """Of what a window of 64 in all layers leaves."""
    ours = gap.losses["converted"]
    found = closed([_losses_of_plain(gap.length)] * len(ours), ours, gap.losses["teacher"], gap.articles)
    assert found is not None
    return found


def _rows(name: str) -> dict[str, Any]:
    """By name; the windows of 64 of `FEWER` are those of `PLAIN`."""
    own = rows_of(name)[0]
    windows = {row: found for row, found in rows_of(PLAIN)[0].items() if row.startswith("window-")}
    return windows | own if name == FEWER else own


def _seeds(name: str, *models: str) -> list[int]:
    """Those with which all of these were trained."""
    rows = _rows(name)
    return [seed for seed in SEEDS if all(f"{ROWS[model]}-{seed}" in rows for model in models)]


def _claimed(name: str) -> list[LateGap]:
    """By length, over the seeds; a seed that a baseline was not trained with is compared with its first."""
    rows, (_, data) = _rows(name), rows_of(name)
    found = []
    for length, articles in data["teacher"]["articles"].items():
        best = [data["teacher"]["late"][length]]

        def losses(model: str, seeds: list[int], length: str = length) -> list[list[float]]:
            return [rows[f"{ROWS[model]}-{seed}"]["late"][length] for seed in seeds]

        every = {"teacher": best} | {model: losses(model, _seeds(name, model)) for model in ROWS}
        ours = [rows[f"converted-{seed}"] for seed in _seeds(name, "converted")]
        every["recurrence_off"] = [row["recurrence_off"]["late"][length] for row in ours]
        gap = LateGap(length=int(length), articles=articles, losses=every)
        for base in BASELINES:
            seeds, theirs = _seeds(name, "converted"), _seeds(name, base)
            beside = [seed if seed in theirs else theirs[0] for seed in seeds]
            share = closed(losses(base, beside), losses("converted", seeds), best, articles)
            assert share is not None
            gap.closed[base] = share
        found.append(gap)
    return found


def _claimed_recall(name: str) -> dict[str, list[RecallScore]]:
    """By model, the mean of the seeds."""
    rows, data = rows_of(name)
    found = {"teacher": [RecallScore.model_validate(cell) for cell in data["teacher"]["recall"]]}
    for model, row in ROWS.items():
        every = [
            [RecallScore.model_validate(c) for c in rows[f"{row}-{seed}"]["recall"]] for seed in _seeds(name, model)
        ]
        found[model] = [_mean(cells) for cells in zip(*every, strict=True)]
    return found


def _before() -> list[Suite]:
    """Of each seed, what was measured of the default recipe beside the window."""
    found = [measured(f"claim-seed-{seed}") for seed in SEEDS]
    return [Suite.model_validate(data["suite"]) for data in found if data is not None]


def _over_seeds(suites: list[Suite]) -> list[LateGap]:
    return [pooled(found) for found in zip(*(suite.late for suite in suites), strict=True)]


def _mean(cells: tuple[RecallScore, ...]) -> RecallScore:
    accuracy, exact = (float(np.mean([getattr(x, key) for x in cells])) for key in ("accuracy", "exact"))
    return cells[0].model_copy(update={"trials": sum(x.trials for x in cells), "accuracy": accuracy, "exact": exact})


def earlier() -> str:
    """The shares closed, and needles found, by what the default recipe was before."""
    old, second = [suite_of(report_of(f"default-seed-{seed}")) for seed in SEEDS], report_of("larger-steps-seed-1")
    found = {
        "states in fp32, text of any length, no repeats": (_over_seeds(old), _needles_of(old)),
        "16,384 tokens a step, a tenth of repeats": (_larger_steps(), suite_of(second).recall["converted"]),
        "8,192 tokens a step, 15 % repeats": (_over_seeds(_before()), _needles_of(_before())),
        "behind the window, a tenth of repeats": _tenth(),
        "behind the window with RoPE, 15 % repeats": (_claimed("rope_both"), _claimed_recall("rope_both")["converted"]),
        "the same, prose, a ramp of 512": (_claimed("prose"), _claimed_recall("prose")["converted"]),
        "keys of one width, a ramp of 512, 12 % repeats": (_claimed("narrow"), _claimed_recall("narrow")["converted"]),
        "more keys in layers 18 to 23, a soft readout, 3 % repeats": (_claimed(PLAIN), _needles_of_both(PLAIN)),
        "the same, more keys in layers 18, 20 and 23 alone": (_claimed(FEWER), _needles_of_both(FEWER)),
        "the default: a window of 128 there": (_claimed("claim"), _claimed_recall("claim")["converted"]),
    }
    for gap in found["the default: a window of 128 there"][0]:
        gap.closed["window_only"] = _closed_of_plain(gap)
    lines = ["| recipe | T | closed of a window of 64 | of equal memory | late loss | needles at 128, 512, 1,024 |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for label, (gaps, scores) in found.items():
        needles = {score.distance: f"{score.accuracy:.0%}" for score in scores if score.task == "needle"}
        name, recalled = label, ", ".join(needles.get(distance, "–") for distance in (128, 512, 1024))
        for gap in gaps:
            shares = " | ".join(interval(gap.closed[base]) if base in gap.closed else "–" for base in BASELINES)
            loss = f"{np.mean(gap.losses['converted']):.4f}"
            lines.append(f"| {name} | {gap.length:,} | {shares} | {loss} | {recalled} |")
            name = recalled = ""
    scored, last = (made_on(rows_of(name)[1]) for name in ("larger-steps-seed-0", "rope_both"))
    commits = ", ".join(rows_of(name)[1]["commit"] for name in ("prose", "narrow", PLAIN, FEWER, "claim"))
    made = f"{report_made_on(second)} Seed 0 of the second, and the fourth, were scored on {scored}, "
    made += f"{rows_of('behind_20M')[1]['commit']}. The last six: {last}, {commits}."
    return "\n".join([*lines, "", made])


def _needles_of_both(name: str) -> list[RecallScore]:
    """The mean of the seeds, of which one was asked for needles alone."""
    rows, _ = rows_of(name)
    every = [
        [
            score
            for cell in rows[f"converted-{seed}"]["recall"]
            if (score := RecallScore.model_validate(cell)).task == "needle"
        ]
        for seed in SEEDS
    ]
    return [_mean(cells) for cells in zip(*every, strict=True)]


def _needles_of(suites: list[Suite]) -> list[RecallScore]:
    return [_mean(cells) for cells in zip(*(suite.recall["converted"] for suite in suites), strict=True)]


def _tenth() -> tuple[list[LateGap], list[RecallScore]]:
    """By length, and needles, of the one seed behind the window with a tenth of repeats, which has no longer window."""
    rows, data = rows_of("behind_20M")
    found = []
    for length, articles in data["teacher"]["articles"].items():
        losses = {name: [row["late"][length]] for name, row in (rows | {"teacher": data["teacher"]}).items()}
        found.append(late_gap(int(length), articles, losses))
    return found, [RecallScore.model_validate(cell) for cell in rows["converted"]["recall"]]


def _larger_steps() -> list[LateGap]:
    """By length; seed 0 are rows of `benchmarks.recovery`, seed 1 is a run."""
    rows, data = rows_of("larger-steps-seed-0")
    found = []
    for gap in suite_of(report_of("larger-steps-seed-1")).late:
        length = str(gap.length)
        losses = {"teacher": [data["teacher"]["late"][length]]} | {n: [row["late"][length]] for n, row in rows.items()}
        losses["recurrence_off"] = [rows["converted"]["recurrence_off"]["late"][length]]
        found.append(pooled([late_gap(gap.length, data["teacher"]["articles"][length], losses), gap]))
    return found


def goals() -> str:
    """What was to be reached, and what is, at each length."""
    plain, fewer, ours = (_claimed(name) for name in (PLAIN, FEWER, "claim"))
    equal = "window_equal_memory"
    lines = ["| goal | least | " + " | ".join(f"T = {x.length:,}" for x in ours) + " |", "| --- | ---: |"]
    lines[1] += " ---: |" * len(ours)

    def add(what: str, least: float, found: list[Interval | None]) -> None:
        cells = ["–" if x is None else f"{x.value:.0%}{' ✓' if round(x.value, 2) >= least else ''}" for x in found]
        lines.append(f"| {what} | {least:.0%} | {' | '.join(cells)} |")

    for gaps, layers in ((fewer, "three layers"), (plain, "six layers")):
        what = f"a window of 64, no full layer, wide keys in {layers}: of what the window leaves"
        add(what, 0.63, [x.closed["window_only"] for x in gaps])
        add("the same, at equal memory", 0.25, [x.closed[equal] for x in gaps])
    add("the default: of what a window of 64 leaves", 0.63, [_closed_of_plain(x) for x in ours])
    add("the same, at equal memory", 0.25, [x.closed[equal] for x in ours])
    for kept, name in HYBRIDS.items():
        gaps = _claimed(name)
        add(f"{kept}: of what a window of 64 without them leaves", 0.85, [_closed_of_plain(x) for x in gaps])
        add("the same, beside these with a window of equal memory", 0.25, [x.closed[equal] for x in gaps])
    teacher, found = (_needle("claim", model) for model in ("teacher", "converted"))
    mean = _mean_difference(_rows_of_tasks("tasks_h200"))
    new = rows_of("claim")[0]["converted-0"]["new_parameters"] / PARAMETERS
    lines += [
        "",
        "| goal | reached | met |",
        "| --- | ---: | :-: |",
        f"| the default: 35 % of needles at 512 tokens | {found:.0%} | {_mark(found >= 0.35)} |",
        *(line for kept, name in HYBRIDS.items() for line in _needles_kept(kept, name, teacher)),
        f"| five short tasks: the interval includes the teacher | {_points(mean)} | "
        f"{_mark(mean['low'] <= 0 <= mean['high'])} |",
        f"| new parameters below 1 % | {new:.2%} | {_mark(new < 0.01)} |",
    ]
    return "\n".join(lines)


def _needles_kept(kept: str, name: str, teacher: float) -> list[str]:
    found, alone = (_needle(name, model) for model in ("converted", "window_only"))
    return [
        f"| {kept}: nine tenths of the needles at 512 that the teacher finds ({teacher:.0%}) | {found:.0%} | "
        f"{_mark(found >= 0.9 * teacher)} |",
        f"| the same: more than these find without a recurrence ({alone:.0%}) | {found:.0%} | {_mark(found > alone)} |",
    ]


def _rows_of_tasks(name: str) -> list[dict[str, Any]]:
    """The converted model's."""
    data = measured(name)
    assert data is not None
    return data["tasks"]["converted"]


def _needle(name: str, model: str) -> float:
    """Needles found at 512 tokens."""
    (found,) = (x for x in _claimed_recall(name)[model] if (x.task, x.distance) == ("needle", 512))
    return found.accuracy


def _mark(met: bool) -> str:
    return "✓" if met else "–"


def recovered() -> str:
    """The first column of `claim`."""
    gap = _claimed("claim")[0]
    lines = [
        "| model | late loss | closed of the gap of window only | of equal memory | of a window of 64 in all layers |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in ORDER[:4]:
        shares = ["–"] * 3
        if name == "converted":
            shares = [*(interval(gap.closed[base]) for base in BASELINES), interval(_closed_of_plain(gap))]
        lines.append(f"| {LABELS[name]} | {np.mean(gap.losses[name]):.3f} | {' | '.join(shares)} |")
    plain = f"| window of 64 in all layers | {np.mean(_losses_of_plain(gap.length)):.3f} | – | – | – |"
    lines.insert(3, plain)
    return "\n".join([*lines, "", f"{made_on(rows_of('claim')[1])}."])


def _by_length(gaps: list[LateGap], names: dict[str, str]) -> list[str]:
    lines = ["| | " + " | ".join(f"T = {gap.length:,}" for gap in gaps) + " |", "| --- |" + " ---: |" * len(gaps)]
    texts = [f"{len(gap.articles)} ({len(set(gap.articles))})" for gap in gaps]
    lines.append("| sequences (of articles) | " + " | ".join(texts) + " |")
    for name in ORDER if "window_off" in gaps[0].losses else ORDER[:-1]:
        lines.append(f"| {names[name]} | " + " | ".join(f"{np.mean(gap.losses[name]):.4f}" for gap in gaps) + " |")
    for base in BASELINES:
        cells = " | ".join(interval(gap.closed[base]) for gap in gaps)
        lines.append(f"| closed of the gap of {names[base]} | {cells} |")
    return lines


def recalled() -> str:
    """Answers found by distance, with nothing left full, with three layers and with nine heads."""
    shown: dict[str, list[RecallScore]] = {}
    for kind, name in {"no full layer": "claim", **HYBRIDS}.items():
        recall = _claimed_recall(name)
        shown |= {LABELS["teacher"]: recall["teacher"]} if not shown else {}
        shown |= {f"{LABELS[model]}, {kind}": recall[model] for model in ORDER[1:4]}
    found = {label: {(score.task, score.distance): score for score in scores} for label, scores in shown.items()}
    distances = sorted({distance for scores in found.values() for _, distance in scores})
    lines = ["| task | model | " + " | ".join(f"{distance:,}" for distance in distances) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(distances))
    for task in ("needle", "multi_key", "lookup"):
        for label, cells in found.items():
            scores = [cells.get((task, distance)) for distance in distances]
            if not any(scores):
                continue
            shares = " | ".join("–" if score is None else f"{score.accuracy:.0%}" for score in scores)
            lines.append(f"| {task} | {label} | {shares} |")
    trials = sorted({score.trials for cells in found.values() for score in cells.values()})
    return "\n".join([*lines, "", f"{' or '.join(map(str, trials))} trials each; chance is 10 %."])


def short_tasks(*names: str) -> str:
    """Multiple choice of the models beside their teacher, out of one or several files of raw results."""
    every = [data for name in names if (data := measured(name)) is not None]
    best = [row for data in every for row in data["tasks"]["teacher"]]
    found = {name: [row for data in every for row in data["tasks"].get(name, [])] for name in ORDER[1:4]}
    found = {name: rows for name, rows in found.items() if rows}
    lines = ["| task | metric | items | teacher | " + " | ".join(LABELS[name] for name in found) + " |"]
    lines.append("| --- | --- | ---: | ---: |" + " ---: |" * len(found))
    for place, row in enumerate(best):
        cells = [rows[place] for rows in found.values()]
        shown = " | ".join(f"{100 * cell['score']:.1f}, {_points(cell['difference'])}" for cell in cells)
        lines.append(f"| {row['task']} | {row['metric']} | {row['items']:,} | {100 * row['score']:.1f} | {shown} |")
    means = [_points(_mean_difference(rows)) for rows in found.values()]
    lines.append(f"| five short tasks | usual | | | {' | '.join(means)} |")
    note = "In points, with the difference from the teacher's and its 95 % interval, over items."
    made = [made_on(data) for data in every]
    commits = "".join(f", {data['commit']}" for data in every[1:])
    return "\n".join([*lines, "", f"{note} {made[0]}{commits}."])


def _mean_difference(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over the five short tasks, each by its usual metric and counted alike, as `choice.short_tasks` has it."""
    differences = [row["difference"] for row in rows if USUAL.get(row["task"]) == row["metric"]]
    assert len(differences) == len(USUAL)
    value = sum(found["value"] for found in differences) / len(USUAL)
    half = math.hypot(*((found["high"] - found["low"]) / 2 for found in differences)) / len(USUAL)
    return {"value": value, "low": value - half, "high": value + half}


def _points(found: dict[str, float]) -> str:
    return f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def pictures() -> dict[str, Figure]:
    """Recall by distance, of models that were asked for all of it."""
    found = {}
    for picture, name in (("recall", "claim"), ("recall_hybrid", "heads_h200")):
        recall = _claimed_recall(name)
        asked = {model: scores for model, scores in recall.items() if len(scores) == len(recall["teacher"])}
        figure = by_distance(asked, 128)
        assert figure is not None
        found[picture] = figure
    return found
