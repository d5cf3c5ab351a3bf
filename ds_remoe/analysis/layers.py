"""Layers and experts that a run no longer uses, found in its step records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

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
