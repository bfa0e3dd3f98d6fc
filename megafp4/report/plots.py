"""The plots of a report, as PNG files.

Colours are Okabe and Ito's, distinguishable with any colour vision; marker shapes repeat the
distinction. A recipe has one colour in all plots of a report, and BF16 is always the dark grey.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megafp4.report.load import Run, baseline_of, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE_COLOUR = "#333333"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BASELINE_MARKER = "o"
MARKERS = "sD^vPX*"
STYLE = {
    "figure.dpi": 150,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 10.5,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
}

# Metric rows averaged: single batches differ more than recipes do. A wider window would bend the
# steep beginning of a loss; gaps have none.
LOSS_WINDOW = 5
GAP_WINDOW = 9

Style = dict[str, tuple[str, str]]


def write_plots(runs: Sequence[Run], folder: Path) -> dict[str, Path]:
    """Draw every plot that ``runs`` have data for.

    Args:
        runs: The runs of one report.
        folder: Where the PNG files go; made if needed.

    Returns:
        Title -> file, in the order in which a reader wants them.
    """
    with _style():
        folder.mkdir(parents=True, exist_ok=True)
        styles = run_styles(runs)
        plots: dict[str, Path] = {}
        if any(run.train or run.evals for run in runs):
            plots["Loss"] = _save(loss_figure(runs, styles), folder / "loss.png")
        gaps = [run for run in runs if not run.is_baseline and (run.train or run.evals)]
        if baseline_of(list(runs)) and gaps:
            plots["Gap to BF16"] = _save(gap_figure(runs, styles), folder / "gap.png")
        for run in runs:
            if run.stats:
                path = folder / f"statistics-{run.folder.name}.png"
                plots[f"Quantization statistics: {run.label}"] = _save(statistics_figure(run), path)
    return plots


def run_styles(runs: Sequence[Run]) -> Style:
    """Give each run, by the name of its folder, a colour and a marker."""
    styles = {
        run.folder.name: (BASELINE_COLOUR, BASELINE_MARKER) for run in runs if run.is_baseline
    }
    others = [run.folder.name for run in runs if not run.is_baseline]
    for index, name in enumerate(others):
        # Six colours and seven shapes share no factor: 42 runs look different.
        styles[name] = (COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
    return styles


def loss_figure(runs: Sequence[Run], styles: Style) -> Figure:
    """Draw the whole run, and the validation loss of its last half large enough to compare."""
    figure = _figure(10, 4.2)
    whole, late = figure.subplots(1, 2, width_ratios=(1, 1.25))
    end = max(run.last_step for run in runs)
    for axes, start in ((whole, 0), (late, end / 2)):
        seen: list[float] = []
        for run in _by_loss(runs):
            colour, marker = styles[run.folder.name]
            steps, losses = _series(run.train, start)
            # Batches differ more than recipes: enlarged, the training loss would only hide them.
            if not start or not run.evals:
                smooth = rolling_mean(losses, LOSS_WINDOW)
                axes.plot(steps, smooth, color=colour, alpha=0.4, linewidth=0.9)
            eval_steps, eval_losses = _series(run.evals, start)
            label = f"{run.label}  {run.valid_loss:.3f}"
            axes.plot(
                eval_steps, eval_losses, color=colour, marker=marker, markersize=4, label=label
            )
            seen += eval_losses or losses
        axes.set_xlabel("Step")
        if start:
            _limit(axes, seen)
    whole.set_ylabel("Loss (nats per token)")
    whole.set_title(f"Validation (marked) and training,\nmean of {LOSS_WINDOW} points (light)")
    late.set_title("Second half, validation")
    late.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="Validation loss")
    return figure


def gap_figure(runs: Sequence[Run], styles: Style) -> Figure:
    """Draw each run's loss against the baseline's at the same step, in percent."""
    figure = _figure(10, 4.2)
    axes = figure.subplots()
    base = baseline_of(list(runs))
    assert base is not None
    axes.axhline(0, color=BASELINE_COLOUR, linewidth=1.2)
    seen: list[float] = []
    for run in _by_loss(runs):
        if run.is_baseline:
            continue
        colour, marker = styles[run.folder.name]
        steps, gaps = gap_percent(run.train, base.train)
        axes.plot(steps, rolling_mean(gaps, GAP_WINDOW), color=colour, alpha=0.3, linewidth=0.9)
        steps, gaps = gap_percent(run.evals, base.evals)
        label = f"{run.label}  {gaps[-1]:+.2f} %" if gaps else run.label
        axes.plot(steps, gaps, color=colour, marker=marker, markersize=4, label=label)
        # The first steps are steep and alike: they would flatten everything that follows.
        seen += [gap for step, gap in zip(steps, gaps, strict=True) if step > base.last_step / 10]
    _limit(axes, [*seen, 0.0])
    axes.set_xlabel("Step")
    axes.set_ylabel("Loss above BF16 (%)")
    axes.set_title(f"Validation (marked) and training, mean of {GAP_WINDOW} points (light)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="At the last evaluation")
    return figure


def gap_percent(
    rows: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]
) -> tuple[list[int], list[float]]:
    """Return (steps, 100 (loss - baseline) / baseline) over the steps that both have."""
    losses = {row["step"]: number(row["loss"]) for row in baseline}
    common = [row for row in rows if row["step"] in losses]
    gaps = [100 * (number(row["loss"]) / losses[row["step"]] - 1) for row in common]
    return [row["step"] for row in common], gaps


def rolling_mean(values: Sequence[float], width: int) -> list[float]:
    """Average each value with its neighbours in a centred window, shorter at the ends."""
    half = width // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


EXACT_SPAN = 14
"""Octaves of MXFP4 scales up to which folding them into E4M3 is exact, see docs/numerics.md."""
MARK_COLOUR = "#D55E00"

PANELS = (
    # key, title, colour map (orange: less is better), format of a cell, scale of a cell
    ("snr_db", "Signal to noise (dB)", "Blues", "{:.1f}", 1),
    ("clip_rate", "Clipped (%)", "Oranges", "{:.2g}", 100),
    ("underflow_rate", "Underflow to zero (%)", "Oranges", "{:.1f}", 100),
    ("octave_span", "Scale span (octaves)", "Blues", "{:.0f}", 1),
)
LEAST_RANGE = {"snr_db": 6.0, "clip_rate": 1.0, "underflow_rate": 30.0, "octave_span": EXACT_SPAN}
"""Differences below this are of no interest and must not fill the colour scale."""
MAX_WRITTEN_LAYERS = 40
"""Up to here a cell has room for its number."""

OPERAND_NAMES = {
    ("fprop", "a"): "x", ("fprop", "b"): "W",
    ("dgrad", "a"): "dY", ("dgrad", "b"): "W",
    ("wgrad", "a"): "dY", ("wgrad", "b"): "x",
}  # fmt: skip
"""What the operands of y = x W^T and of its two gradients are."""


def statistics_figure(run: Run) -> Figure:
    """Draw the last recorded quantization statistics: layers down, operands across.

    A panel without anything but zeros becomes a line of text below the others.
    """
    step, layers, operands, cells = statistics_grid(run)
    tables = {
        key: [
            [scale * number(cells.get((layer, op), {}).get(key)) for op in operands]
            for layer in layers
        ]
        for key, _, _, _, scale in PANELS
    }
    # The first panel always stays: it names the layers.
    panels = [panel for panel in PANELS if panel is PANELS[0] or _has_content(tables[panel[0]])]
    figure = _figure(max(7.0, 2.6 + 2.0 * len(panels)), 1.8 + 0.22 * min(len(layers), 60))
    row_of_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (key, title, colours, text, _) in zip(row_of_axes, panels, strict=True):
        values = tables[key]
        image = axes.imshow(values, aspect="auto", cmap=colours, interpolation="nearest")
        _set_colours(image, values, from_zero=colours == "Oranges", least=LEAST_RANGE[key])
        axes.set_title(title)
        axes.set_xticks(range(len(operands)), operands, rotation=45, ha="right")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if key == "octave_span":
            _mark_inexact(axes, layers, operands, cells)
        if len(layers) <= MAX_WRITTEN_LAYERS:
            _write_cells(axes, image, values, text)
        else:
            figure.colorbar(image, ax=axes, orientation="horizontal", aspect=25, pad=0.02)
    # A deep model has more layers than lines of text: label every n-th.
    shown = range(0, len(layers), -(-len(layers) // 60))
    row_of_axes[0].set_yticks(list(shown), [layers[i] for i in shown])
    figure.suptitle(f"{run.label}, step {step}", x=0.01, ha="left", fontweight="bold")
    left_out = [_one_line(panel[1], tables[panel[0]]) for panel in PANELS if panel not in panels]
    if left_out:
        figure.supxlabel(". ".join(left_out), x=0.01, ha="left", fontsize=8.5)
    return figure


def _has_content(values: list[list[float]]) -> bool:
    return any(math.isfinite(value) and value != 0 for line in values for value in line)


def _one_line(title: str, values: list[list[float]]) -> str:
    measured = any(math.isfinite(value) for line in values for value in line)
    return f"{title}: {'0 everywhere' if measured else 'not recorded'}"


def _mark_inexact(
    axes: Axes,
    layers: list[str],
    operands: list[str],
    cells: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """Frame the MXFP4 operands whose scales span too much to be folded into FP8 exactly."""
    from matplotlib.patches import Rectangle

    if not any(row.get("format") == "mxfp4" for row in cells.values()):
        return  # other scales are no powers of two: the limit says nothing about them
    for y, layer in enumerate(layers):
        for x, operand in enumerate(operands):
            row = cells.get((layer, operand), {})
            if row.get("format") == "mxfp4" and number(row.get("octave_span")) > EXACT_SPAN:
                corner = (x - 0.5, y - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=MARK_COLOUR))
    note = f"framed: above {EXACT_SPAN}, the limit\nfor exact FP8 folding\n(docs/numerics.md)"
    axes.set_xlabel(note, fontsize=8)


def statistics_grid(
    run: Run,
) -> tuple[int, list[str], list[str], dict[tuple[str, str], dict[str, Any]]]:
    """Arrange the last step's statistics as (step, layers, operands, (layer, operand) -> row)."""
    step = max(row["step"] for row in run.stats)
    rows = [row for row in run.stats if row["step"] == step]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    # Rows are in order of use: if only gradients are quantized, backward walks the layers.
    if all(row["gemm"] != "fprop" for row in rows):
        layers.reverse()
    gemms = {"fprop": 0, "dgrad": 1, "wgrad": 2}
    order = sorted({(gemms.get(row["gemm"], 3), row["gemm"], row["operand"]) for row in rows})
    cells = {(row["layer"], _operand(row["gemm"], row["operand"])): row for row in rows}
    return step, layers, [_operand(gemm, operand) for _, gemm, operand in order], cells


