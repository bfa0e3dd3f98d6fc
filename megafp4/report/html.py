"""One self-contained HTML page: opens from a mail, from a web server, or from a cluster's disk."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megafp4.report.load import Run
from megafp4.report.table import HEADINGS, NUMERIC, Row, row_cells

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} - megafp4</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem;
         margin: 2.5rem auto; padding: 0 1.5rem; }
  h1 { font-size: 1.6rem; margin-bottom: 0; }
  h2 { font-size: 1.15rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
  .note { color: #666; margin-top: .2rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-size: .92em; min-width: 46rem;
          font-variant-numeric: tabular-nums; }
  th { text-align: left; border-bottom: 2px solid #999; }
  th, td { padding: .35em .9em .35em 0; vertical-align: top; }
  td { border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
  .number { text-align: right; }
  .baseline td { font-weight: 600; }
  .second { color: #777; font-weight: 400; }
  td.list, td.list .second { color: inherit; font-weight: 400; }
  img { max-width: 100%; height: auto; }
  summary { cursor: pointer; padding: .3em 0; }
  code { font-size: .92em; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ subtitle }}</p>

<h2>Result</h2>
<div class="scroll"><table>
<tr>{% for name in headings %}<th{% if name in numeric %} class="number"{% endif %}>{{ name }}</th>
{% endfor %}</tr>
{% for row, cells in result %}
<tr{% if row.recipe == "bf16" %} class="baseline"{% endif %}>
{% for lines in cells %}
{% set list = headings[loop.index0] == "GEMMs run" %}
<td class="{% if list %}list{% elif headings[loop.index0] in numeric %}number{% endif %}">
{{- lines[0] }}
{% for line in lines[1:] %}<br><span class="second">{{ line }}</span>{% endfor %}</td>
{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="note">Loss: mean validation loss in nats per token. To BF16: its distance from BF16's;
each run has one seed, and a gap below the spread between seeds says nothing. Bytes/param: weights +
optimizer state, gradients not counted. GEMMs run: what each GEMM of the quantized linears ran in,
and how often (precision ledger); a x b names the formats of the two operands where they differ.
Tokens/s: the speed of the machine that ran this, which may have decoded to FP32 or BF16 and shared
its cores among runs; it says nothing about 4-bit hardware.</p>

{% for title, image in images %}
<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ image }}">
{% endfor %}

{% if has_statistics %}
<p class="note">Statistics of the last step that recorded them. A linear computes y = x W^T; dY is
the gradient of y; dgrad gives the gradient of x, wgrad that of W. Signal to noise: power of the
operand over power of its quantization error. Clipped: beyond the largest code. Underflow: not zero,
but quantized to zero. Scale span: largest over smallest block scale within a line, in powers of
two, 0 where a line has a single scale; 14 is the limit up to which MXFP4 can be folded into FP8
exactly (docs/numerics.md), and values above it are framed. Statistics that are zero for every
operand are a line of text below the plot.</p>
{% endif %}

<h2>Configuration</h2>
{% if common %}
<details><summary>Shared by all runs: {{ common | length }} settings</summary>
<table>{% for key, value in common %}<tr><td><code>{{ key }}</code></td><td>{{ value }}</td></tr>
{% endfor %}</table></details>
{% endif %}
{% for name, settings in own %}
<details><summary>{{ name }}: {{ settings | length }} settings</summary>
<table>{% for key, value in settings %}<tr><td><code>{{ key }}</code></td><td>{{ value }}</td></tr>
{% endfor %}</table></details>
{% endfor %}

<h2>Precision ledger</h2>
{% for name, lines in ledgers %}
<details><summary>{{ name }}: {{ lines | length }} kinds of GEMM</summary>
<table><tr>{% for key in lines[0] %}<th>{{ key }}</th>{% endfor %}</tr>
{% for line in lines %}<tr>{% for value in line.values() %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></details>
{% else %}<p class="note">No run has written its ledger yet.</p>
{% endfor %}

<h2>Versions</h2>
<table>{% for name, line in versions %}<tr><td>{{ name }}</td><td>{{ line }}</td></tr>
{% else %}<tr><td class="note">No run has finished yet.</td></tr>{% endfor %}</table>
</body>
</html>
"""


def render_html(
    title: str, runs: Sequence[Run], rows: Sequence[Row], plots: Mapping[str, Path]
) -> str:
    """Render the page; everything that comes from files is escaped.

    Args:
        title: Heading of the page.
        runs: The runs, in the order of ``rows``.
        rows: :func:`megafp4.report.table.table_rows` of ``runs``.
        plots: Title -> PNG file, embedded in this order.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    common, own = _settings(runs)
    return template.render(
        title=title,
        subtitle=_subtitle(runs),
        headings=HEADINGS,
        numeric=NUMERIC,
        result=[(row, row_cells(row)) for row in rows],
        images=[
            (name, base64.b64encode(path.read_bytes()).decode()) for name, path in plots.items()
        ],
        has_statistics=any(run.stats for run in runs),
        common=common,
        own=own,
        ledgers=[(run.label, lines) for run in runs if (lines := ledger_lines(run))],
        versions=[(run.label, _versions(run)) for run in runs if run.finished],
    )


def ledger_lines(run: Run) -> list[dict[str, Any]]:
    """Return the ledger layer by layer where the run has one, else its totals."""
    if isinstance(run.ledger, list) and all(isinstance(row, dict) for row in run.ledger):
        return run.ledger
    totals = run.summary.get("ledger", {})
    return [
        {"gemm": gemm, "formats": formats, "count": count}
        for gemm, counts in totals.items()
        for formats, count in counts.items()
    ]


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as ``model.hidden``, value."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _settings(
    runs: Sequence[Run],
) -> tuple[list[tuple[str, str]], list[tuple[str, list[tuple[str, str]]]]]:
    """Split the settings into those that all runs share and each run's own."""
    flat = [dict(flatten(run.config)) for run in runs]
    shared = set.intersection(*(set(settings.items()) for settings in flat))
    own = [
        (run.label, [item for item in settings.items() if item not in shared])
        for run, settings in zip(runs, flat, strict=True)
    ]
    common = [item for item in flat[0].items() if item in shared]
    return common, [(name, settings) for name, settings in own if settings]


def _subtitle(runs: Sequence[Run]) -> str:
    model = runs[0].config.get("model", {})
    shape = f"{model.get('family')}, {model.get('layers')} layers, hidden {model.get('hidden')}"
    parameters = runs[0].summary.get("parameters")
    size = f", {parameters:,} parameters" if parameters else ""
    many = f"{len(runs)} runs, " if len(runs) > 1 else ""
    return f"{many}{runs[0].steps:,} steps, {shape}{size}"


def _versions(run: Run) -> str:
    summary = run.summary
    return (
        f"megafp4 {summary.get('megafp4')}, torch {summary.get('torch')}, "
        f"{summary.get('threads')} threads, {summary.get('wall_s') or 0:,.0f} s"
    )
