"""The report's sections of the full suite: late gap by length, recall, benchmarks, options and generation."""

import math
from html import escape

from linearize import page
from linearize.drawing import LABELS, to_svg
from linearize.figures import recall
from linearize.measures import Interval, LateGap, Suite, TaskScore
from linearize.results import Report, context, percent

CAPTION = (
    "Accuracy of giving what was said so many tokens before, with running text between. Shaded, the distances that the "
    "window covers by itself; dotted, chance. Where the blue line is above the orange one, the recurrence remembers."
)


def sections(report: Report) -> list[str]:
    """Those for which something was measured."""
    suite = report.suite
    if suite is None:
        return []
    parts = [_late(suite), _recall(report, suite), _tasks(suite), _options(suite), _generation(suite)]
    return [part for part in parts if part]


def _late(suite: Suite) -> str:
    if not suite.late:
        return ""
    baselines = list(dict.fromkeys(name for gap in suite.late for name in gap.closed))
    names = list(dict.fromkeys(name for gap in suite.late for name in gap.losses))
    rows = [(_label(name), *(_loss(gap, name) for gap in suite.late)) for name in names]
    for name in baselines:
        rows.append((f"closed of {_label(name)}", *(_share(gap.closed.get(name)) for gap in suite.late)))
    head = ("", *(f"{context(gap.length)}: {_texts(gap)}" for gap in suite.late))
    seeds = max(len(losses) for gap in suite.late for losses in gap.losses.values())
    note = (
        "Mean loss in nats at positions T / 2 and up of sequences of T tokens. Closed is the share of a "
        "baseline's gap to the teacher that the recurrence closes, with its 95 % interval over articles"
        f"{f', of {seeds} training seeds' if seeds > 1 else ''}; one article gives none."
    )
    return page.section("Late gap by length", page.table(head, rows, "plain") + _note(note))


def _recall(report: Report, suite: Suite) -> str:
    figure = recall(report)
    if figure is None:
        return ""
    svg = page.inline(to_svg(figure, "recall"), "Recall by distance for each task and model")
    distances = sorted({score.distance for scores in suite.recall.values() for score in scores})
    rows = []
    for task in dict.fromkeys(score.task for scores in suite.recall.values() for score in scores):
        for name, scores in suite.recall.items():
            found = {score.distance: score for score in scores if score.task == task}
            cells = [
                f"{100 * found[d].accuracy:.0f} / {100 * found[d].exact:.0f}" if d in found else "–" for d in distances
            ]
            rows.append((f"{task.replace('_', ' ')}, {_label(name)}", *cells))
    table = page.table(("task, model", *map(context, distances)), rows, "plain")
    trials = next(iter(suite.recall.values()))[0].trials
    note = (
        f"Per cent of {trials} trials: chosen among ten by log probability (chance is 10, of multi value 40; of copy, "
        "tokens of the passage that are right) / given exactly by greedy decoding."
    )
    folded = f"<details><summary>All figures</summary>{table}{_note(note)}</details>"
    body = f"<figure>\n{svg}\n<figcaption>{escape(CAPTION)}</figcaption>\n</figure>\n{folded}"
    return page.section("Recall from beyond the window", body)


def _tasks(suite: Suite) -> str:
    if not suite.tasks:
        return ""
    teacher = next(iter(suite.tasks.values()))
    rows = []
    for score in teacher:
        found = {name: _same(scores, score) for name, scores in suite.tasks.items()}
        ours = found.get("converted")
        difference = _points(None if ours is None else ours.difference)
        rows.append((f"{score.task}, {score.metric}", f"{score.items:,}", *map(_score, found.values()), difference))
    if suite.short_tasks:
        means = [_points(suite.short_tasks.get(name)) for name in suite.tasks]
        rows.append(("five short tasks, to teacher", "", *(mean.split(" ")[0] for mean in means), means[-1]))
    head = ("task", "items", *map(_label, suite.tasks), "converted to teacher")
    note = (
        "Per cent right ± the standard error, and differences to the teacher, item by item, in points with their 95 % "
        "interval. Questions are short: what these tasks say of memory beyond the window is little."
    )
    return page.section("Benchmarks", page.table(head, rows, "plain") + _note(note))


def _options(suite: Suite) -> str:
    rows = []
    for place, score in enumerate(next(iter(suite.tasks.values()), [])):
        if not score.answered:
            continue
        rows.append((f"{score.task}, right", _shares(score.right)))
        for name, scores in suite.tasks.items():
            rows.append((f"{score.task}, {_label(name)}", _shares(scores[place].answered)))
    if not rows:
        return ""
    note = "How often each option, by its place, is the right one, and how often each model chooses it, in per cent."
    return page.section("Option bias", page.table(("task, model", "A / B / C …"), rows, "plain") + _note(note))


def _generation(suite: Suite) -> str:
    if not suite.generation:
        return ""
    rows = [
        (_label(name), percent(found.greedy_repetition), percent(found.sampled_repetition), f"{found.judged_loss:.3f}")
        for name, found in suite.generation.items()
    ]
    some = next(iter(suite.generation.values()))
    note = (
        f"Continuations of {some.prompts} fixed prompts by up to {some.tokens} tokens: the share of runs of four "
        "tokens that were there before, and the teacher's mean loss, in nats, on what the model itself sampled."
    )
    head = ("model", "repeated, greedy", "repeated, sampled", "judged loss")
    return page.section("Generation", page.table(head, rows, "plain") + _note(note))


def _texts(gap: LateGap) -> str:
    return f"{len(gap.articles)} sequences of {len(set(gap.articles))} articles"


def _same(scores: list[TaskScore], like: TaskScore) -> TaskScore | None:
    return next((score for score in scores if (score.task, score.metric) == (like.task, like.metric)), None)


def _score(score: TaskScore | None) -> str:
    return "–" if score is None else f"{100 * score.score:.1f} ± {100 * score.error:.1f}"


def _points(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    text = f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    return text.replace("-", "−")


def _share(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    if math.isinf(interval.low) and math.isinf(interval.high):  # of one article, or one item
        return f"{percent(interval.value)} [–]".replace(" %", "%")
    return f"{percent(interval.value)} [{percent(interval.low)}, {percent(interval.high)}]".replace(" %", "%")


def _shares(values: list[float]) -> str:
    return " / ".join(f"{100 * value:.0f}" for value in values)


def _loss(gap: LateGap, name: str) -> str:
    if name not in gap.losses:
        return "–"
    values = [value for seed in gap.losses[name] for value in seed]
    return f"{sum(values) / len(values):.3f}"


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
