"""The comparison as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from sdsopt._version import __version__
from sdsopt.compare.columns import HEADINGS, legend, sections
from sdsopt.compare.figures import make_figures, to_svg
from sdsopt.compare.step_time import StepTimes
from sdsopt.compare.summary import Row

# Light or dark as the reader's system is. The figures keep their white ground, as cards.
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: pre-line; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; }
.claims td:first-child { font-family: inherit; } .claims td { white-space: normal; }
.claims td:last-child { white-space: nowrap; } .findings { list-style: none; padding-left: 0; }
tr.section td { font-style: italic; font-family: inherit; background: var(--soft); }
pre { font-size: .85rem; overflow-x: auto; }
img { max-width: 100%; background: white; border-radius: 8px; border: 1px solid var(--line); }
.better { color: light-dark(#006b4b, #4fd1a5); font-weight: 600; }
.worse { color: light-dark(#a8450c, #ff9d5c); font-weight: 600; }
"""

_CAPTIONS = {
    "loss_curves": "Training loss at each method's best learning rate",
    "lr_sensitivity": "Final loss over the learning rate",
    "differences": "Difference to tuned LoRA: 95 % interval of the mean, and every seed",
    "condition_numbers": "Condition numbers of the factors",
    "spectra": "Singular values of A, B and ΔW after the last step",
    "alignment": "Alignment of each method's step with the gradient of full fine-tuning",
    "cost": "Cost against quality",
}


def make_report(rows: Sequence[Row], times: StepTimes, title: str) -> str:
    """Returns the report: the table, the differences with every seed, and the figures. The same rows give the same."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table(rows, times),
        f"<pre>{escape(chr(10).join(legend(rows, times)))}</pre>",
        "<h2>Difference of the final train loss to tuned LoRA</h2>",
        _differences(rows),
    ]
    for name, figure in make_figures(rows, times, title):
        parts.append(figure_html(_CAPTIONS[name], to_svg(figure)))
    return page(title, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """Returns a whole HTML page around its parts."""
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        + "\n".join(parts)
        + f"\n<p><small>sdsopt {__version__}, <code>sdsopt compare</code></small></p>\n</html>\n"
    )


def figure_html(caption: str, svg: bytes) -> str:
    """Returns a heading and an image that is part of the page."""
    data = base64.b64encode(svg).decode()
    name = escape(caption)
    return f'<h2>{name}</h2>\n<img alt="{name}" src="data:image/svg+xml;base64,{data}">'


def _table(rows: Sequence[Row], times: StepTimes) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in ("", *HEADINGS))
    lines = [f"<tr>{head}</tr>"]
    for section in sections(rows, times):
        lines.append(f'<tr class="section"><td colspan="{len(HEADINGS) + 1}">{escape(section.title)}</td></tr>')
        lines += [_line(method, *texts) for method, texts in section.lines]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _differences(rows: Sequence[Row]) -> str:
    lines = ["<tr><th></th><th>mean</th><th>95 % interval</th><th>verdict</th><th>seed by seed</th></tr>"]
    for row in rows:
        if (d := row.difference) is not None:
            verdict = f'<td class="{d.verdict}">{d.verdict}</td>' if " " not in d.verdict else f"<td>{d.verdict}</td>"
            seeds = " ".join(f"{value:+.3f}" for value in d.by_seed)
            name = escape(f"{row.inner}, rank {row.rank}, {row.method}")
            interval = f"[{d.low:+.4f}, {d.high:+.4f}]"
            lines.append(f"<tr><td>{name}</td><td>{d.mean:+.4f}</td><td>{interval}</td>{verdict}<td>{seeds}</td></tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _line(*texts: str) -> str:
    return "<tr>" + "".join(f"<td>{escape(text.strip())}</td>" for text in texts) + "</tr>"