def _operand(gemm: str, operand: str) -> str:
    return f"{gemm} {OPERAND_NAMES.get((gemm, operand), operand)}"


def _set_colours(image: Any, values: list[list[float]], *, from_zero: bool, least: float) -> None:
    finite = [value for line in values for value in line if math.isfinite(value)] or [0.0]
    low, high = 0.0 if from_zero else min(finite), max(finite)
    missing = max(0.0, least - (high - low))
    image.set_clim(low - (0 if from_zero else missing / 2), high + missing / (1 + (not from_zero)))


def _write_cells(axes: Axes, image: Any, values: list[list[float]], text: str) -> None:
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                axes.text(
                    x, y, text.format(value), ha="center", va="center", fontsize=6.5,
                    color="white" if dark else "black",
                )  # fmt: skip


def _by_loss(runs: Sequence[Run]) -> list[Run]:
    # Legends read from best to worst; a diverged run (NaN) comes last.
    return sorted(runs, key=lambda run: (math.isnan(run.valid_loss), run.valid_loss))


def _series(rows: Sequence[dict[str, Any]], start: float) -> tuple[list[int], list[float]]:
    late = [row for row in rows if row["step"] >= start]
    return [row["step"] for row in late], [number(row["loss"]) for row in late]


def _limit(axes: Axes, values: list[float]) -> None:
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        margin = 0.08 * (max(finite) - min(finite)) or 0.05
        axes.set_ylim(min(finite) - margin, max(finite) + margin)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it keeps figures in a global list and may want a window system.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
