"""Micro-batches of packed samples as tensors, for training and for validation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ds_remoe.data.order import SampleOrder, micro_batch
from ds_remoe.data.store import PackedDataset

# The validation samples of a data configuration are the same ones in every run, whatever train.seed is.
VALIDATION_SEED = 20_241_219


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of a dataset in an order of samples, addressed by (step, accumulation_index, rank)."""

    dataset: PackedDataset
    order: SampleOrder
    micro_batch_size: int
    accumulation_steps: int
    world_size: int

    def samples(self, step: int, accumulation_index: int, rank: int) -> npt.NDArray[np.int64]:
        """Indices into the dataset, int64 [micro_batch_size]."""
        return micro_batch(
            self.order,
            step,
            accumulation_index,
            rank,
            micro_batch_size=self.micro_batch_size,
            accumulation_steps=self.accumulation_steps,
            world_size=self.world_size,
        )

    def tokens(self, step: int, accumulation_index: int, rank: int) -> Tensor:
        """Tokens, int64 [micro_batch_size, seq_length + 1]; inputs are [:, :-1], targets [:, 1:]."""
        samples = self.samples(step, accumulation_index, rank)
        return torch.from_numpy(np.stack([self.dataset[int(sample)] for sample in samples]))

    def domains(self, step: int, accumulation_index: int, rank: int) -> Tensor:
        """Domain id of each of these tokens, int16 [micro_batch_size, seq_length + 1]."""
        samples = self.samples(step, accumulation_index, rank)
        return torch.from_numpy(np.stack([self.dataset.domains(int(sample)) for sample in samples]))


def training_batches(
    dataset: PackedDataset, *, seed: int, micro_batch_size: int, accumulation_steps: int, world_size: int
) -> MicroBatches:
    """The training run's micro-batches; they repeat the dataset in a new permutation for each epoch."""
    order = SampleOrder(len(dataset), seed)
    return MicroBatches(dataset, order, micro_batch_size, accumulation_steps, world_size)


def validation_batches(
    dataset: PackedDataset, *, num_micro_batches: int, micro_batch_size: int, world_size: int
) -> MicroBatches:
    """The validation micro-batches: step 0, accumulation indices 0 ... num_micro_batches / world_size - 1.

    All ranks together take the first num_micro_batches * micro_batch_size positions of one fixed order, so every
    world size that divides `num_micro_batches` evaluates the same samples, and every rank makes the same number of
    forward passes, as expert parallelism needs. A dataset with fewer samples than that is gone through again, which
    `repeated_validation` puts into words.

    Raises: ValueError: world_size does not divide num_micro_batches.
    """
    if num_micro_batches < 1 or num_micro_batches % world_size:
        raise ValueError(
            f"num_micro_batches is {num_micro_batches}; it must be a positive multiple of world_size, {world_size}"
        )
    order = SampleOrder(len(dataset), VALIDATION_SEED)
    return MicroBatches(dataset, order, micro_batch_size, num_micro_batches // world_size, world_size)


def repeated_validation(dataset: PackedDataset, eval_batches: int, global_batch: int) -> str | None:
    """For the user: that evaluations take samples of the held-out split more than once; None if they do not.

    Args:
        eval_batches: global batches of an evaluation.
        global_batch: samples of an optimizer step.
    """
    taken, most = eval_batches * global_batch, len(dataset) // global_batch
    if eval_batches <= most:
        return None
    remedy = f"set it to {most} or less, or" if most else "these are fewer than a global batch;"
    return (
        f"remoe.train.eval_batches = {eval_batches}: an evaluation takes {taken} samples, but only {len(dataset)} are "
        f"held out, so it takes some again; {remedy} raise remoe.data.valid_fraction"
    )
