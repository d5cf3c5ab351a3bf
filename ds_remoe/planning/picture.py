"""The memory of a rank as stacked bars, one bar a stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ds_remoe.analysis.stages_plot import BLUE, DPI, GREEN, GREY, INK, ORANGE, VERMILION
from ds_remoe.planning.advice import stage_name
from ds_remoe.planning.hardware import GIB
from ds_remoe.planning.plan import Plan

_SKY, _PINK, _YELLOW = "#56B4E9", "#CC79A7", "#F0E442"
_COLOURS = (BLUE, _SKY, GREEN, GREY, ORANGE, VERMILION, _PINK, _YELLOW)


def plot_memory(plan: Plan, path: Path) -> Path:
    """Draw each stage's memory by kind against what the accelerator has, and write a PNG."""
    figure = Figure(figsize=(9.0, 1.9 + 0.75 * len(plan.stages)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    columns = [stage.memory.kinds() for stage in plan.stages]
    places = np.arange(len(columns))[::-1]
    left = np.zeros(len(columns))
    for kind, colour in zip(columns[0], _COLOURS, strict=True):
        sizes = np.array([column[kind] / GIB for column in columns])
        if sizes.any():
            axis.barh(places, sizes, left=left, height=0.6, color=colour, label=kind, edgecolor="white", linewidth=0.6)
        left += sizes
    has = plan.cluster.hardware.memory_bytes / GIB
    for place, size in zip(places, left, strict=True):
        axis.text(size, place, f"  {size:.1f} GiB", va="center", fontsize=11, color=INK)
    axis.set_xlim(0, 1.18 * max(has if has < 4 * left.max() else 0, left.max()))
    axis.axvline(has, color=INK, linewidth=1.4, linestyle="--")
    if has <= axis.get_xlim()[1]:
        axis.text(has, 1.02, f"{has:.0f} GiB", transform=axis.get_xaxis_transform(), ha="center", fontsize=10.5)
    axis.set_yticks(places, [stage_name(plan, stage) for stage in plan.stages])
    axis.set_xlabel("GiB on one rank, in backward", fontsize=12)
    axis.tick_params(labelsize=10.5, colors=INK)
    axis.tick_params(axis="y", length=0, labelsize=12)
    axis.spines[["top", "right", "left"]].set_visible(False)
    cluster = plan.cluster
    figure.suptitle(
        f"{plan.run.path.stem} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.hardware.name}",
        x=0.02,
        ha="left",
        fontsize=14,
        fontweight="bold",
        color=INK,
    )
    figure.legend(loc="outside lower left", ncols=3, fontsize=10, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path
