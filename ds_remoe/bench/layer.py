"""The layer benchmark: every rival checked against ours, then timed, on each workload.

Forward is timed without gradients; forward and backward as in a training step, the gradients of all weights, of the
tokens and of the routing weights included. Gradients are freed between the rivals, outside of what is timed, so that
each pass allocates them anew, as a step does after `zero_grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds_remoe.bench import rivals_deepspeed, rivals_gpu, rivals_ours, rivals_torch
from ds_remoe.bench.rivals import Case, LeftOut, Result, Rival, RivalFactory, make_case
from ds_remoe.bench.rivals_ours import OURS
from ds_remoe.bench.rivals_torch import DENSE
from ds_remoe.bench.timing import Timing, interleave
from ds_remoe.bench.workloads import Workload

RIVALS: Mapping[str, RivalFactory] = {
    **rivals_ours.RIVALS,
    **rivals_torch.RIVALS,
    **rivals_deepspeed.RIVALS,
    **rivals_gpu.RIVALS,
}

GEMM = "plain GEMM"
COPY = "copy"
FLOOR = "floor"
FLOOR_GEMM = "floor, GEMM rate"
"""Floors, by the dense FFN's rate and by the plain GEMM's: FLOPs at that rate, measured in the same round, plus the
least weight and gradient bytes at the copy's rate."""

