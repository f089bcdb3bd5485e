"""The HTML that the report's page is made of: sections, tables, figures, and how they look."""

import re
from collections.abc import Iterable
from html import escape

from linearize.drawing import DARK, LABELS


def section(title: str, body: str) -> str:
    """A headed part of the page."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], kind: str) -> str:
    """A table of the CSS class `kind`; each row begins with its heading, and our model's is set off."""
    top = "<thead><tr>" + "".join(f'<th scope="col">{escape(c)}</th>' for c in head) + "</tr></thead>" if head else ""
    body = "".join(
        f'<tr{" class=ours" if row[0] == LABELS["converted"] else ""}><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def inline(svg: str, alternative: str) -> str:
    """A standalone SVG as part of the page: as wide as its place, its colours following the page's theme."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height|xmlns(:\w+)?|version)="[^"]*"', "", opening)
    for color in DARK:
        rest = rest.replace(f": {color}", f": var(--c{color[1:]})")
    return f'{opening} role="img" aria-label="{escape(alternative)}">{rest}'


def style() -> str:
    """The style sheet, in light and dark."""
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
