"""The three stages of a ReMoE run (paper, section 3.3): I dense, II sparsifying, III sparse and stable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_remoe.training.record import StepRecord

DENSE_BELOW = 0.5


@dataclass(frozen=True)
class Stages:
    """Where stages II and III begin, as optimizer steps; None where the run never got there."""

    sparsifying_from: int | None
    settled_at: int | None


def detect_stages(
    records: Sequence[StepRecord], target_sparsity: float, window: int = 20, tolerance: float = 0.025
) -> Stages:
    """The stages of a run with a ReLU router.

    - settled_at is the first step s for which |S_i - target| <= tolerance holds at every one of the `window` steps
      s, s+1, ..., s+window-1, all of them recorded. Leaving the tolerance later does not take that back.
    - sparsifying_from is the step after the last one before settling (before the end, if the run never settles) with
      S_i < 0.5, where a token passes more than half of the experts. A first step at 0.5, as the random initialisation
      gives, therefore does not hide the dense stage that follows. It is None if the last step still is that dense.
      A target below 0.5 knows no dense stage: it is the first recorded step.

    Args:
        records: consecutive steps of one run, in order.
        target_sparsity: 1 - k/E.
        window: steps that the sparsity has to stay near the target, at least 1.
        tolerance: largest distance from the target, an absolute share.

    Returns:
        Both None for no records and for a dense model, which has no sparsity.
    """
    if window < 1:
        raise ValueError(f"window: {window} is not a number of steps; use at least 1")
    if tolerance < 0:
        raise ValueError(f"tolerance: {tolerance} is negative")
    sparsity = [(record.step, record.sparsity) for record in records if record.sparsity is not None]
    if not sparsity:
        return Stages(None, None)
    settled = _first_calm_window([abs(value - target_sparsity) <= tolerance for _, value in sparsity], window)
    before_settling = sparsity if settled is None else sparsity[:settled]
    dense = [index for index, (_, value) in enumerate(before_settling) if value < DENSE_BELOW]
    begins = dense[-1] + 1 if dense and target_sparsity >= DENSE_BELOW else 0
    return Stages(
        sparsifying_from=sparsity[begins][0] if begins < len(sparsity) else None,
        settled_at=None if settled is None else sparsity[settled][0],
    )


def _first_calm_window(calm: Sequence[bool], window: int) -> int | None:
    """Index where the first run of `window` true values begins."""
    length = 0
    for index, value in enumerate(calm):
        length = length + 1 if value else 0
        if length == window:
            return index - window + 1
    return None
