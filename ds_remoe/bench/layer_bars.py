"""The bars that the layer is measured against: how far it may stay behind, and by how much it must be ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ds_remoe.bench.layer import FLOOR, FLOOR_GEMM, Measured, Settings
from ds_remoe.bench.rivals_deepspeed import STOCK_RELU
from ds_remoe.bench.rivals_ours import OURS
from ds_remoe.bench.rivals_ours import RIVALS as OUR_OWN
from ds_remoe.bench.rivals_torch import DENSE
from ds_remoe.bench.timing import Timing, ratio

FLOORS = (FLOOR, FLOOR_GEMM)
FASTEST = "the fastest rival"
"""Of those that compute the layer, in the median."""


@dataclass(frozen=True)
class Bar:
    """A bound on the time of forward and backward of one over that of another.

    Attributes:
        workload: its name.
        device: "cpu": fp32 on 2 threads with T=4096, D=512, H=1024; "cuda": bf16 on an H200 at a width of the paper.
        numerator, denominator: rivals or floors.
        direction, bound: what the ratio must be.
    """

    workload: str
    device: Literal["cpu", "cuda"]
    numerator: str
    denominator: str
    direction: Literal["at most", "at least"]
    bound: float


BARS = (
    Bar("e8", "cpu", OURS, DENSE, "at most", 1.10),
    Bar("g8", "cpu", OURS, DENSE, "at most", 1.40),
    Bar("stage3", "cpu", STOCK_RELU, OURS, "at least", 1.15),
    Bar("g8", "cpu", STOCK_RELU, OURS, "at least", 2.0),
    Bar("skew", "cpu", STOCK_RELU, OURS, "at least", 2.5),
    Bar("stage1", "cpu", STOCK_RELU, OURS, "at least", 1.4),
    Bar("e128", "cpu", OURS, FLOOR, "at most", 1.3),
    Bar("e128", "cpu", OURS, FLOOR_GEMM, "at most", 1.3),
    Bar("e8", "cuda", DENSE, OURS, "at least", 0.75),
    Bar("e8", "cuda", FASTEST, OURS, "at least", 1.0),
)
DEFAULT_WORKLOADS = ("e8", "g8", "stage3", "skew", "stage1", "e128")
"""Those of the bars."""


@dataclass(frozen=True)
class Outcome:
    """One bar on one measured workload.

    Attributes:
        bar: the bar.
        title: the workload with its widths.
        value: the measured ratio.
        as_specified: False where the sizes or the machine are not those that the bar is meant for.
        limit: the ratio of a layer that takes no longer than its lower floor; None for a bar that bounds our time by
            another's from above.
    """

    bar: Bar
    title: str
    value: float
    as_specified: bool
    limit: float | None

    @property
    def reached(self) -> bool:
        return self.value <= self.bar.bound if self.bar.direction == "at most" else self.value >= self.bar.bound


def outcomes(measured: Sequence[Measured], settings: Settings) -> list[Outcome]:
    """The bars of this device whose workload and rivals were measured."""
    return [outcome for one in measured for outcome in _outcomes(one, settings)]


def _outcomes(measured: Measured, settings: Settings) -> Iterator[Outcome]:
    workload, timings = measured.workload, dict(measured.forward_backward.timings)
    timings.update(_fastest(measured))
    for bar in BARS:
        known = bar.numerator in timings and bar.denominator in timings
        if bar.workload == workload.name and bar.device == settings.device.type and known:
            value = ratio(timings[bar.numerator], timings[bar.denominator])
            limit: float | None = None
            if bar.denominator == OURS:
                limit = max(ratio(timings[bar.numerator], timings[floor]) for floor in FLOORS if floor in timings)
            yield Outcome(bar, workload.title, value, _as_specified(bar, measured, settings), limit)


def _fastest(measured: Measured) -> dict[str, Timing]:
    timings = measured.forward_backward.timings
    names = measured.differences.keys() - OUR_OWN.keys()
    return {FASTEST: min((timings[name] for name in names), key=lambda timing: timing.median)} if names else {}


def _as_specified(bar: Bar, measured: Measured, settings: Settings) -> bool:
    workload = measured.workload
    if bar.device == "cuda":
        name = torch.cuda.get_device_name(settings.device)
        return bool(workload.label) and settings.dtype == torch.bfloat16 and "H200" in name
    width = workload.expert_width * (workload.num_experts // 8 if workload.name.startswith("g") else 1)
    sizes = (workload.tokens, workload.hidden_size, width)
    return sizes == (4096, 512, 1024) and settings.dtype == torch.float32 and torch.get_num_threads() == 2
