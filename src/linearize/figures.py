"""The report's figures: each a function from a report to a matplotlib figure, or None where nothing was measured."""

import math
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from linearize.results import Curve, Report, byte_size, context, count, ratio

PAPER, INK, MUTED, GRID, SHADE = "#ffffff", "#1f2429", "#5c6670", "#dfe3e8", "#f1f4f7"
DARK = {  # what each colour becomes on a dark page
    PAPER: "#16191d",
    INK: "#e4e8ec",
    MUTED: "#9aa5b1",
    GRID: "#31373f",
    SHADE: "#1f242a",
    "#0072b2": "#4fb0e8",
    "#d55e00": "#f4924a",
    "#a8487f": "#dd8dbb",
    "#8a939c": "#7d8791",
    "#4aa6dc": "#2f7fb0",
}
LABELS = {
    "teacher": "teacher",
    "untrained": "converted, untrained",
    "window_only": "window only",
    "window_equal_memory": "window, equal memory",
    "converted": "converted",
    "recurrence_off": "converted, recurrence off",
}
COLORS = {  # Okabe and Ito's, some darkened so that text in them can be read
    "teacher": INK,
    "untrained": "#8a939c",
    "window_only": "#d55e00",
    "window_equal_memory": "#a8487f",
    "converted": "#0072b2",
    "recurrence_off": "#4aa6dc",
}
DASHES = {"window_equal_memory": (0, (5, 2)), "untrained": (0, (1, 1.2))}
FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
WIDE, HALF = 9.6, 4.7  # inches; at 72 dpi the page shows both at the same scale
_rc_lock = threading.Lock()  # rcParams are the only way to ask for text as text


def figures(report: Report) -> dict[str, str]:
    """Each figure that the report has data for, as a standalone SVG."""
    drawn = {name: draw(report) for name, draw in FIGURES.items()}
    return {name: to_svg(figure, name) for name, figure in drawn.items() if figure is not None}


def to_svg(figure: Figure, name: str) -> str:
    """The figure as SVG with text as text, the same bytes each time, its ids prefixed by `name`."""
    out = StringIO()
    with _rc_lock, mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    svg = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", FONT, out.getvalue())
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)


