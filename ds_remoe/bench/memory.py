"""Activation memory against routing density: of one MoE layer and of a whole model, with and without the budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ds_remoe.bench.memory_peak import MIB, Peak, measure_peak
from ds_remoe.bench.memory_rigs import BUDGET, Sizes, rigs

WHAT = (
    "peak activation memory of a forward and backward pass against routing density, with and without the activation "
    "budget, and of DeepSpeed's MOELayer with the same routing"
)
BAR = 1.25
STAGE_ONE_DENSITY = 0.5
DENSITIES = (0.05, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        kind: "layer" or "model".
        rival: with or without the budget, or DeepSpeed's layer.
        wanted: density asked for.
        density: share of all (token, expert) pairs that were active.
        peak: bytes.
    """

    kind: str
    rival: str
    wanted: float
    density: float
    peak: Peak


@dataclass(frozen=True)
class Verdict:
    """The peaks of stage I against that of stage III, with the budget.

    Attributes:
        kind: "layer" or "model".
        stage_three: bytes at density k/E.
        ratios: density of stage I, from 0.5 up → its peak / stage_three.
    """

    kind: str
    stage_three: int
    ratios: dict[float, float]

    @property
    def reached(self) -> bool:
        """No ratio is above the bar."""
        return max(self.ratios.values()) <= BAR


def stage_three_density(sizes: Sizes) -> float:
    """k/E, where the sparsity settles."""
    return sizes.moe.k / sizes.moe.num_experts


def measure(sizes: Sizes, kinds: Sequence[str], densities: Sequence[float]) -> Iterator[Point]:
    """Measure the rivals of these kinds one after another, at these densities and at k/E."""
    for kind in kinds:
        for rival, build in rigs(kind, sizes).items():
            rig = build()
            for number, wanted in enumerate(sorted({stage_three_density(sizes), *densities})):
                density = rig.route(wanted)
                if number == 0:  # what the first pass makes for good belongs to none
                    measure_peak(rig.forward, rig.module.parameters(), rig.leaves, sizes.device)
                peak = measure_peak(rig.forward, rig.module.parameters(), rig.leaves, sizes.device)
                yield Point(kind, rival, wanted, density, peak)


def judge(points: Sequence[Point], stage_three: float) -> list[Verdict]:
    """A verdict for each kind that was measured with the budget, at k/E and in stage I."""
    verdicts = []
    for kind in dict.fromkeys(point.kind for point in points):
        peaks = {p.wanted: p.peak.activations for p in points if p.kind == kind and p.rival == BUDGET}
        dense = [wanted for wanted in peaks if wanted >= STAGE_ONE_DENSITY]
        if stage_three in peaks and dense:
            settled = peaks[stage_three]
            verdicts.append(Verdict(kind, settled, {wanted: peaks[wanted] / settled for wanted in dense}))
    return verdicts


def table(points: Sequence[Point]) -> Table:
    """The measurements for a terminal, in MiB."""
    result = Table(title="peak activation memory of forward + backward, MiB", title_justify="left")
    for name in ("", "density"):
        result.add_column(name, justify="left" if not name else "right")
    rivals = list(dict.fromkeys(point.rival for point in points))
    for rival in rivals:
        result.add_column(rival, justify="right")
        result.add_column("whole", justify="right", style="dim")
    cells = {(p.kind, p.wanted, p.rival): p.peak for p in points}
    for kind, wanted in dict.fromkeys((p.kind, p.wanted) for p in points):
        row = [kind, f"{wanted:.3f}"]
        for rival in rivals:
            peak = cells.get((kind, wanted, rival))
            row.append("" if peak is None else f"{peak.activations / MIB:,.1f}")
            row.append("" if peak is None or peak.whole is None else f"{peak.whole / MIB:,.0f}")
        result.add_row(*row)
    return result


def sentence(verdict: Verdict) -> str:
    """The verdict for a terminal."""
    dense, ratio = max(verdict.ratios.items(), key=lambda item: item[1])
    return (
        f"{verdict.kind}: stage I at most {ratio:.3f} × stage III's {verdict.stage_three / MIB:,.1f} MiB "
        f"(at density {dense:g}); the bar of {BAR} is {'reached' if verdict.reached else 'NOT reached'}"
    )


def figures(sizes: Sizes, points: Sequence[Point]) -> dict[str, Any]:
    """The measurements for a results file."""
    return {
        "sizes": {
            "tokens": sizes.tokens,
            "micro_batch": sizes.micro_batch,
            "model": sizes.model.model_dump(),
            "moe": sizes.moe.model_dump(),
            "vocab_size": sizes.vocab_size,
            "dtype": str(sizes.dtype).removeprefix("torch."),
            "device": sizes.device.type,
        },
        "columns": {
            "peak_mib": "most allocated at a time, without the gradients of the parameters",
            "kept_mib": "what of it is alive between forward and backward",
            "whole_mib": "growth of the resident set, or max_memory_allocated on CUDA; those gradients included",
        },
        "points": [
            {
                "kind": p.kind,
                "rival": p.rival,
                "density": round(p.density, 5),
                "peak_mib": round(p.peak.activations / MIB, 2),
                "kept_mib": round(p.peak.kept / MIB, 2),
                "whole_mib": None if p.peak.whole is None else round(p.peak.whole / MIB, 2),
            }
            for p in points
        ],
        "bars": [
            {
                "what": f"peak activation memory of the {v.kind}, stage I against stage III",
                "bar": BAR,
                "ratios": {f"{density:g}": round(ratio, 4) for density, ratio in v.ratios.items()},
                "reached": v.reached,
            }
            for v in judge(points, stage_three_density(sizes))
        ],
    }
