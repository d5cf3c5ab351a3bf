"""Pictures of a run: loss, sparsity and λ over the three stages, and the load of every expert."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, ScalarFormatter
from numpy.typing import NDArray

from ds_remoe.analysis.layers import SILENT_EXPERT_LOAD, mean_expert_load
from ds_remoe.analysis.stages import Stages, detect_stages

if TYPE_CHECKING:
    from ds_remoe.training.record import StepRecord

DPI = 150
# Okabe and Ito's palette, which people with any colour vision tell apart.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
INK, GREY = "#222222", "#8A8A8A"
_STAGE_SHADES = ("#E8EEF4", "#FBF0DC", "#E6F3EE")
_STAGE_NAMES = ("I  dense", "II  sparsifying", "III  sparse and stable")
_LOG_AXIS_BELOW = 0.08


def plot_stages(
    records: Sequence[StepRecord],
    target_sparsity: float,
    path: Path,
    *,
    stages: Stages | None = None,
    title: str | None = None,
) -> Path:
    """Draw loss, sparsity and λ above one step axis and write a PNG.

    Panels that do not apply are left out: a dense model has the loss alone, TopK no λ and no stages. The step axis is
    logarithmic if stages I and II take less than 8% of the run, which would hide them on a linear one.

    Args:
        records: every step of a run, in order, at least one.
        target_sparsity: 1 - k/E.
        path: the PNG to write; its folder is made.
        stages: where the stages begin. Default: `detect_stages` with its own settings.
        title: stands above the picture.
    """
    if not records:
        raise ValueError("records: empty; there is nothing to draw")
    has_sparsity = records[-1].sparsity is not None
    has_lambda = records[-1].l1_coefficient is not None
    heights = [1.25] + [1.0] * (has_sparsity + has_lambda)
    figure = _figure(9.0, 0.9 + 2.25 * sum(heights))
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    panels = iter(axes)
    _draw_loss(next(panels), records)
    if has_sparsity:
        _draw_sparsity(next(panels), records, target_sparsity)
    if has_lambda:
        _draw_lambda(next(panels), records)
        found = stages or detect_stages(records, target_sparsity)
        _use_log_steps_if_crowded(axes[-1], records, found)
        _shade_stages(axes, records, found)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_xlim(records[0].step, max(records[-1].step, records[0].step + 1))
    figure.align_ylabels(list(axes))
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize=14, fontweight="bold", color=INK)
    return _save(figure, path)


def plot_expert_load(
    records: Sequence[StepRecord], path: Path, *, last_fraction: float = 0.25, title: str | None = None
) -> Path:
    """Draw the share of the tokens that each expert of each MoE layer saw, mean over the last steps, as a heat map.

    Experts under 1/64 of the tokens (silent) carry a cross. ValueError for a dense model, which has no experts.
    """
    load_LE = mean_expert_load(records, last_fraction)
    layers, experts = load_LE.shape
    if load_LE.size == 0:
        raise ValueError("records: no expert load; a dense model has none to draw")
    figure = _figure(min(16.0, max(6.5, 2.4 + 0.6 * experts)), min(14.0, max(3.4, 1.9 + 0.45 * layers)))
    axis = figure.subplots()
    top = float(load_LE.max())
    image = axis.imshow(load_LE, cmap="cividis", vmin=0, vmax=top if top > 0 else 1, aspect="auto")
    axis.set_xlabel("expert")
    axis.set_ylabel("MoE layer")
    axis.set_xticks(_ticks(experts))
    axis.set_yticks(_ticks(layers))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if load_LE.size <= 256 and experts <= 32:
        for (layer, expert), load in np.ndenumerate(load_LE):
            if load < SILENT_EXPERT_LOAD:
                continue
            colour = INK if load > 0.55 * top else "white"
            axis.text(expert, layer, f"{load:.0%}", ha="center", va="center", color=colour, fontsize=9.5)
    silent = np.argwhere(load_LE < SILENT_EXPERT_LOAD)
    if len(silent):
        cell_points = 72 * min(0.8 * figure.get_figwidth() / experts, 0.6 * figure.get_figheight() / layers)
        size = min(16.0, 0.6 * cell_points) ** 2
        axis.scatter(silent[:, 1], silent[:, 0], marker="x", s=size, color=ORANGE, linewidths=1.6)
    bar = figure.colorbar(image, ax=axis, pad=0.02, format=PercentFormatter(1.0, decimals=0))
    bar.outline.set_visible(False)
    bar.set_label("share of tokens")
    crosses = f"; {len(silent)} below 1/64 of the tokens, crossed" if len(silent) else ""
    mean = load_LE.sum(axis=1).mean()
    heading = title or "Tokens that each expert sees"
    axis.set_title(
        f"{heading}\nsteps from {_first_step(records, last_fraction):,} on; "
        f"{mean:.2f} of {experts} active a token{crosses}",
        loc="left",
        fontsize=12,
        color=INK,
    )
    return _save(figure, path)


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """[n] centred mean over `window` (odd) values, non-finite ones left out.

    Towards both ends the window shrinks and stays centred, so that a steep beginning is not flattened.
    """
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    reach = np.minimum(window // 2, np.minimum(at, len(values) - 1 - at))
    low, high = at - reach, at + reach + 1
    inside = count[high] - count[low]
    return np.asarray((total[high] - total[low]) / np.where(inside > 0, inside, np.nan))


def _draw_loss(axis: Axes, records: Sequence[StepRecord]) -> None:
    steps, loss = _series(records, [record.lm_loss for record in records])
    window = 2 * (len(loss) // 100) + 1
    smoothed = smooth(loss, window)
    if window > 1:
        axis.plot(steps, loss, color=BLUE, alpha=0.25, linewidth=0.8)
    label = "train" if window == 1 else f"train, mean of {window} steps"
    axis.plot(steps, smoothed, color=BLUE, linewidth=1.8, label=label)
    evaluated = [(record.step, record.valid_loss) for record in records if record.valid_loss is not None]
    if evaluated:
        valid_steps, valid = zip(*evaluated, strict=True)
        axis.plot(
            valid_steps,
            valid,
            color=VERMILION,
            linestyle="none",
            marker="o",
            markersize=6.5,
            markeredgecolor="white",
            label="valid",
            zorder=5,
            clip_on=False,
        )
    finite = smoothed[np.isfinite(smoothed)]
    shown = np.concatenate([finite, [value for _, value in evaluated if np.isfinite(value)]])
    if len(shown):
        margin = 0.06 * float(np.ptp(shown)) or 0.1
        axis.set_ylim(shown.min() - margin, shown.max() + margin)
    axis.set_ylabel("loss (nats / token)")
    axis.legend(loc="upper right")


def _draw_sparsity(axis: Axes, records: Sequence[StepRecord], target: float) -> None:
    layers = _series_table([record.layer_sparsity for record in records])
    steps, sparsity = _series(records, [record.sparsity for record in records])
    for index in range(layers.shape[1]):
        label = "each layer" if index == 0 else None
        axis.plot(steps, layers[:, index], color=GREY, alpha=0.55, linewidth=0.7, label=label)
    axis.plot(steps, sparsity, color=GREEN, linewidth=1.9, label="all layers")
    axis.axhline(target, color=INK, linestyle=(0, (5, 3)), linewidth=1.1, label=f"target {target:.4g}")
    shown = np.concatenate([layers[np.isfinite(layers)], sparsity[np.isfinite(sparsity)], [target]])
    axis.set_ylim(max(0.0, shown.min() - 0.05), min(1.0, shown.max() + 0.05) + 0.005)
    axis.set_ylabel("sparsity S")
    axis.legend(loc="lower right", ncols=3)


def _draw_lambda(axis: Axes, records: Sequence[StepRecord]) -> None:
    steps, coefficient = _series(records, [record.l1_coefficient for record in records])
    _, l1_loss = _series(records, [record.l1_loss for record in records])
    axis.plot(steps, coefficient, color=VERMILION, linewidth=1.9, label="λ")
    axis.plot(steps, coefficient * l1_loss, color=BLUE, linewidth=1.4, linestyle="-.", label="λ·L_reg")
    axis.set_yscale("log")
    axis.set_ylabel("λ,  λ·L_reg")
    axis.legend(loc="lower right", ncols=2)


def _shade_stages(axes: NDArray[np.object_], records: Sequence[StepRecord], stages: Stages) -> None:
    first, last = records[0].step, records[-1].step
    second = stages.sparsifying_from if stages.sparsifying_from is not None else last
    third = stages.settled_at if stages.settled_at is not None else last
    for (begin, end), shade, name in zip(
        [(first, second), (second, third), (third, last)], _STAGE_SHADES, _STAGE_NAMES, strict=True
    ):
        if end <= begin:
            continue
        for axis in axes:
            axis.axvspan(begin, end, color=shade, linewidth=0, zorder=0)
        _label_stage(axes[0], begin, end, name)
    for boundary in {second, third} - {first, last}:
        for axis in axes:
            axis.axvline(boundary, color="white", linewidth=1.6, zorder=0.5)


def _label_stage(axis: Axes, begin: int, end: int, name: str) -> None:
    """Write the stage's name above its region; only its numeral where the region is too narrow for more."""
    low, high = axis.get_xlim()
    if axis.get_xscale() == "log":
        left, right, low, high = (float(np.log(max(value, 1e-9))) for value in (begin, end, low, high))
    else:
        left, right = float(begin), float(end)
    centre, width = ((left + right) / 2 - low) / (high - low), (right - left) / (high - low)
    fits = width > 0.0115 * len(name)
    text = name if fits else name.split()[0]
    axis.text(centre, 1.02, text, transform=axis.transAxes, ha="center", va="bottom", fontsize=11, color=INK)


