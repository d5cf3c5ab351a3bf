"""Layers and experts that a run no longer uses, found in its step records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from ds_remoe.training.record import StepRecord

Item = TypeVar("Item")

DEAD_LAYER_ACTIVE_EXPERTS = 0.05
"""Below this mean number of active experts, fewer than one token in twenty passes any expert of the layer."""
SILENT_EXPERT_LOAD = 1 / 64
"""An expert that sees a smaller share of the tokens is silent (paper, appendix on load balancing)."""


def last_part(records: Sequence[Item], fraction: float = 0.25) -> Sequence[Item]:
    """The last `fraction` of the records, at least one if there is any."""
    if not 0 < fraction <= 1:
        raise ValueError(f"last_fraction: {fraction} is not in (0, 1]")
    return records[len(records) - math.ceil(len(records) * fraction) :]


def mean_expert_load(records: Sequence[StepRecord], last_fraction: float = 0.25) -> NDArray[np.float64]:
    """[L, E] share of the tokens that each expert saw, mean over the last steps; [0, 0] for a dense model."""
    loads = [record.expert_load for record in last_part(records, last_fraction) if record.expert_load]
    if not loads:
        return np.zeros((0, 0))
    return np.asarray(loads, dtype=np.float64).mean(axis=0)


def dead_layers(
    records: Sequence[StepRecord], last_fraction: float = 0.25, threshold: float = DEAD_LAYER_ACTIVE_EXPERTS
) -> tuple[int, ...]:
    """MoE layers, counted from 0, that went almost wholly sparse while the overall sparsity may be on its target.

    A layer counts as dead if its active experts per token, averaged over the last steps, are fewer than `threshold`.
    """
    active_L = mean_expert_load(records, last_fraction).sum(axis=1)
    return tuple(int(layer) for layer in np.flatnonzero(active_L < threshold))


def silent_experts(
    records: Sequence[StepRecord], last_fraction: float = 0.25, threshold: float = SILENT_EXPERT_LOAD
) -> tuple[tuple[int, int], ...]:
    """(layer, expert) of each expert that saw less than `threshold` of the tokens over the last steps."""
    load_LE = mean_expert_load(records, last_fraction)
    return tuple((int(layer), int(expert)) for layer, expert in np.argwhere(load_LE < threshold))


def next_idle_steps(idle_LE: NDArray[np.int64], load_LE: ArrayLike) -> NDArray[np.int64]:
    """[L, E] steps in a row up to this one in which an expert saw no token, from those up to the step before.

    Args:
        idle_LE: up to the step before; [0, 0] before the first.
        load_LE: tokens of the step that each expert saw, as a number or a share.
    """
    load = np.asarray(load_LE, dtype=np.float64)
    before = idle_LE if idle_LE.size else np.zeros(load.shape, dtype=np.int64)
    return np.where(load > 0, 0, before + 1)


def idle_steps(records: Iterable[StepRecord]) -> NDArray[np.int64]:
    """[L, E] applied steps in a row up to the last record in which an expert saw no token; [0, 0] for a dense model."""
    idle_LE = np.zeros((0, 0), dtype=np.int64)
    for record in records:
        if record.skipped is None and record.expert_load:
            idle_LE = next_idle_steps(idle_LE, record.expert_load)
    return idle_LE


def name_experts(chosen_LE: NDArray[np.bool_]) -> list[str]:
    """The chosen experts in words, a line for each MoE layer that has one; layers and experts count from 0."""
    lines = []
    for layer, chosen_E in enumerate(chosen_LE):
        experts = np.flatnonzero(chosen_E)
        if len(experts) == len(chosen_E):
            lines.append(f"the whole MoE layer {layer}")
        elif len(experts):
            plural = "s" if len(experts) > 1 else ""
            lines.append(f"expert{plural} {', '.join(map(str, experts))} of MoE layer {layer}")
    return lines
