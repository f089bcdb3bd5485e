"""How figures look: colours, names, axes, lines and labels, and the way from matplotlib to SVG."""

import math
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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
    "window_off": "converted, window off",
}
COLORS = {  # Okabe and Ito's, some darkened so that text in them can be read
    "teacher": INK,
    "untrained": "#8a939c",
    "window_only": "#d55e00",
    "window_equal_memory": "#a8487f",
    "converted": "#0072b2",
    "recurrence_off": "#4aa6dc",
    "window_off": "#8a939c",
}
DASHES = {"window_equal_memory": (0, (5, 2)), "untrained": (0, (1, 1.2))}
FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
WIDE, HALF = 9.6, 4.7  # inches; at 72 dpi the page shows both at the same scale
_rc_lock = threading.Lock()  # rcParams are the only way to ask for text as text


def to_svg(figure: Figure, name: str) -> str:
    """The figure as SVG with text as text, the same bytes each time, its ids prefixed by `name`."""
    out = StringIO()
    with _rc_lock, mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    svg = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", FONT, out.getvalue())
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)


def canvas(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=72, facecolor=PAPER)


def panel(figure: Figure, box: tuple[float, float, float, float], title: str, x: str, y: str) -> Axes:
    ax = figure.add_axes(box, facecolor="none")
    ax.set_title(plain(title), loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=7)
    ax.set_xlabel(x, fontsize=8.5, color=MUTED, labelpad=4)
    ax.set_ylabel(y, fontsize=8.5, color=MUTED, labelpad=5)
    ax.tick_params(which="both", colors=GRID, labelcolor=MUTED, labelsize=8.5, length=3, width=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRID)
    ax.grid(True, color=GRID, lw=0.6)
    ax.set_axisbelow(True)
    return ax


def line(ax: Axes, x: np.ndarray, y: np.ndarray, name: str, marker: str | None = None) -> None:
    width = {"untrained": 1.1, "converted": 2.1}.get(name, 1.6)
    style: Any = DASHES.get(name, "-")
    color, top = COLORS.get(name, MUTED), 4 if name == "converted" else 3
    ax.plot(x, y, color=color, lw=width, ls=style, marker=marker, ms=3.6, zorder=top, solid_joinstyle="round")


def label_right(ax: Axes, ends: Iterable[tuple[float, str, str]], gap: float = 11.5) -> None:
    """Name each line at the right of the axes, at least `gap` points apart."""
    ends = sorted(ends)
    wanted = [float(ax.transData.transform((ax.get_xlim()[1], y))[1]) for y, _, _ in ends]
    for (y, text, name), at, spread in zip(ends, wanted, spread_out(wanted, gap), strict=True):
        ax.annotate(plain(text), (1, y), (7, spread - at), xycoords=("axes fraction", "data"), va="center_baseline",
                    textcoords="offset points", color=COLORS.get(name, MUTED), fontsize=8.5,
                    fontweight="bold" if name == "converted" else "normal", annotation_clip=False)  # fmt: skip


def spread_out(wanted: list[float], gap: float) -> list[float]:
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


def limits(lines: list[np.ndarray], pad: float, include: float | None = None) -> tuple[float, float]:
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


def clip(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1]) if value == value else limits[1]


def smoothed(loss: np.ndarray) -> np.ndarray:
    """A centred moving average over about a twentieth of the curve, skipping what is not finite."""
    width = max(1, len(loss) // 20)
    kernel, finite = np.ones(2 * (width // 2) + 1), np.isfinite(loss)
    total = np.convolve(np.where(finite, loss, 0.0), kernel, "same")
    weight = np.convolve(finite.astype(float), kernel, "same")
    return np.divide(total, weight, out=np.full(len(loss), np.nan), where=weight > 0)[: len(loss)]


def thinned(x: np.ndarray, y: np.ndarray, most: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """At most about `most` points, each the mean of its neighbours: a figure needs no more."""
    step = math.ceil(len(x) / most)
    edges = np.arange(0, len(x), step)
    sizes = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes


def ticks(axis: Any, places: Sequence[float], form: Callable[[float], str]) -> None:
    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def plain_log(ax: Axes) -> None:
    ticks(ax.yaxis, round_steps(*ax.get_ylim()), lambda value: f"{value:g}")


def powers(low: float, high: float) -> list[float]:
    """Powers of two between the two, at most about six."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first + 1) / 6))
    return [2.0**i for i in range(first, last + 1, step)]


def round_steps(low: float, high: float, most: int = 7) -> list[float]:
    """1, 2, 5, 10, 20, ... between the two, or only powers of ten where those would be too many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    return steps if len(steps) <= most else [10.0**d for d in decades if low <= 10.0**d <= high]


def plain(text: str) -> str:
    """Text from outside, never read as mathematics."""
    return text.replace("$", r"\$")
