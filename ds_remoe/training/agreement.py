"""What ranks have to know of each other so that all of them go on, or all of them stop with the same error."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_rank_0(action: Callable[[], Result]) -> Result:
    """Do it on rank 0; every rank returns the result (picklable), or raises what was raised there."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = _portable(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def gathered(value: Result) -> list[Result]:
    """The value (picklable) of every rank, by rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(action: Callable[[], Result]) -> Result:
    """The action's own result on every rank, once all have theirs.

    Raises:
        Exception: on every rank, what the action raised on the first where it did.
    """
    results: list[Result] = []
    failure: Exception | None = None
    try:
        results.append(action())
    except Exception as error:
        failure = error
    for failed in gathered(_portable(failure)):
        if failed is not None:
            raise failed
    return results[0]


def shared_out(items: Sequence[Item], action: Callable[[Item], Result]) -> list[Result]:
    """The action's results (picklable) of all items, in order, each rank doing its share of them.

    Raises:
        Exception: on every rank, what the action raised on the first where it did.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parts = gathered(agreed(lambda: [action(item) for item in items[rank::world_size]]))
    return [parts[index % world_size][index // world_size] for index in range(len(items))]


def _portable(failure: Exception | None) -> Exception | None:
    """The exception, or what can be said of one that cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:
        return RuntimeError(f"{type(failure).__name__}: {failure}")
    return failure
