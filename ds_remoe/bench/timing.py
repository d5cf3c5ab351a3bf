"""Timing of rivals: every round times each of them once, so that a disturbance of the machine meets them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one rival over the repeats.

    Attributes:
        seconds: every repeat, in the order measured.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile: the spread."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def as_figures(self) -> dict[str, float | int]:
        """For a results file, in milliseconds."""
        low, high = self.quartiles
        return {
            "median_ms": round(self.median * 1e3, 4),
            "low_quartile_ms": round(low * 1e3, 4),
            "high_quartile_ms": round(high * 1e3, 4),
            "repeats": len(self.seconds),
        }


def ratio(one: Timing, other: Timing) -> float:
    """Median over the rounds of one / other, each pair measured in the same round."""
    return statistics.median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))


def interleave(
    rivals: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    warmup: int = 2,
    after_round: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time each rival once a round, in the mapping's order, after `warmup` untimed rounds.

    Args:
        rivals: name → one piece of work.
        repeats: timed rounds.
        device: where the work runs; on CUDA the clock is read after a synchronisation.
        after_round: called after each round, warm-up included: progress.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(warmup + repeats):
            for name, work in rivals.items():
                elapsed = _time_once(work, device)
                if number >= warmup:
                    seconds[name].append(elapsed)
            gc.collect()
            if after_round is not None:
                after_round()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _time_once(work: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
