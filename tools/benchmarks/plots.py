"""Pictures of results: bars of one column, and the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ceilings import COPY, PRODUCTS

_COLOURS = ("#4878a8", "#c8553d", "#588157", "#8a5a9e", "#b8860b", "#5b6b73")
_MARKERS = "os^Dv<>P"


def draw_bars(path: Path, title: str, label: str, bars: Mapping[str, float]) -> None:
    """Draw one horizontal bar a row.

    Args:
        path: PNG to write.
        title: Heading.
        label: What the bars measure.
        bars: Length by name, from top to bottom.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(range(len(bars)), list(bars.values()), color=_COLOURS[0])
    axes.bar_label(drawn, [_number(value) for value in bars.values()], padding=3)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title)
    axes.margins(x=0.15)
    figure.savefig(path, dpi=110)


def draw_roofline(path: Path, title: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Draw achieved arithmetic over arithmetic intensity, below the measured ceilings.

    Args:
        path: PNG to write.
        title: Heading.
        results: What ``results.json`` holds, of one or several commands on one kind of GPU. Rows
            with a ``roofline`` become points; those with the same ``family`` share a colour.

    Raises:
        ValueError: No row has a ``roofline``, the results are from different GPUs, or none of them
            holds the ceiling of copying.
    """
    points = [row["roofline"] for found in results for row in found["rows"] if "roofline" in row]
    gpus = {found["environment"].get("gpu", "no GPU") for found in results}
    ceilings: dict[str, float] = {}
    for found in results:
        for name, value in found["ceilings"].items():
            ceilings[name] = max(value, ceilings.get(name, 0.0))
    if not points:
        raise ValueError("no row has a point of the roofline: give results of quantize or gemm")
    if len(gpus) > 1:
        raise ValueError(f"the results are from {sorted(gpus)}: give results of one kind of GPU")
    if COPY not in ceilings:
        raise ValueError(f"the results hold no ceiling {COPY!r}: measure them again")
    _draw(path, title, points, ceilings)


def _draw(
    path: Path, title: str, points: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float]
) -> None:
    from matplotlib.figure import Figure

    intensities = [point["flops"] / point["bytes"] for point in points]
    low, high = min(intensities) / 2, max(intensities) * 2
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    slope = ceilings[COPY]
    flat = {name: ceilings[name] for name in PRODUCTS.values() if name in ceilings}
    reached = {name: peak for name, peak in flat.items() if peak / slope < high}
    ridge = max(reached.values(), default=high * slope) / slope
    axes.plot(
        (low, ridge), (low * slope, ridge * slope), color="black", label=f"copy {slope:.2f} TB/s"
    )
    for (name, peak), style in zip(reached.items(), ("--", "-.", ":"), strict=False):
        label = f"{name.split()[0]} {peak:,.0f} TFLOP/s"
        axes.plot((peak / slope, high), (peak, peak), color="black", linestyle=style, label=label)
    families = list(dict.fromkeys(point["family"] for point in points))
    for index, family in enumerate(families):
        mine = [point for point in points if point["family"] == family]
        axes.scatter(
            [point["flops"] / point["bytes"] for point in mine],
            [point["flops"] / point["ms"] / 1e9 for point in mine],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            s=22,
            label=family,
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(title)
    axes.grid(which="both", linewidth=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
