"""The report as a page to look at, a table and a model card; its numbers are `results`, its pictures `figures`."""

import math
import re
from html import escape
from pathlib import Path

import yaml

from linearize import page, report_suite
from linearize.drawing import LABELS
from linearize.figures import figures
from linearize.files import disk_error, write_text
from linearize.results import EARLY, ModelResult, Report, byte_size, context, count, findings, percent, ratio, verdict

PARITY = 0.02  # a larger difference between decoding and the full forward is more than rounding, also in bf16
COLUMNS = ("model", "window", "trained tokens", "perplexity", f"loss, first {EARLY}", "late loss", "agreement")
WITHOUT_BASELINE = {  # captions of figures where the window-only model is missing
    "loss_by_position": "Right, what is left to the teacher; what a window alone would leave was not measured.",
    "ablation": "What a model trained with the recurrence loses without it; that alone does not show what it is worth.",
    "training": "The loss of each stage, smoothed over the faint raw loss.",
}
CAPTIONS = {  # figure -> its caption, and what it shows to somebody who cannot see it
    "loss_by_position": (
        "If the recurrence carries anything from beyond the window, the blue line runs below the orange one in the "
        "shaded late half.",
        "Mean loss by position for each model, and its difference to the teacher's",
    ),
    "ablation": (
        "The blue bar against the orange one is what the recurrence is worth; the bar with the recurrence switched off "
        "only shows what a model trained with it loses without it.",
        "Late loss above the teacher's for each model",
    ),
    "training": (
        "Where the lines of one stage meet, the recurrence makes no difference to what is being trained (smoothed over "
        "the faint raw loss).",
        "Training loss against tokens for each stage",
    ),
    "layers": (
        "The darker a head in the upper map, the more it takes from the recurrence; the lower map shows for how many "
        "tokens its state remembers.",
        "Heatmaps of the recurrence's weight and of the mean decay time by layer and head",
    ),
    "half_lives": (
        "Half of what a channel of the state holds is forgotten after its half-life: for each layer the median, the "
        "middle half and 5 to 95 % of its channels.",
        "Ranges of half-lives by layer",
    ),
    "memory": (
        "The teacher's cache grows with every token; a window and a state do not.",
        "Cache bytes against context length for teacher and converted model",
    ),
    "speed": (
        "The teacher reads its whole cache for each token; a window and a state are the same work at every context.",
        "Decoding speed against context length for teacher and converted model",
    ),
}