def loss_by_position(report: Report) -> Figure | None:
    """Left the loss, right what each model loses against the teacher, by position."""
    models = report.models.measured()
    models.pop("recurrence_off", None)
    losses = {name: np.array(result.loss_by_position, dtype=float) for name, result in models.items()}
    size = min(map(len, losses.values()))
    losses = {name: loss[:size] for name, loss in losses.items()}
    main = [loss for name, loss in losses.items() if name != "untrained"]
    if size == 0 or not np.isfinite(np.concatenate(main)).any():
        return None
    x = (np.arange(size) + 0.5) * report.bucket
    figure = _figure(WIDE, 3.7)
    axes = [
        _axes(figure, (0.066, 0.125, 0.262, 0.78), "Loss", "position (tokens)", "mean loss (nats)"),
        _axes(figure, (0.4, 0.125, 0.43, 0.78), "Loss above the teacher", "position (tokens)", "difference (nats)"),
    ]
    excess = {name: loss - losses["teacher"] for name, loss in losses.items()}
    limits = [
        _limits(main, 0.06),
        _limits([e for n, e in excess.items() if n not in ("untrained", "teacher")], 0.12, 0),
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
            _line(ax, x, line, name, marker="o" if size == 1 else None)
    tail = max(1, size // 8)  # a label stands at the mean of the end of its line
    ends = {name: float(np.mean(line[-tail:])) for name, line in excess.items()}
    _label_right(
        axes[1], [(_clip(ends[name], limits[1]), _end_text(name, ends[name], limits[1]), name) for name in ends]
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
    figure = _figure(WIDE, 3.3)
    left, right, gap = 0.075, 0.16, 0.22
    width = (1 - left - right - gap * (len(stages) - 1)) / len(stages)
    for i, stage in enumerate(stages):
        box = (left + i * (width + gap), 0.14, width, 0.75)
        _training_panel(
            _axes(figure, box, stage[:1].upper() + stage[1:], "tokens", "training loss"),
            [c for c in curves if c.stage == stage],
        )
    return figure


def _training_panel(ax: Axes, curves: list[Curve]) -> None:
    ends, smooth_lines, last = [], [], 1
    for curve in curves:
        tokens, loss = _thin(np.array(curve.tokens, dtype=float), np.array(curve.loss, dtype=float))
        smooth = _smooth(loss)
        color = COLORS.get(curve.model, MUTED)
        ax.plot(tokens, loss, color=color, alpha=0.22, lw=0.8)
        _line(ax, tokens, smooth, curve.model, marker="o" if len(tokens) == 1 else None)
        smooth_lines.append(smooth)
        last = max(last, curve.tokens[-1])
        if np.isfinite(smooth[-1]):
            ends.append((float(smooth[-1]), LABELS.get(curve.model, curve.model), curve.model))
    low, high = _limits(smooth_lines, 0.08)
    finite = np.concatenate(smooth_lines)
    finite = finite[np.isfinite(finite)]
    ax.set_xlim(0, last)
    if len(finite) and finite.min() > 0 and finite.max() > 8 * finite.min():
        ax.set_yscale("log")
        ax.set_ylim(finite.min() / 1.15, finite.max() * 1.15)
        _plain_log(ax)
    else:
        ax.set_ylim(low, high)
        ax.yaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    _label_right(ax, ends)


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
    figure = _figure(WIDE, total)
    top = total
    for (data, norm, title, rows, unit), height in zip(panels, heights, strict=True):
        top -= 0.35 + height
        ax = _axes(figure, (0.06, top / total, 0.85, height / total), title, "layer", rows)
        bar = figure.add_axes((0.924, top / total, 0.013, height / total))
        _heatmap(figure, ax, bar, data, norm, unit)
        for missing in set(range(data.shape[1])) - {row.layer for row in report.layers}:
            ax.text(missing + 0.5, len(data) / 2, "not converted", rotation=90, ha="center", va="center",
                    color=MUTED, fontsize=6)  # fmt: skip
        top -= 0.5
    return figure


def _heatmap(figure: Figure, ax: Axes, bar: Axes, data: np.ndarray, norm: Normalize, unit: str) -> None:
    cmap = mpl.colormaps["cividis"] if isinstance(norm, LogNorm) else _BLUES
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
        bar.yaxis.set_major_locator(FixedLocator(_round_steps(*image.get_clim(), most=3 if rows < 6 else 7)))
        bar.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        bar.yaxis.set_minor_locator(NullLocator())
    else:
        bar.yaxis.set_major_locator(MaxNLocator(3 if rows < 12 else 5))


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
    figure = _figure(HALF, 3.3)
    ax = _axes(figure, (0.135, 0.14, 0.585, 0.745), title, "context (tokens)", unit)
    contexts = sorted({length for points in measured.values() for length in points})
    values = [value for points in measured.values() for value in points.values()]
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=base)
    pad = 1.0 if len(contexts) > 1 else 1.5
    ax.set_xlim(contexts[0] / pad / 1.06, contexts[-1] * pad * 1.06)
    ax.set_ylim(min(values) / 1.6, max(values) * 1.6)
    step = math.ceil(len(contexts) / 6)
    _ticks(ax.xaxis, contexts[::-1][::step][::-1], context)
    _ticks(ax.yaxis, _powers(*ax.get_ylim()) if base == 2 else _round_steps(*ax.get_ylim()), form)
    ends = []
    for name, points in measured.items():
        _line(ax, np.array(list(points)), np.array(list(points.values()), dtype=float), name, marker="o")
        ends.append((float(list(points.values())[-1]), LABELS.get(name, name), name))
    _label_right(ax, ends)
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
    matched = [value for name, value in excess.items() if name != "recurrence_off" and math.isfinite(value)]
    if len(excess) < 2 or not matched or not math.isfinite(teacher):
        return None
    most = 3.2 * max(map(abs, matched)) or 1.0  # a longer bar would hide the difference that matters: it is cut
    shown = {name: min(value, most) if value == value else 0.0 for name, value in excess.items()}
    figure = _figure(WIDE, 0.85 + 0.32 * len(excess))
    height = 1 - 0.8 / figure.get_figheight()
    ax = _axes(
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
    "memory": memory,
    "speed": speed,
}
_BLUES = LinearSegmentedColormap.from_list("weight", ["#eef3f7", "#8fc3e3", "#0072b2", "#00263d"])


# Drawing


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=72, facecolor=PAPER)


def _axes(figure: Figure, box: tuple[float, float, float, float], title: str, x: str, y: str) -> Axes:
    ax = figure.add_axes(box, facecolor="none")
    ax.set_title(_plain(title), loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=7)
    ax.set_xlabel(x, fontsize=8.5, color=MUTED, labelpad=4)
    ax.set_ylabel(y, fontsize=8.5, color=MUTED, labelpad=5)
    ax.tick_params(which="both", colors=GRID, labelcolor=MUTED, labelsize=8.5, length=3, width=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRID)
    ax.grid(True, color=GRID, lw=0.6)
    ax.set_axisbelow(True)
    return ax


def _line(ax: Axes, x: np.ndarray, y: np.ndarray, name: str, marker: str | None = None) -> None:
    width = {"untrained": 1.1, "converted": 2.1}.get(name, 1.6)
    style: Any = DASHES.get(name, "-")
    color, top = COLORS.get(name, MUTED), 4 if name == "converted" else 3
    ax.plot(x, y, color=color, lw=width, ls=style, marker=marker, ms=3.6, zorder=top, solid_joinstyle="round")


def _label_right(ax: Axes, ends: Iterable[tuple[float, str, str]], gap: float = 11.5) -> None:
    """Name each line at the right of the axes, at least `gap` points apart."""
    ends = sorted(ends)
    wanted = [float(ax.transData.transform((ax.get_xlim()[1], y))[1]) for y, _, _ in ends]
    for (y, text, name), at, spread in zip(ends, wanted, _spread(wanted, gap), strict=True):
        ax.annotate(_plain(text), (1, y), (7, spread - at), xycoords=("axes fraction", "data"), va="center_baseline",
                    textcoords="offset points", color=COLORS.get(name, MUTED), fontsize=8.5,
                    fontweight="bold" if name == "converted" else "normal", annotation_clip=False)  # fmt: skip


def _spread(wanted: list[float], gap: float) -> list[float]:
    """The nearest ascending places at least `gap` apart: runs that collide are centred on their mean."""
    runs: list[list[float]] = []
    for at in wanted:
        runs.append([at])
        while len(runs) > 1 and _start(runs[-1], gap) < _start(runs[-2], gap) + gap * len(runs[-2]):
            last = runs.pop()
            runs[-1] += last
    return [_start(run, gap) + gap * i for run in runs for i in range(len(run))]


def _start(run: list[float], gap: float) -> float:
    return sum(run) / len(run) - gap * (len(run) - 1) / 2


def _limits(lines: list[np.ndarray], pad: float, include: float | None = None) -> tuple[float, float]:
    """The range of the finite values, with a margin."""
    values = np.concatenate([np.asarray(line, dtype=float) for line in lines])
    values = values[np.isfinite(values)]
    if include is not None:
        values = np.append(values, include)
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    margin = pad * (high - low) or 0.5
    return low - margin, high + margin


def _clip(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1]) if value == value else limits[1]


