"""The layer benchmark's tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.table import Table

from ds_remoe.bench.layer import COPY, COPY_BYTES, FLOOR, FLOOR_GEMM, GEMM, Measured, Passes, Settings
from ds_remoe.bench.layer_bars import Outcome
from ds_remoe.bench.rivals_ours import OURS
from ds_remoe.bench.rivals_torch import DENSE
from ds_remoe.bench.timing import Timing, ratio

WHAT = "time of one MoE layer, forward and forward+backward, against rivals with the same weights and the same routing"
YARDSTICKS = {"ours": OURS, "dense": DENSE, "floor": FLOOR, "floor_gemm": FLOOR_GEMM}


def table(measured: Measured) -> Table:
    """One workload's timings for a terminal."""
    w, both = measured.workload, measured.forward_backward
    title = (
        f"{w.title}: T={w.tokens} D={w.hidden_size} H={w.expert_width} E={w.num_experts}, {w.mean_active:.2f} experts "
        f"a token, largest {max(w.counts) / w.tokens:.0%}"
    )
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("", no_wrap=True)
    for name in ("fwd ms", "fwd+bwd ms", "quartiles", "TFLOP/s", "× ours", "× dense", "× floor"):
        result.add_column(name, justify="right", no_wrap=True)
    for name, timing in both.timings.items():
        low, high = (1e3 * seconds for seconds in timing.quartiles)
        result.add_row(
            name,
            f"{1e3 * measured.forward.timings[name].median:.1f}",
            f"{1e3 * timing.median:.1f}",
            f"{low:.1f}–{high:.1f}",
            f"{both.tflops(name):.3f}" if name in both.flops else "",
            *(_ratio_cell(both, name, yardstick) for yardstick in (OURS, DENSE, FLOOR)),
        )
    return result


def remarks(measured: Measured) -> list[str]:
    """Who was not timed, and why."""
    left_out = [f"{name}: left out, {reason}" for name, reason in measured.left_out.items()]
    return left_out + [f"{name}: failed, {reason}" for name, reason in measured.failed.items()]


def bars_table(outcomes: Sequence[Outcome]) -> Table:
    """The bars for a terminal."""
    result = Table(title="bars, forward and backward", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("workload", "ratio", "bar", "measured", "at the floor", ""):
        result.add_column(name, justify="right" if name in ("bar", "measured", "at the floor") else "left")
    for outcome in outcomes:
        bar = outcome.bar
        verdict = "[green]reached[/green]" if outcome.reached else "[red]not reached[/red]"
        result.add_row(
            outcome.title,
            f"{bar.numerator} / {bar.denominator}",
            f"{bar.direction} {bar.bound:g}",
            f"{outcome.value:.3f}",
            "-" if outcome.limit is None else f"{outcome.limit:.3f}",
            verdict if outcome.as_specified else f"{verdict}, not the bar's sizes or machine",
        )
    return result


def figures(measured: Sequence[Measured], outcomes: Sequence[Outcome], settings: Settings) -> dict[str, Any]:
    """Everything for a results file; times in milliseconds, ratios the medians over the rounds."""
    return {
        "settings": {
            "device": settings.device.type,
            "dtype": str(settings.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "repeats": settings.repeats,
            "warmup": settings.warmup,
            "seed": settings.seed,
        },
        "workloads": [_workload_figures(one) for one in measured],
        "bars": [
            {
                **asdict(outcome.bar),
                "measured_on": outcome.title,
                "value": outcome.value,
                "reached": outcome.reached,
                "as_specified": outcome.as_specified,
                "limit_at_the_floor": outcome.limit,
            }
            for outcome in outcomes
        ],
    }


def _workload_figures(measured: Measured) -> dict[str, Any]:
    w = measured.workload
    return {
        "name": w.title,
        "tokens": w.tokens,
        "hidden_size": w.hidden_size,
        "expert_width": w.expert_width,
        "num_experts": w.num_experts,
        "pairs": w.pairs,
        "mean_active_experts": w.mean_active,
        "largest_expert_tokens": max(w.counts),
        "experts_without_tokens": w.counts.count(0),
        "forward": _passes_figures(measured.forward),
        "forward_backward": _passes_figures(measured.forward_backward),
        "largest_difference_from_ours": measured.differences,
        "left_out": measured.left_out,
        "failed": measured.failed,
    }


def _passes_figures(passes: Passes) -> dict[str, Any]:
    rows = {name: _timing_figures(passes, name, timing) for name, timing in passes.timings.items()}
    rows[COPY]["gb_per_s"] = 2 * COPY_BYTES / passes.timings[COPY].median / 1e9
    return {"least_weight_bytes": passes.weight_bytes, "rivals": rows}


def _timing_figures(passes: Passes, name: str, timing: Timing) -> dict[str, Any]:
    row: dict[str, Any] = dict(timing.as_figures())
    if name in passes.flops:
        row |= {"flops": passes.flops[name], "tflops": passes.tflops(name)}
    if name not in (GEMM, COPY):
        known = {key: other for key, other in YARDSTICKS.items() if other in passes.timings}
        row |= {f"over_{key}": ratio(timing, passes.timings[other]) for key, other in known.items()}
    return row


def _ratio_cell(passes: Passes, name: str, yardstick: str) -> str:
    if yardstick not in passes.timings or name in (GEMM, COPY):
        return ""
    return f"{ratio(passes.timings[name], passes.timings[yardstick]):.2f}"