def _use_log_steps_if_crowded(axis: Axes, records: Sequence[StepRecord], stages: Stages) -> None:
    first, last = records[0].step, records[-1].step
    if (
        stages.settled_at is not None
        and first > 0
        and (stages.settled_at - first) / (last - first + 1) < (_LOG_AXIS_BELOW)
    ):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_xlim(first, max(last, first + 1))


def _series(
    records: Sequence[StepRecord], values: Sequence[float | None]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    steps = np.array([record.step for record in records], dtype=np.int64)
    return steps, np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _series_table(rows: Sequence[tuple[float, ...]]) -> NDArray[np.float64]:
    width = max(len(row) for row in rows)
    return np.array([row if len(row) == width else (np.nan,) * width for row in rows], dtype=np.float64)


def _ticks(count: int) -> list[int]:
    stride = max(1, -(-count // 32))
    return list(range(0, count, stride))


def _first_step(records: Sequence[StepRecord], last_fraction: float) -> int:
    return records[len(records) - int(np.ceil(len(records) * last_fraction))].step


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    for axis in figure.axes:
        for item in [axis.xaxis.label, axis.yaxis.label]:
            item.set_fontsize(12)
        axis.tick_params(labelsize=10.5, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
        legend = axis.get_legend()
        if legend is not None:
            legend.get_frame().set(facecolor="white", alpha=0.7, linewidth=0)
            for text in legend.get_texts():
                text.set_fontsize(10.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path
