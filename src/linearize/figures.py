"""The report's figures: each a function from a report to a matplotlib figure, or None where nothing was measured."""

import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from linearize import drawing
from linearize.drawing import COLORS, HALF, INK, LABELS, MUTED, PAPER, SHADE, WIDE, to_svg
from linearize.measures import RecallScore
from linearize.results import Curve, Report, byte_size, context, count, ratio


def figures(report: Report) -> dict[str, str]:
    """Each figure that the report has data for, as a standalone SVG."""
    drawn = {name: draw(report) for name, draw in FIGURES.items()}
    return {name: to_svg(figure, name) for name, figure in drawn.items() if figure is not None}


def loss_by_position(report: Report) -> Figure | None:
    """Left the loss, right what each model loses against the teacher, by position."""
    models = report.models.measured()
    for off in ("recurrence_off", "window_off"):
        models.pop(off, None)
    losses = {name: np.array(result.loss_by_position, dtype=float) for name, result in models.items()}
    size = min(map(len, losses.values()))
    losses = {name: loss[:size] for name, loss in losses.items()}
    main = [loss for name, loss in losses.items() if name != "untrained"]
    if size == 0 or not np.isfinite(np.concatenate(main)).any():
        return None
    x = (np.arange(size) + 0.5) * report.bucket
    figure = drawing.canvas(WIDE, 3.7)
    axes = [
        drawing.panel(figure, (0.066, 0.125, 0.262, 0.78), "Loss", "position (tokens)", "mean loss (nats)"),
        drawing.panel(
            figure, (0.4, 0.125, 0.43, 0.78), "Loss above the teacher", "position (tokens)", "difference (nats)"
        ),
    ]
    excess = {name: loss - losses["teacher"] for name, loss in losses.items()}
    limits = [
        drawing.limits(main, 0.06),
        drawing.limits([e for n, e in excess.items() if n not in ("untrained", "teacher")], 0.12, 0),
    ]
    for ax, lines, (low, high) in zip(axes, (losses, excess), limits, strict=True):
        ax.set_xlim(0, report.sequence_length)
        ax.set_ylim(low, high)
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.xaxis.set_major_locator(FixedLocator([report.sequence_length * i / 4 for i in range(5)]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: context(value)))
        ax.axvspan(report.sequence_length / 2, report.sequence_length, color=SHADE, zorder=0, lw=0)
        ax.annotate("late", (0.995, 0.985), xycoords="axes fraction", ha="right", va="top", color=MUTED, fontsize=8)
        for name, line in lines.items():
            drawing.line(ax, x, line, name, marker="o" if size == 1 else None)
    tail = max(1, size // 8)  # a label stands at the mean of the end of its line
    ends = {name: float(np.mean(line[-tail:])) for name, line in excess.items()}
    drawing.label_right(
        axes[1], [(drawing.clip(ends[name], limits[1]), _end_text(name, ends[name], limits[1]), name) for name in ends]
    )
    return figure


def _end_text(name: str, end: float, limits: tuple[float, float]) -> str:
    label = "untrained" if name == "untrained" else LABELS[name]
    return label if limits[0] <= end <= limits[1] else f"{label}, {end:+.2f}"


def training(report: Report) -> Figure | None:
    """Loss against tokens, a panel for each stage: smoothed over faint raw."""
    curves = [curve for curve in report.curves if curve.tokens]
    stages = list(dict.fromkeys(curve.stage for curve in curves))
    if not stages:
        return None
    figure = drawing.canvas(WIDE, 3.3)
    left, right, gap = 0.075, 0.16, 0.22
    width = (1 - left - right - gap * (len(stages) - 1)) / len(stages)
    for i, stage in enumerate(stages):
        box = (left + i * (width + gap), 0.14, width, 0.75)
        _training_panel(
            drawing.panel(figure, box, stage[:1].upper() + stage[1:], "tokens", "training loss"),
            [c for c in curves if c.stage == stage],
        )
    return figure


def _training_panel(ax: Axes, curves: list[Curve]) -> None:
    ends, smooth_lines, last = [], [], 1
    for curve in curves:
        tokens, loss = drawing.thinned(np.array(curve.tokens, dtype=float), np.array(curve.loss, dtype=float))
        smooth = drawing.smoothed(loss)
        color = COLORS.get(curve.model, MUTED)
        ax.plot(tokens, loss, color=color, alpha=0.22, lw=0.8)
        drawing.line(ax, tokens, smooth, curve.model, marker="o" if len(tokens) == 1 else None)
        smooth_lines.append(smooth)
        last = max(last, curve.tokens[-1])
        if np.isfinite(smooth[-1]):
            ends.append((float(smooth[-1]), LABELS.get(curve.model, curve.model), curve.model))
    low, high = drawing.limits(smooth_lines, 0.08)
    finite = np.concatenate(smooth_lines)
    finite = finite[np.isfinite(finite)]
    ax.set_xlim(0, last)
    if len(finite) and finite.min() > 0 and finite.max() > 8 * finite.min():
        ax.set_yscale("log")
        ax.set_ylim(finite.min() / 1.15, finite.max() * 1.15)
        drawing.plain_log(ax)
    else:
        ax.set_ylim(low, high)
        ax.yaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    drawing.label_right(ax, ends)


def layers(report: Report) -> Figure | None:
    """Two heatmaps, layers across: the recurrence's weight by query head, the decay time by key/value head."""
    mixing = _grid(report, "mixing")
    decay = _grid(report, "decay_tokens")
    decay = np.where(decay > 0, decay, np.nan)
    panels = []
    if np.isfinite(mixing).any():
        norm = Normalize(0, max(float(np.nanmax(mixing)), 1e-6))
        panels.append((mixing, norm, "Weight of the recurrence", "query head", "weight"))
    if np.isfinite(decay).any():
        low, high = float(np.nanmin(decay)), float(np.nanmax(decay))
        norm = LogNorm(low, high) if high > 1.05 * low else LogNorm(low / 2, high * 2)
        panels.append((decay, norm, "Mean decay time", "key/value head", "tokens"))
    if not panels:
        return None
    heights = [min(max(0.15 * len(data), 0.95), 3.2) for data, *_ in panels]
    total = sum(heights) + 0.85 * len(panels)
    figure = drawing.canvas(WIDE, total)
    top = total
    for (data, norm, title, rows, unit), height in zip(panels, heights, strict=True):
        top -= 0.35 + height
        ax = drawing.panel(figure, (0.06, top / total, 0.85, height / total), title, "layer", rows)
        bar = figure.add_axes((0.924, top / total, 0.013, height / total))
        _heatmap(figure, ax, bar, data, norm, unit)
        for missing in set(range(data.shape[1])) - {row.layer for row in report.layers}:
            ax.text(missing + 0.5, len(data) / 2, "not converted", rotation=90, ha="center", va="center",
                    color=MUTED, fontsize=6)  # fmt: skip
        top -= 0.5
    return figure


def _heatmap(figure: Figure, ax: Axes, bar: Axes, data: np.ndarray, norm: Normalize, unit: str) -> None:
    cmap = mpl.colormaps["cividis"] if isinstance(norm, LogNorm) else BLUES
    ax.set_facecolor(SHADE)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    image = ax.pcolormesh(np.ma.masked_invalid(data), cmap=cmap, norm=norm, edgecolors=PAPER, linewidth=0.8)
    rows, columns = data.shape
    ax.set_ylim(rows, 0)
    for axis, size, most in ((ax.xaxis, columns, 32), (ax.yaxis, rows, 10)):
        step = math.ceil(size / most)
        axis.set_major_locator(FixedLocator([i + 0.5 for i in range(0, size, step)]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value - 0.5:.0f}"))
    ax.tick_params(length=0)
    colorbar = figure.colorbar(image, cax=bar)
    colorbar.outline.set_visible(False)
    bar.set_title(unit, loc="left", fontsize=8, color=MUTED, pad=5)
    bar.tick_params(length=0, labelsize=8, labelcolor=MUTED)
    if isinstance(norm, LogNorm):
        bar.yaxis.set_major_locator(FixedLocator(drawing.round_steps(*image.get_clim(), most=3 if rows < 6 else 7)))
        bar.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        bar.yaxis.set_minor_locator(NullLocator())
    else:
        bar.yaxis.set_major_locator(MaxNLocator(3 if rows < 12 else 5))


def half_lives(report: Report) -> Figure | None:
    """For each layer the range of its channels' half-lives."""
    rows = [row for row in report.layers if len(row.half_life) == 5 and np.isfinite(row.half_life).all()]
    if not rows or min(row.half_life[0] for row in rows) <= 0:
        return None
    low, high = min(row.half_life[0] for row in rows), max(row.half_life[-1] for row in rows)
    figure = drawing.canvas(WIDE, 2.6)
    ax = drawing.panel(figure, (0.066, 0.17, 0.92, 0.76), "", "layer", "half-life (tokens)")
    ax.set_yscale("log")
    ax.set_ylim(low / 1.5, high * 1.5)
    drawing.ticks(ax.yaxis, drawing.round_steps(*ax.get_ylim()), count)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for row in rows:
        lowest, lower, median, upper, highest = row.half_life
        ax.plot([row.layer, row.layer], [lowest, highest], color=COLORS["recurrence_off"], lw=1)
        ax.plot([row.layer, row.layer], [lower, upper], color=COLORS["converted"], lw=5, solid_capstyle="butt")
        ax.plot([row.layer], [median], color=PAPER, marker="o", ms=3)
    return figure


def recall(report: Report) -> Figure | None:
    """A panel for each recall task of the suite."""
    found = {} if report.suite is None else report.suite.recall
    return by_distance(found, report.models.converted.window)


def by_distance(found: dict[str, list[RecallScore]], window: int | None) -> Figure | None:
    """A panel for each task: accuracy against distance, chance dotted, what the window covers shaded."""
    tasks = list(dict.fromkeys(score.task for scores in found.values() for score in scores))
    if not tasks:
        return None
    figure = drawing.canvas(WIDE, 2.9)
    left, right, gap = 0.055, 0.185, 0.022
    width = (1 - left - right - gap * (len(tasks) - 1)) / len(tasks)
    for place, task in enumerate(tasks):
        box = (left + place * (width + gap), 0.17, width, 0.7)
        ax = drawing.panel(figure, box, task.replace("_", " "), "distance" if place == 0 else "", "")
        _recall_panel(ax, {name: [s for s in scores if s.task == task] for name, scores in found.items()}, window)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        if place:
            ax.tick_params(labelleft=False)
    ends = {name: [s.accuracy for s in scores if s.task == tasks[-1]][-1] for name, scores in found.items()}
    drawing.label_right(ax, [(end, LABELS.get(name, name), name) for name, end in ends.items()])
    return figure


def _recall_panel(ax: Axes, lines: dict[str, list[RecallScore]], window: int | None) -> None:
    distances = sorted({score.distance for scores in lines.values() for score in scores})
    ax.set_xscale("log", base=2)
    ax.set_xlim(distances[0] / 1.3, distances[-1] * 1.3)
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    drawing.ticks(ax.xaxis, distances[:: math.ceil(len(distances) / 3)], context)
    if window:
        ax.axvspan(distances[0] / 1.3, window, color=SHADE, zorder=0, lw=0)
    for name, scores in lines.items():
        x = np.array([score.distance for score in scores], dtype=float)
        drawing.line(ax, x, np.array([score.accuracy for score in scores]), name, marker="o")
    chance = next(iter(lines.values()))
    ax.plot([s.distance for s in chance], [s.chance for s in chance], color=MUTED, lw=0.9, ls=(0, (1, 2)))


def memory(report: Report) -> Figure | None:
    """Bytes of cache against context length."""
    return _by_context(report.cache_bytes, "Cache for each sequence", "", byte_size, report, base=2)


def speed(report: Report) -> Figure | None:
    """Decoded tokens each second against context length."""
    return _by_context(report.tokens_per_second, "Decoding speed", "tokens each second", count, report, base=10)


def _by_context(
    measured: dict[str, dict[int, Any]], title: str, unit: str, form: Callable[[float], str], report: Report, base: int
) -> Figure | None:
    measured = {
        name: points
        for name, found in measured.items()
        if (points := {k: v for k, v in sorted(found.items()) if v > 0 and k > 0 and math.isfinite(v)})
    }
    if not measured:
        return None
    figure = drawing.canvas(HALF, 3.3)
    ax = drawing.panel(figure, (0.135, 0.14, 0.585, 0.745), title, "context (tokens)", unit)
    contexts = sorted({length for points in measured.values() for length in points})
    values = [value for points in measured.values() for value in points.values()]
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=base)
    pad = 1.0 if len(contexts) > 1 else 1.5
    ax.set_xlim(contexts[0] / pad / 1.06, contexts[-1] * pad * 1.06)
    ax.set_ylim(min(values) / 1.6, max(values) * 1.6)
    step = math.ceil(len(contexts) / 6)
    drawing.ticks(ax.xaxis, contexts[::-1][::step][::-1], context)
    drawing.ticks(ax.yaxis, drawing.powers(*ax.get_ylim()) if base == 2 else drawing.round_steps(*ax.get_ylim()), form)
    ends = []
    for name, points in measured.items():
        drawing.line(ax, np.array(list(points)), np.array(list(points.values()), dtype=float), name, marker="o")
        ends.append((float(list(points.values())[-1]), LABELS.get(name, name), name))
    drawing.label_right(ax, ends)
    longest = report.common_context(measured)
    if longest is not None:
        _gap(ax, longest, measured["teacher"][longest], measured["converted"][longest])
    return figure


def _gap(ax: Axes, x: float, teacher: float, ours: float) -> None:
    """An arrow from the teacher's value to ours, with their ratio."""
    low, high = sorted((teacher, ours))
    if high < 1.25 * low:
        return
    arrow = {"arrowstyle": "->", "color": MUTED, "lw": 0.9, "shrinkA": 5, "shrinkB": 5}
    ax.annotate("", (x, ours), (x, teacher), arrowprops=arrow)
    ax.annotate(ratio(high / low), (x, math.sqrt(low * high)), (-6, 0), textcoords="offset points", ha="right",
                va="center", color=INK, fontsize=10, fontweight="bold")  # fmt: skip


def ablation(report: Report) -> Figure | None:
    """Late loss above the teacher's, as bars that start at zero."""
    models = report.models.measured()
    models.pop("untrained")
    teacher = models.pop("teacher").late_loss
    excess = {name: result.late_loss - teacher for name, result in models.items()}
    matched = [value for name, value in excess.items() if not name.endswith("_off") and math.isfinite(value)]
    if len(excess) < 2 or not matched or not math.isfinite(teacher):
        return None
    most = 3.2 * max(map(abs, matched)) or 1.0  # a longer bar would hide the difference that matters: it is cut
    shown = {name: min(value, most) if value == value else 0.0 for name, value in excess.items()}
    figure = drawing.canvas(WIDE, 0.85 + 0.32 * len(excess))
    height = 1 - 0.8 / figure.get_figheight()
    ax = drawing.panel(
        figure, (0.175, 0.45 / figure.get_figheight(), 0.64, height), "", "late loss above the teacher (nats)", ""
    )
    low = min(0.0, *shown.values())
    ax.set_xlim(1.02 * low, max(*shown.values(), max(map(abs, matched))) * 1.02)
    ax.set_ylim(len(excess) - 0.45, -0.55)
    ax.grid(False, axis="y")
    ax.axvline(0, color=INK, lw=1.2)
    ax.annotate(f"teacher, {teacher:.3f}", (0, 1), (0, 3), xycoords=("data", "axes fraction"), fontsize=8.5,
                textcoords="offset points", color=INK, ha="left")  # fmt: skip
    for row, (name, value) in enumerate(excess.items()):
        ax.barh(row, shown[name], height=0.6, color=COLORS[name], lw=0)
        cut = ", bar cut" if value > most else ""
        text = f"{models[name].late_loss:.3f}  ({value:+.3f}{cut})".replace("-", "−")
        ax.annotate(text, (max(shown[name], 0), row), (5, 0), textcoords="offset points", va="center_baseline",
                    fontsize=8.5, color=INK)  # fmt: skip
    ax.yaxis.set_major_locator(FixedLocator(range(len(excess))))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda row, _: LABELS[list(excess)[int(row)]]))
    ax.tick_params(axis="y", labelsize=8.5, labelcolor=INK, length=0)
    ax.spines["left"].set_visible(False)
    return figure


