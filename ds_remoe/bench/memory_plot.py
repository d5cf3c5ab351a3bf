"""The curve of activation memory against routing density as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ds_remoe.analysis.stages_plot import BLUE, DPI, GREY, INK, ORANGE, VERMILION
from ds_remoe.bench.memory import BAR, STAGE_ONE_DENSITY, Point, judge
from ds_remoe.bench.memory_peak import MIB
from ds_remoe.bench.memory_rigs import BUDGET, NO_BUDGET, STOCK

_LINES = {BUDGET: (BLUE, "o"), NO_BUDGET: (ORANGE, "s"), STOCK: (GREY, "^")}


def plot_memory(points: Sequence[Point], stage_three: float, path: Path, title: str) -> Path:
    """Draw a panel for each kind and write a PNG.

    Args:
        points: at least one.
        stage_three: density k/E.
        path: the PNG; its folder is made.
        title: stands above the picture.
    """
    kinds = list(dict.fromkeys(point.kind for point in points))
    figure = Figure(figsize=(0.8 + 5.6 * len(kinds), 4.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _draw(axis, [point for point in points if point.kind == kind], stage_three)
        axis.set_title(f"one MoE {kind}" if kind == "layer" else f"the whole {kind}", loc="left", color=INK)
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path


def _draw(axis: Axes, points: Sequence[Point], stage_three: float) -> None:
    for rival in dict.fromkeys(point.rival for point in points):
        colour, marker = _LINES[rival]
        curve = [(point.density, point.peak.activations / MIB) for point in points if point.rival == rival]
        axis.plot(*zip(*curve, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.9, label=rival)
    for verdict in judge(points, stage_three):
        bar = BAR * verdict.stage_three / MIB
        axis.axhline(bar, color=VERMILION, linestyle=(0, (5, 3)), linewidth=1.2, label=f"{BAR} × stage III")
    axis.axvline(stage_three, color=INK, linewidth=0.8, linestyle=":")
    axis.text(stage_three, 0.99, " III", transform=axis.get_xaxis_transform(), va="top", color=INK)
    axis.axvspan(STAGE_ONE_DENSITY, 1.0, color="#E8EEF4", linewidth=0, zorder=0)
    axis.text(STAGE_ONE_DENSITY, 0.99, " I", transform=axis.get_xaxis_transform(), va="top", color=INK)
    axis.set_xlim(0, 1.02)
    axis.set_ylim(0, 1.5 * axis.get_ylim()[1])  # the legend stands above the curves
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel("active (token, expert) pairs", fontsize=12)
    axis.set_ylabel("peak activation memory, MiB", fontsize=12)
    axis.tick_params(labelsize=10.5, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(0.0, 0.95), fontsize=10.5, framealpha=0.7, edgecolor="none")
