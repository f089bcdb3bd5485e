"""The report as a page to look at, a table and a model card; its numbers are `results`, its pictures `figures`."""

import math
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

import yaml

from linearize.drawing import DARK, LABELS
from linearize.figures import figures
from linearize.files import disk_error, write_text
from linearize.results import EARLY, Report, byte_size, context, count, findings, percent, ratio, verdict

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
    page, data = render(report), report.model_dump_json(indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    write_text(folder / "report.json", data + "\n")
    write_text(folder / "report.html", page)


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
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {_code(report.model)} as a gated linear recurrence

Converted from {base} by `linearize`: every converted layer is a {structure} recurrence beside a short softmax window, \
and keeps a cache of constant size.

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
- Nothing was measured beyond {report.sequence_length:,} tokens of context except speed and memory.
- Decoding step by step differs from the full forward by {report.decode_parity:.1e} (relative norm of the logits).
- What holds for {base} (languages, biases, licence, safety) holds for this model too; it was not aligned again.
"""


def render(report: Report) -> str:
    """The report as one HTML page that needs nothing else."""
    first, *others = findings(report)
    title = f"{report.model} as {report.structure}"
    sections = [
        _header(report, first, others),
        _tiles(report),
        _pictures(report),
        _section("All models", _html_table(COLUMNS, _rows(report), "models") + _note(report)),
        _provenance(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(report: Report, first: str, others: list[str]) -> str:
    made = f"{report.model} → {report.structure} + window"
    if report.models.converted.window:
        made += f" of {report.models.converted.window}"
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
            f'<section{half} id="{name}">\n<h2>{titles[name]}</h2>\n<figure>\n{_inline(svg, alternative)}\n'
            f"<figcaption>{escape(caption)}</figcaption>\n</figure>\n</section>"
        )
    return '<div class="figures">\n' + "\n".join(html) + "\n</div>"


def _inline(svg: str, alternative: str) -> str:
    """A standalone SVG as part of the page: as wide as its place, its colours following the page's theme."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height|xmlns(:\w+)?|version)="[^"]*"', "", opening)
    for color in DARK:
        rest = rest.replace(f": {color}", f": var(--c{color[1:]})")
    return f'{opening} role="img" aria-label="{escape(alternative)}">{rest}'


def _rows(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            LABELS[name],
            "all" if name == "teacher" and result.window is None else _whole(result.window),
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
        parts.append("<h3>Seeds</h3>" + _html_table((), [(k, str(v)) for k, v in report.seeds.items()], "plain"))
    parts = [f"<div>{''.join(parts)}</div>"]
    if stage_rows:
        parts.insert(0, f"<div><h3>Stages</h3>{_html_table(('stage', 'time', 'tokens'), stage_rows, 'plain')}</div>")
    if report.versions:
        parts.append(f"<div><h3>Versions</h3>{_html_table((), list(report.versions.items()), 'plain')}</div>")
    recipe = yaml.safe_dump(data["recipe"], sort_keys=False, allow_unicode=True)
    folded = f"<details><summary>The recipe</summary><pre>{escape(recipe)}</pre></details>" if report.recipe else ""
    return _section("How it was made", f'<div class="columns">{"".join(parts)}</div>\n{folded}')


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _html_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], kind: str) -> str:
    top = "<thead><tr>" + "".join(f'<th scope="col">{escape(c)}</th>' for c in head) + "</tr></thead>" if head else ""
    body = "".join(
        f'<tr{" class=ours" if row[0] == LABELS["converted"] else ""}><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    return f"{value:.1f}" if abs(value) < 1000 else count(value)


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


def _style() -> str:
    light = "".join(f"--c{color[1:]}:{color};" for color in DARK)
    dark = "".join(f"--c{color[1:]}:{value};" for color, value in DARK.items())
    return f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_CSS}"


_CSS = """
:root{--paper:var(--cffffff);--ink:var(--c1f2429);--muted:var(--c5c6670);--rule:var(--cdfe3e8);--shade:var(--cf1f4f7);
  --accent:var(--c0072b2);--bad:var(--cd55e00)}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:1020px;margin:0 auto;padding:56px 28px 80px}
.eyebrow{margin:0 0 14px;color:var(--accent);font-weight:600;font-size:.9rem;overflow-wrap:anywhere}
h1{margin:0;font-size:clamp(1.45rem,3.1vw,1.95rem);line-height:1.27;font-weight:650;letter-spacing:-.014em;
  text-wrap:pretty;max-width:34em}
.lead{margin:18px 0 0;color:var(--muted);max-width:50em;text-wrap:pretty}
h2{margin:0 0 10px;font-size:1.12rem;font-weight:650;letter-spacing:-.005em}
h3{margin:0 0 6px;font-size:.82rem;color:var(--muted);font-weight:600}
section{margin-top:52px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(168px,1fr));gap:12px;margin:36px 0 0}
.tile{background:var(--shade);border-radius:8px;padding:14px 16px 15px}
.tile dt{font-size:.82rem;color:var(--muted)}
.tile dd{margin:0}
.tile b{display:block;font-size:1.62rem;line-height:1.35;font-weight:650;letter-spacing:-.02em;white-space:nowrap;
  font-variant-numeric:tabular-nums}
.tile span{display:block;font-size:.8rem;line-height:1.4;color:var(--muted);text-wrap:pretty}
.tile.bad b,.tile.bad span{color:var(--bad)}
.figures h2{margin-bottom:2px}
.figures{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);column-gap:28px}
.figures section{grid-column:1/-1;min-width:0}
.figures .half{grid-column:auto}
@media (max-width:760px){.figures .half{grid-column:1/-1}main{padding:32px 18px 56px}
  figure{overflow-x:auto}figure svg{min-width:620px}.half svg{min-width:0}}
figure{margin:0}
figure svg{display:block;width:100%;height:auto}
figcaption,.note{margin:10px 0 0;color:var(--muted);font-size:.88rem;max-width:56em;text-wrap:pretty}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
.models{width:100%}
th,td{padding:8px 0 8px 18px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule);font-weight:400}
th:first-child{text-align:left;padding-left:0}
thead th{color:var(--muted);font-size:.82rem;vertical-align:bottom}
.ours th,.ours td{font-weight:650;color:var(--accent)}
.plain th,.plain td{padding-top:4px;padding-bottom:4px;border:0}
.columns{display:flex;flex-wrap:wrap;gap:28px 56px}
.columns>div{max-width:100%}
.columns p{margin:0 0 18px;font-size:.92rem;max-width:22em;overflow-wrap:anywhere}
details{margin-top:28px;border:1px solid var(--rule);border-radius:8px}
summary{padding:10px 16px;cursor:pointer;font-size:.92rem;font-weight:600}
pre{margin:0;padding:4px 16px 16px;overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media print{main{padding:0}section{break-inside:avoid}}
"""
