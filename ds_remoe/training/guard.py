"""Optimizer steps that are not taken: a loss or gradient that is not finite and, by configuration, a spike of the norm.

The judgement needs no collective and no read from the device of its own. A loss that is not finite is turned into
gradients that are NaN (`refuse_non_finite`), the gradients' global norm tells every rank of them, and that norm is read
in any case. Only the spike guard adds an all-reduce, of one number, so that a last bit in which the ranks' norms differ
cannot part them.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ds_remoe.config.schema import SpikeGuardConfig
from ds_remoe.data.batches import MicroBatches
from ds_remoe.data.order import micro_batch_positions

SkipReason = Literal["non_finite", "spike", "overflow"]
"""Loss or gradient not finite; norm beyond the spike guard's bound; fp16's dynamic loss scale was too large."""


class TrainingStoppedError(RuntimeError):
    """More optimizer steps in a row were skipped than the configuration allows."""


class StepGuard:
    """Judges each optimizer step by the global norm of its gradients, before it is applied.

    All ranks judge the same norms, so they agree. A skipped step leaves weights, optimizer state and λ as they are, and
    the learning-rate schedule where it is; its samples count as seen, as in DeepSpeed's overflow steps.

    Args:
        max_skipped: steps in a row that may be skipped.
        spike: bound of the norm; None judges finiteness alone.

    Attributes:
        in_a_row: steps skipped since the last applied one. Steps that dynamic fp16 loss scaling gave up do not count,
            as they are its way to find the scale.
    """

    def __init__(self, max_skipped: int, spike: SpikeGuardConfig | None = None) -> None:
        self.max_skipped = max_skipped
        self.spike = spike
        self.in_a_row = 0
        self._norms: deque[float] = deque(maxlen=spike.window if spike is not None else 0)

    @property
    def bound(self) -> float | None:
        """Largest norm that is no spike; None without a spike guard, and until its window is full."""
        if self.spike is None or len(self._norms) < self.spike.window:
            return None
        return self.spike.factor * statistics.median(self._norms)

    def judge(self, norm: Tensor, device: torch.device) -> tuple[float, SkipReason | None]:
        """Whether the step with these gradients is to be skipped, and why.

        Args:
            norm: their global L2 norm, a scalar; DeepSpeed's −1 and anything not finite mean gradients that are not.
            device: for the spike guard's all-reduce.

        Returns:
            (norm, reason): the norm on the host, inf where it is none; None for a step to take.
        """
        if self.spike is not None and dist.is_initialized() and dist.get_world_size() > 1:
            agreed = norm.detach().to(device, torch.float64, copy=True)
            # A NaN may lose a maximum, an infinity cannot.
            agreed = torch.where(agreed.isfinite() & (agreed >= 0), agreed, math.inf)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
            norm = agreed
        value = float(norm)
        if not math.isfinite(value) or value < 0:
            return math.inf, "non_finite"
        bound = self.bound
        return value, "spike" if bound is not None and value > bound else None

    def close(self, norm: float | None, reason: SkipReason | None) -> None:
        """Remember how an optimizer step ended: its norm where it was applied, else why not."""
        if reason is None:
            self.in_a_row = 0
            if norm is not None:
                self._norms.append(norm)
        elif reason != "overflow":
            self.in_a_row += 1

    def check(self, note: str) -> None:
        """Raise TrainingStoppedError where the limit is passed; `note` tells of the last skipped step."""
        if self.in_a_row > self.max_skipped:
            raise TrainingStoppedError(
                f"{note}\nThat makes {self.in_a_row} skipped in a row, and remoe.train.max_skipped_steps = "
                f"{self.max_skipped}: training stops, weights, optimizer and λ being those of the last applied step. "
                "Look at the samples, lower the learning rate, clip harder, resume from an earlier checkpoint with "
                "--resume TAG, or allow more with max_skipped_steps"
                + ("; remoe.train.spike_guard.factor sets what is a spike" if self.spike is not None else "")
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as the uninterrupted one."""
        return {"in_a_row": self.in_a_row, "norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; a shorter window keeps the newest norms."""
        self.in_a_row = int(state["in_a_row"])
        self._norms.clear()
        self._norms.extend(float(norm) for norm in state["norms"])


def refuse_non_finite(loss: Tensor) -> Tensor:
    """The loss itself, bit for bit; where it is not finite, one whose gradients are all NaN.

    An infinite loss can have finite gradients, and one rank's NaN reaches all others with the gradients' own reduction.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss.dtype)


def describe_skip(
    step: int, reason: SkipReason, norm: float | None, guard: StepGuard, losses: Sequence[Tensor], batches: MicroBatches
) -> str:
    """What the user is told of a skipped step; every rank calls it and gets the same text.

    Args:
        step: optimizer step, from 0; the text counts from 1.
        reason: why it was skipped.
        norm: of its gradients.
        guard: that closed the step.
        losses: this rank's loss of each micro-batch, scalars.
        batches: where the micro-batches came from.
    """
    head = f"step {step + 1} skipped"
    if reason == "overflow":
        return f"{head}: fp16 overflow; the loss scale is lowered"
    head += f" ({guard.in_a_row} in a row, at most {guard.max_skipped} allowed)"
    if reason == "spike":
        assert guard.spike is not None
        return (
            f"{head}: gradient norm {norm:.4g} is above {guard.bound:.4g}, {guard.spike.factor:g} times the median of "
            f"the last {guard.spike.window} applied steps; {_samples_of_step(step, batches)}"
        )
    return f"{head}: {_first_fault(step, losses, batches)}; {_samples_of_step(step, batches)}"


def _first_fault(step: int, losses: Sequence[Tensor], batches: MicroBatches) -> str:
    """Where the first loss that is not finite came up, over all ranks."""
    values = torch.stack(list(losses)).tolist()
    mine = [(index, value) for index, value in enumerate(values) if not math.isfinite(value)]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    faults = sorted((index, rank, value) for rank, part in enumerate(gathered) for index, value in part)
    if not faults:
        return "the gradient is not finite, though every loss is"
    index, rank, value = faults[0]
    positions = _positions(batches, step, index, rank)
    samples = ", ".join(str(sample) for sample in batches.samples(step, index, rank).tolist())
    more = f", the first of {len(faults)} such micro-batches" if len(faults) > 1 else ""
    return (
        f"loss {value} on rank {rank} in micro-batch {index} of 0 ... {batches.accumulation_steps - 1}{more}; it has "
        f"positions {positions[0]} ... {positions[-1]} of the order of samples, samples {samples} of the dataset"
    )


def _samples_of_step(step: int, batches: MicroBatches) -> str:
    first = _positions(batches, step, 0, 0)[0]
    last = _positions(batches, step, batches.accumulation_steps - 1, batches.world_size - 1)[-1]
    return f"the step took positions {first} ... {last}"


def _positions(batches: MicroBatches, step: int, index: int, rank: int) -> list[int]:
    positions: list[int] = micro_batch_positions(
        step,
        index,
        rank,
        micro_batch_size=batches.micro_batch_size,
        accumulation_steps=batches.accumulation_steps,
        world_size=batches.world_size,
    ).tolist()
    return positions
