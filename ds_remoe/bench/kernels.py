"""The kernel benchmark: every implementation of a kernel checked against its torch twin, then timed beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ds_remoe.bench.kernel_subjects import KERNELS, TWIN, Settings, Subject
from ds_remoe.bench.timing import Timing, interleave, ratio
from ds_remoe.bench.workloads import Workload

WHAT = "time of each kernel's implementations against its plain-torch twin, on the same tensors in the same rounds"
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference from the twin, relative to the largest entry of the same tensor."""


@dataclass(frozen=True)
class Measured:
    """One kernel on one workload.

    Attributes:
        kernel: its name in `KERNELS`.
        timings: implementations, the twin among them.
        differences: the largest relative difference from the twin of each other one.
        left_out: implementations that do not run here → why.
        failed: implementations that computed something else; they are not timed.
    """

    kernel: str
    workload: Workload
    subject: Subject
    timings: dict[str, Timing]
    differences: dict[str, float]
    left_out: dict[str, str]
    failed: dict[str, str]


def measure(
    kernel: str, workload: Workload, settings: Settings, after_round: Callable[[], object] | None = None
) -> Measured:
    """Check and time all implementations of one kernel.

    Args:
        kernel: a name in `KERNELS`.
        workload: sizes and routing.
        settings: how to measure.
        after_round: called after each of the warmup + repeats rounds: progress.
    """
    subject = KERNELS[kernel](workload, settings)
    expected = subject.implementations[TWIN]()
    differences: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, work in subject.implementations.items():
        if name != TWIN:
            differences[name] = max(_difference(*pair) for pair in zip(work(), expected, strict=True))
            if not differences[name] <= TOLERANCES[settings.dtype]:
                failed[name] = f"differs from the twin by {differences[name]:.1e}"
    del expected
    runners = {name: work for name, work in subject.implementations.items() if name not in failed}
    timings = interleave(runners, settings.repeats, settings.device, settings.warmup, after_round)
    return Measured(kernel, workload, subject, timings, differences, subject.left_out, failed)


def table(measured: Sequence[Measured]) -> Table:
    """Timings of one workload's kernels for a terminal; the last column is how many times faster than the twin."""
    w = measured[0].workload
    title = (
        f"{w.title}: T={w.tokens} D={w.hidden_size} H={w.expert_width} E={w.num_experts}, {w.mean_active:.2f} experts "
        f"a token"
    )
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("kernel", "", "ms", "quartiles", "rate", "× torch"):
        result.add_column(name, justify="left" if name in ("kernel", "") else "right", no_wrap=True)
    for one in measured:
        for name, timing in one.timings.items():
            low, high = (1e3 * seconds for seconds in timing.quartiles)
            result.add_row(
                one.kernel,
                name,
                f"{1e3 * timing.median:.4g}",
                f"{low:.4g}–{high:.4g}",
                _rate(one.subject, timing),
                "" if name == TWIN else f"{ratio(one.timings[TWIN], timing):.2f}",
            )
    return result


def remarks(measured: Sequence[Measured]) -> list[str]:
    """Which implementations were not timed, and why."""
    lines = [f"{one.kernel}, {name}: left out, {why}" for one in measured for name, why in one.left_out.items()]
    return lines + [f"{one.kernel}, {name}: failed, {why}" for one in measured for name, why in one.failed.items()]


def figures(measured: Sequence[Measured], settings: Settings) -> dict[str, Any]:
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
        "kernels": [_figures_of_one(one) for one in measured],
    }


def _figures_of_one(one: Measured) -> dict[str, Any]:
    w, rows = one.workload, {}
    for name, timing in one.timings.items():
        rows[name] = {**timing.as_figures(), "times_faster_than_torch": ratio(one.timings[TWIN], timing)}
        if one.subject.flops:
            rows[name]["tflops"] = one.subject.flops / timing.median / 1e12
        if one.subject.moved_bytes:
            rows[name]["gb_per_s"] = one.subject.moved_bytes / timing.median / 1e9
    return {
        "kernel": one.kernel,
        "workload": w.title,
        "tokens": w.tokens,
        "hidden_size": w.hidden_size,
        "expert_width": w.expert_width,
        "num_experts": w.num_experts,
        "pairs": w.pairs,
        "implementations": rows,
        "largest_difference_from_torch": one.differences,
        "left_out": one.left_out,
        "failed": one.failed,
    }


def _rate(subject: Subject, timing: Timing) -> str:
    if subject.flops:
        return f"{subject.flops / timing.median / 1e12:.4g} TFLOP/s"
    return f"{subject.moved_bytes / timing.median / 1e9:.4g} GB/s"


def _difference(got: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().double().clamp_min(1e-30)
    return float((got.double() - expected.double()).abs().max() / scale)