def write(report: Report, folder: str | Path) -> None:
    """Write `report.json` and `report.html` into `folder`."""
    folder = Path(folder)
    html, data = render(report), report.model_dump_json(indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    write_text(folder / "report.json", data + "\n")
    write_text(folder / "report.html", html)


def table(report: Report) -> str:
    """All models, a markdown table that also reads well in a terminal."""
    rows = [COLUMNS, *_rows(report)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    lines.insert(1, "| " + " | ".join(rule))
    return "\n".join(line + " |" for line in lines)


def model_card(report: Report, base_model: str) -> str:
    """The README.md of a converted checkpoint."""
    front: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["linearize", "hybrid", "linear-attention", report.structure],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):  # the hub refuses anything else, such as a local path
        front["base_model"] = base_model
    base, structure = _code(base_model), _code(report.structure)
    size = "keeps a cache of constant size"
    if report.kept:
        size += f"; {report.kept} stay softmax attention, whose cache grows"
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {_code(report.model)} as a gated linear recurrence

Converted from {base} by `linearize`: every converted layer is a {structure} recurrence beside a short softmax window, \
and {size}.

{verdict(report)}

{table(report)}

Measured on {report.eval_tokens:,} tokens of held-out text ({_code(report.heldout)}) in sequences of \
{report.sequence_length:,}; late loss is the mean in nats at positions {report.sequence_length // 2:,} and up. \
`report.html` shows the rest, `report.json` holds the numbers and the recipe.

## Use

```python
import linearize  # registers the converted architecture with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## Limitations

- Exact recall from beyond the window is what a conversion loses first. Short benchmarks and perplexity barely see it: \
test what you need.
- Nothing was measured beyond {farthest(report):,} tokens of context except speed and memory.
- Decoding step by step differs from the full forward by {report.decode_parity:.1e} (relative norm of the logits).
- What holds for {base} (languages, biases, licence, safety) holds for this model too; it was not aligned again.
"""


def farthest(report: Report) -> int:
    """Tokens of the longest context that losses or recall were measured at."""
    suite, found = report.suite, [report.sequence_length]
    if suite is not None:
        found += [gap.length for gap in suite.late]
        found += [score.distance for scores in suite.recall.values() for score in scores]
    return max(found)


def render(report: Report) -> str:
    """The report as one HTML page that needs nothing else."""
    first, *others = findings(report)
    title = f"{report.model} as {report.structure}"
    sections = [
        _header(report, first, others),
        _tiles(report),
        _pictures(report),
        *report_suite.sections(report),
        page.section("All models", page.table(COLUMNS, _rows(report), "models") + _note(report)),
        _provenance(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{page.style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(report: Report, first: str, others: list[str]) -> str:
    made = f"{report.model} → {report.structure} + window"
    if report.models.converted.window:
        made += f" of {_window(report.models.converted)}"
    if report.kept:
        made += f"; {report.kept} stay as they are"
    rest = f'<p class="lead">{escape(" ".join(others))}</p>' if others else ""
    return f'<header>\n<p class="eyebrow">{escape(made)}</p>\n<h1>{escape(first)}</h1>\n{rest}\n</header>'


def _tiles(report: Report) -> str:
    models, gap = report.models, report.late_gap_closed
    window = f", window only {_number(models.window_only.perplexity)}" if models.window_only else ""
    if models.window_only is None:
        share, compared = "–", "not compared with a window alone"
    else:
        share = "none" if gap.window_only is None else percent(gap.window_only)
        equal = "not compared" if models.window_equal_memory is None else "no gap"
        equal = equal if gap.window_equal_memory is None else percent(gap.window_equal_memory)
        compared = f"of what the window alone leaves; at equal memory {equal}"
    bad = not report.decode_parity <= PARITY
    tiles = [
        (
            "Perplexity",
            _number(models.converted.perplexity),
            f"teacher {_number(models.teacher.perplexity)}{window}",
            "",
        ),
        ("Late gap closed", share, compared, ""),
        ("Cache", *_memory_tile(report), ""),
        ("Decoding speed", *_speed_tile(report), ""),
        (
            "Decode parity",
            f"{report.decode_parity:.0e}".replace("e-0", "e−").replace("e-", "e−"),
            "too large: decoding is not the model that was evaluated"
            if bad
            else "step by step against the full forward",
            " bad" if bad else "",
        ),
    ]
    html = "\n".join(
        f'<div class="tile{extra}"><dt>{escape(name)}</dt>'
        f"<dd><b>{escape(value)}</b><span>{escape(note)}</span></dd></div>"
        for name, value, note, extra in tiles
    )
    return f'<dl class="tiles">\n{html}\n</dl>'


def _memory_tile(report: Report) -> tuple[str, str]:
    at = report.common_context(report.cache_bytes)
    if at is None:
        return "–", "not measured"
    teacher, ours = report.cache_bytes["teacher"][at], report.cache_bytes["converted"][at]
    change = f"{ratio(teacher / ours)} less" if 0 < ours <= teacher else f"{ratio(ours / max(teacher, 1))} more"
    return change, f"{byte_size(ours)} against {byte_size(teacher)} at {context(at)} tokens"


def _speed_tile(report: Report) -> tuple[str, str]:
    at = report.common_context(report.tokens_per_second)
    if at is None:
        return "–", "not measured"
    teacher, ours = report.tokens_per_second["teacher"][at], report.tokens_per_second["converted"][at]
    change = ratio(ours / teacher) if teacher > 0 else "–"
    return change, f"{count(ours)} against the teacher's {count(teacher)} tokens each second at {context(at)}"


def _pictures(report: Report) -> str:
    titles = {
        "loss_by_position": "What is lost, and where",
        "ablation": "What is left at late positions",
        "training": "Training",
        "layers": "What the layers learned",
        "half_lives": "How long the states remember",
        "memory": "Memory",
        "speed": "Speed",
    }
    html = []
    for name, svg in figures(report).items():
        caption, alternative = CAPTIONS[name]
        if report.models.window_only is None:
            caption = WITHOUT_BASELINE.get(name, caption)
        half = ' class="half"' if name in ("memory", "speed") else ""
        html.append(
            f'<section{half} id="{name}">\n<h2>{titles[name]}</h2>\n<figure>\n{page.inline(svg, alternative)}\n'
            f"<figcaption>{escape(caption)}</figcaption>\n</figure>\n</section>"
        )
    return '<div class="figures">\n' + "\n".join(html) + "\n</div>"


def _rows(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            LABELS[name],
            "all" if name == "teacher" and result.window is None else _window(result),
            _whole(result.trained_tokens),
            _number(result.perplexity),
            f"{result.early_loss:.3f}",
            f"{result.late_loss:.3f}",
            "–" if result.agreement is None else percent(result.agreement),
        )
        for name, result in report.models.measured().items()
    ]


def _note(report: Report) -> str:
    text = (
        f"{report.eval_tokens:,} tokens of held-out text ({report.heldout}) in sequences of {report.sequence_length:,}."
        f" Losses are means in nats; late is position {report.sequence_length // 2:,} and up; agreement is how often "
        "the most likely next token is the teacher's."
    )
    return f'<p class="note">{escape(text)}</p>'


def _provenance(report: Report) -> str:
    data = report.model_dump(mode="json")
    stages = list(dict.fromkeys([*report.seconds, *report.trained_tokens]))
    stage_rows = [
        (s, _duration(report.seconds.get(s)), f"{report.trained_tokens[s]:,}" if s in report.trained_tokens else "–")
        for s in stages
    ]
    parts = [f"<h3>Hardware</h3><p>{escape(report.hardware)}</p>"]
    if report.seeds:
        parts.append("<h3>Seeds</h3>" + page.table((), [(k, str(v)) for k, v in report.seeds.items()], "plain"))
    parts = [f"<div>{''.join(parts)}</div>"]
    if stage_rows:
        parts.insert(0, f"<div><h3>Stages</h3>{page.table(('stage', 'time', 'tokens'), stage_rows, 'plain')}</div>")
    if report.versions:
        parts.append(f"<div><h3>Versions</h3>{page.table((), list(report.versions.items()), 'plain')}</div>")
    recipe = yaml.safe_dump(data["recipe"], sort_keys=False, allow_unicode=True)
    folded = f"<details><summary>The recipe</summary><pre>{escape(recipe)}</pre></details>" if report.recipe else ""
    return page.section("How it was made", f'<div class="columns">{"".join(parts)}</div>\n{folded}')


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    return f"{value:.1f}" if abs(value) < 1000 else count(value)


def _window(result: ModelResult) -> str:
    narrowest = "" if result.narrowest_window is None else f"{result.narrowest_window:,}–"
    return narrowest + _whole(result.window)


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _code(text: str) -> str:
    """Text from outside as inline code on one line of markdown."""
    return "`" + re.sub(r"[`\s]+", " ", text).strip() + "`"