COPY_BYTES = 2**28
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference from ours, relative to the largest entry of the same tensor."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device, dtype: of tokens and weights.
        repeats: timed rounds.
        warmup: rounds before them.
        seed: of tokens, weights and routing.
    """

    device: torch.device
    dtype: torch.dtype
    repeats: int
    warmup: int
    seed: int


@dataclass(frozen=True)
class Passes:
    """Timings of forward, or of forward and backward.

    Attributes:
        timings: rivals, floors, and the plain GEMM and copy that the floors are made of.
        flops: FLOPs of each rival and of the plain GEMM.
        weight_bytes: the least bytes of weights and gradients.
    """

    timings: dict[str, Timing]
    flops: dict[str, int]
    weight_bytes: int

    def tflops(self, name: str) -> float:
        """Rate in 1e12 FLOP/s."""
        return self.flops[name] / self.timings[name].median / 1e12


@dataclass(frozen=True)
class Measured:
    """One workload.

    Attributes:
        workload: sizes and routing.
        forward, forward_backward: timings.
        differences: the largest relative difference from ours of each rival that computes the layer.
        left_out: rivals that do not take part → why.
        failed: rivals that computed something else or raised → what happened; they are not timed.
    """

    workload: Workload
    forward: Passes
    forward_backward: Passes
    differences: dict[str, float]
    left_out: dict[str, str]
    failed: dict[str, str]


def measure(
    workload: Workload,
    settings: Settings,
    factories: Mapping[str, RivalFactory] = RIVALS,
    after_round: Callable[[], object] | None = None,
) -> Measured:
    """Check and time all rivals on one workload.

    Args:
        workload: what to compute.
        settings: how to measure.
        factories: rivals by name, `OURS` among them.
        after_round: called after each of the 2 · (warmup + repeats) rounds: progress.
    """
    case = make_case(workload, settings.device, settings.dtype, settings.seed)
    entrants = _Entrants()
    ours = factories[OURS](case)
    reference = ours.result()
    entrants.rivals[OURS] = ours
    for name, factory in factories.items():
        if name != OURS:
            entrants.add(name, factory, case, reference, TOLERANCES[settings.dtype])
    del reference
    forward = _time(entrants.rivals, case, settings, False, after_round)
    forward_backward = _time(entrants.rivals, case, settings, True, after_round)
    return Measured(workload, forward, forward_backward, entrants.differences, entrants.left_out, entrants.failed)


@dataclass
class _Entrants:
    rivals: dict[str, Rival] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, factory: RivalFactory, case: Case, ours: Result, tolerance: float) -> None:
        """Build a rival and let it take part if it computes what ours does."""
        try:
            rival = factory(case)
            result = rival.result() if rival.computes_the_layer else None
        except LeftOut as reason:
            self.left_out[name] = str(reason)
            return
        except Exception as error:  # whatever another package raises is its result here
            _clear_leaves(case)
            self.failed[name] = f"{type(error).__name__}: {error}"
            return
        if result is not None:
            differences = dict(_differences(result, rival.expected(ours)))
            wrong = [f"{part} by {value:.2g}" for part, value in differences.items() if not value <= tolerance]
            if wrong:
                self.failed[name] = f"differs from ours in {', '.join(wrong)} of the largest entry"
                return
            self.differences[name] = max(differences.values())
        self.rivals[name] = rival


def _clear_leaves(case: Case) -> None:
    case.x_TD.grad = case.scores_ET.grad = None


def _differences(got: Result, expected: Result) -> Iterator[tuple[str, float]]:
    """Part of the result → its largest difference, relative to the largest entry expected."""
    yield "the output", _relative([got.output_TD], [expected.output_TD])
    yield "the gradient of the tokens", _relative([got.grad_x_TD], [expected.grad_x_TD])
    yield "the gradient of the routing", _relative([got.grad_routing], [expected.grad_routing])
    for index, part in enumerate(("gate", "up", "down")):
        yield (
            f"the gradient of the {part} projections",
            _relative([g[index] for g in got.grad_experts], [e[index] for e in expected.grad_experts]),
        )


def _relative(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    differences = (e if g is None else g if e is None else g - e for g, e in zip(got, expected, strict=True))
    return _peak(differences) / (_peak(expected) or 1.0)


def _peak(tensors: Iterable[Tensor | None]) -> float:
    """Largest magnitude; NaN if there is one."""
    peaks = [t.abs().amax().float() for t in tensors if t is not None and t.numel()]
    return float(torch.stack(peaks).amax()) if peaks else 0.0


def _time(
    rivals: Mapping[str, Rival],
    case: Case,
    settings: Settings,
    backward: bool,
    after_round: Callable[[], object] | None,
) -> Passes:
    works: dict[str, Callable[[], object]] = {}
    for name, rival in rivals.items():
        works[name] = _forward_backward(rival) if backward else torch.no_grad()(rival.forward)
        works[f"free {name}"] = rival.clear
    side = 4 * case.workload.hidden_size
    a = torch.randn(case.workload.tokens, side, dtype=settings.dtype, device=settings.device)
    b = torch.randn(side, side, dtype=settings.dtype, device=settings.device)
    product = torch.empty_like(a)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=settings.device)
    target = torch.zeros_like(source)
    works[GEMM] = lambda: torch.mm(a, b, out=product)
    works[COPY] = lambda: target.copy_(source)
    timings = interleave(works, settings.repeats, settings.device, settings.warmup, after_round)
    for name in rivals:
        del timings[f"free {name}"]

    passes = 3 if backward else 1
    flops = {name: rival.flops(passes) for name, rival in rivals.items()}
    flops[GEMM] = 2 * a.numel() * side
    weight_bytes = case.workload.least_weight_bytes(case.gate_up.element_size(), backward)
    for floor, yardstick in ((FLOOR, DENSE), (FLOOR_GEMM, GEMM)):
        if yardstick in timings:
            share = flops[OURS] / flops[yardstick], weight_bytes / (2 * COPY_BYTES)
            timings[floor] = _weighted(share, timings[yardstick], timings[COPY])
    return Passes(timings, flops, weight_bytes)


def _weighted(factors: tuple[float, float], one: Timing, other: Timing) -> Timing:
    rounds = zip(one.seconds, other.seconds, strict=True)
    return Timing(tuple(factors[0] * a + factors[1] * b for a, b in rounds))


def _forward_backward(rival: Rival) -> Callable[[], object]:
    def work() -> None:
        rival.backward(rival())

    return work
