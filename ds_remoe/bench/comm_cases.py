"""The routings that `ds-remoe bench comm` measures: those of a recorded trace, and the layer benchmark's workloads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ds_remoe.bench.trace import TracedRouting
from ds_remoe.bench.workloads import Sizes, build_workload


@dataclass(frozen=True)
class RoutingCase:
    """One layer's routing on all ranks of an expert-parallel group.

    Attributes:
        workload: "trace", or a name that `build_workload` knows.
        step, layer: of the trace; None for another workload.
        expert_width: H.
        masks_R, weights_R: of each rank mask_TE (bool) and weights_TE (fp32, zero outside the mask); T may differ
            between ranks.
    """

    workload: str
    step: int | None
    layer: int | None
    expert_width: int
    masks_R: tuple[Tensor, ...]
    weights_R: tuple[Tensor, ...]

    @property
    def num_experts(self) -> int:
        return self.masks_R[0].shape[1]

    def __str__(self) -> str:
        return self.workload if self.step is None else f"{self.workload}, step {self.step}, layer {self.layer}"


def traced_cases(trace: Sequence[TracedRouting], expert_width: int, ranks: int) -> list[RoutingCase]:
    """For each step and layer of a trace, its tokens in order of micro-batch and rank, cut into `ranks` equal parts.

    Raises:
        ValueError: the trace's number of experts is not divisible by `ranks`.
    """

    def place(record: TracedRouting) -> tuple[int, int]:
        return record.step, record.layer

    cases = []
    for (step, layer), group in groupby(sorted(trace, key=place), place):
        records = list(group)
        masks_R = torch.cat([r.mask_TE for r in records]).tensor_split(ranks)
        weights_R = torch.cat([r.weights_TE for r in records]).tensor_split(ranks)
        cases.append(_divisible(RoutingCase("trace", step, layer, expert_width, masks_R, weights_R)))
    return cases


def workload_case(name: str, sizes: Sizes, ranks: int) -> RoutingCase:
    """A workload of the layer benchmark with `sizes.tokens` tokens on each rank, each rank drawing its own.

    Raises:
        WorkloadError: the name is unknown, or the sizes do not fit it.
        ValueError: its number of experts is not divisible by `ranks`.
    """
    workloads = [build_workload(name, sizes, seed) for seed in range(ranks)]
    masks_R = tuple(workload.mask_TE for workload in workloads)
    weights_R = tuple(workload.scores_TE * workload.mask_TE for workload in workloads)
    return _divisible(RoutingCase(name, None, None, workloads[0].expert_width, masks_R, weights_R))


def _divisible(case: RoutingCase) -> RoutingCase:
    ranks = len(case.masks_R)
    if case.num_experts % ranks:
        raise ValueError(f"--ep-size {ranks}: must divide the {case.num_experts} experts of workload {case.workload}")
    return case