FIGURES: dict[str, Callable[[Report], Figure | None]] = {
    "loss_by_position": loss_by_position,
    "ablation": ablation,
    "training": training,
    "layers": layers,
    "half_lives": half_lives,
    "memory": memory,
    "speed": speed,
}
BLUES = LinearSegmentedColormap.from_list("weight", ["#eef3f7", "#8fc3e3", "#0072b2", "#00263d"])


def _grid(report: Report, field: str) -> np.ndarray:
    """Heads down, layers across; NaN where a layer has no such head, or it is not converted."""
    columns = {row.layer: _spread(getattr(row, field), len(row.decay_tokens), row.kept) for row in report.layers}
    grid = np.full((max(map(len, columns.values()), default=0), max(columns, default=-1) + 1), np.nan)
    for layer, values in columns.items():
        grid[: len(values), layer] = values
    return np.where(np.isfinite(grid), grid, np.nan)


def _spread(values: list[float], converted: int, kept: list[int]) -> list[float]:
    """One value for each head, NaN for those of the key/value heads that are `kept`; so many are `converted`."""
    size = len(values) // max(converted, 1)  # heads of a group, or 1
    groups = iter([values[begin : begin + size] for begin in range(0, len(values), max(size, 1))])
    every = converted + len(kept)
    return [x for head in range(every) for x in ([math.nan] * size if head in kept else next(groups, []))]
