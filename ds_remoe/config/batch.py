"""Batch sizes, by the rules with which DeepSpeed derives the ones that are not given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True)
class BatchSizes:
    """Sequences per optimizer step over all ranks, per forward of one rank, and forwards per optimizer step."""

    global_batch: int
    micro_batch: int
    accumulation: int

    def fits(self, world_size: int) -> bool:
        """Whether global = micro * accumulation * world size, all of them positive."""
        product = self.micro_batch * self.accumulation * world_size
        return self.global_batch == product and product > 0


def derive_batch_sizes(deepspeed: Mapping[str, Any], world_size: int) -> BatchSizes | None:
    """The batch sizes that DeepSpeed will use on `world_size` ranks.

    Divisions round down as in `DeepSpeedConfig._set_batch_related_parameters` (DeepSpeed 0.19.8), so the result may
    fail `BatchSizes.fits`; such a configuration is refused.

    Returns:
        None if neither train_batch_size nor train_micro_batch_size_per_gpu is given.
    """
    train: int | None = deepspeed.get(TRAIN)
    micro: int | None = deepspeed.get(MICRO)
    accumulation: int | None = deepspeed.get(ACCUMULATION)
    if micro is not None:
        if train is None:
            accumulation = accumulation or 1
            return BatchSizes(micro * accumulation * world_size, micro, accumulation)
        return BatchSizes(train, micro, accumulation or train // micro // world_size)
    if train is not None:
        accumulation = accumulation or 1
        return BatchSizes(train, train // world_size // accumulation, accumulation)
    return None
