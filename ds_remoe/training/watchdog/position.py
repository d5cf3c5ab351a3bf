"""Where a rank is: written by the main thread at the cost of a few stores, read by the watchdog's threads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup

OPERATIONS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
}
"""Methods of torch's ProcessGroup, by which each collective starts, and what they are in messages."""

UNLIMITED = "preparing the data"
"""The phase that takes as long as the corpus is large."""
LONG = ("starting", "loading a checkpoint", "saving a checkpoint", "ending")
"""Phases without signs of progress in between; the time limit of a single collective holds for them."""


@dataclass(frozen=True)
class Limits:
    """Seconds without progress after which a rank counts as hanging.

    Attributes:
        hang: in a training step or an evaluation, from the second of its kind on.
        collective: in a first step or evaluation, where kernels are compiled, and in a phase of `LONG`.
    """

    hang: float = math.inf
    collective: float = math.inf


class Position:
    """Where this rank is.

    Attributes:
        phase, step, micro_batch: what it does; step counts from 1, micro-batch from 0; None where there is none.
        limit: seconds that may pass here without progress.
        beats: grows with each sign of progress: a call of `at`, a collective that starts.
        started: collectives started so far, by torch's name of the group.
        last: operation and group of the newest.
        limit_changed: called with each new limit.
    """

    def __init__(self, limits: Limits = Limits()) -> None:
        self.phase, self.step, self.micro_batch = "starting", None, None
        self.limits, self.limit = limits, limits.collective
        self.beats = 0
        self.started: dict[str, int] = {}
        self.last: tuple[str, ProcessGroup] | None = None
        self.limit_changed: Callable[[float], None] = lambda limit: None
        self._first_step: dict[str, int | None] = {}

    phase: str
    step: int | None
    micro_batch: int | None

    def at(self, phase: str, step: int | None = None, micro_batch: int | None = None) -> None:
        """Note what comes now."""
        self.phase, self.step, self.micro_batch = phase, step, micro_batch
        self.beats += 1
        limit = self._limit_of(phase, step)
        if limit != self.limit:
            self.limit = limit
            self.limit_changed(limit)

    def start_collective(self, operation: str, group: ProcessGroup) -> None:
        """Note that a collective starts."""
        name = group.group_name
        self.started[name] = self.started.get(name, 0) + 1
        self.last = operation, group
        self.beats += 1

    def _limit_of(self, phase: str, step: int | None) -> float:
        if phase == UNLIMITED:
            return math.inf
        is_first = self._first_step.setdefault(phase, step) == step
        return self.limits.collective if phase in LONG or is_first else self.limits.hang


def record_collectives(position: Position) -> Callable[[], None]:
    """Have every collective of this process noted in `position`, whoever starts it and through whichever function.

    Returns:
        Undoes it.
    """
    # What the class holds, not what getattr gives: only that binds to a group again when it is put back.
    originals = {name: vars(ProcessGroup)[name] for name in OPERATIONS if name in vars(ProcessGroup)}
    for name in originals:
        setattr(ProcessGroup, name, _noted(getattr(ProcessGroup, name), OPERATIONS[name], position))

    def undo() -> None:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)

    return undo


def _noted(original: Callable[..., Any], operation: str, position: Position) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        position.start_collective(operation, group)
        return original(group, *args, **kwargs)

    return method