def _smooth(loss: np.ndarray) -> np.ndarray:
    """A centred moving average over about a twentieth of the curve, skipping what is not finite."""
    width = max(1, len(loss) // 20)
    kernel, finite = np.ones(2 * (width // 2) + 1), np.isfinite(loss)
    total = np.convolve(np.where(finite, loss, 0.0), kernel, "same")
    weight = np.convolve(finite.astype(float), kernel, "same")
    return np.divide(total, weight, out=np.full(len(loss), np.nan), where=weight > 0)[: len(loss)]


def _thin(x: np.ndarray, y: np.ndarray, most: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """At most about `most` points, each the mean of its neighbours: a figure needs no more."""
    step = math.ceil(len(x) / most)
    edges = np.arange(0, len(x), step)
    sizes = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes


def _grid(report: Report, field: str) -> np.ndarray:
    """Heads down, layers across; NaN where a layer has no such head."""
    rows = {row.layer: getattr(row, field) for row in report.layers}
    grid = np.full((max(map(len, rows.values()), default=0), max(rows, default=-1) + 1), np.nan)
    for layer, values in rows.items():
        grid[: len(values), layer] = values
    return np.where(np.isfinite(grid), grid, np.nan)


def _ticks(axis: Any, places: Sequence[float], form: Callable[[float], str]) -> None:
    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def _plain_log(ax: Axes) -> None:
    _ticks(ax.yaxis, _round_steps(*ax.get_ylim()), lambda value: f"{value:g}")


def _powers(low: float, high: float) -> list[float]:
    """Powers of two between the two, at most about six."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first + 1) / 6))
    return [2.0**i for i in range(first, last + 1, step)]


def _round_steps(low: float, high: float, most: int = 7) -> list[float]:
    """1, 2, 5, 10, 20, ... between the two, or only powers of ten where those would be too many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return steps if len(steps) <= most else [10.0**d for d in decades if low <= 10.0**d <= high]


def _plain(text: str) -> str:
    """Text from outside, never read as mathematics."""
    return text.replace("$", r"\$")
