"""The order of samples: a permutation of the dataset per epoch, computed from seed and position alone.

Nothing is shuffled in memory and no state is kept, so a resumed run finds its place by the step number, and ranks
agree without talking to each other.
"""

from __future__ import annotations

from typing import overload

import numpy as np
import numpy.typing as npt

_GOLDEN = 0x9E3779B97F4A7C15
# Luby and Rackoff need four rounds; halves of one or two bits need some more to come near all permutations.
_ROUND_CONSTANTS = [np.uint64(index * _GOLDEN % 2**64) for index in range(1, 9)]


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64 bits that looks random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleOrder:
    """`order[position]` is the sample at that position of an endless run over the dataset.

    Positions e * num_samples ... (e + 1) * num_samples - 1 are a permutation of all samples, another one for each
    epoch e. The permutation is a Feistel network over the next power of two, keyed by (seed, epoch); values outside of
    the dataset walk along their cycle until they are inside (Black and Rogaway 2002), two steps or fewer on average.
    A lookup is O(1) in time and memory, for a number or an array of positions.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if not 0 < num_samples <= 2**62:
            raise ValueError(f"num_samples is {num_samples}; it must be in 1 ... 2**62")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; it must be in 0 ... 2**63 - 1")
        self.num_samples = num_samples
        self.seed = seed
        bits = (num_samples - 1).bit_length()
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    @overload
    def __getitem__(self, position: int) -> int: ...
    @overload
    def __getitem__(self, position: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...
    def __getitem__(self, position: int | npt.NDArray[np.int64]) -> int | npt.NDArray[np.int64]:
        """Sample index (int), or indices (int64, of the shape of `position`), in 0 ... num_samples - 1.

        Raises: IndexError: a position is negative.
        """
        positions = np.asarray(position, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise IndexError(f"position {positions.min()} is negative")
        flat = positions.reshape(-1).astype(np.uint64)
        epochs, values = np.divmod(flat, np.uint64(self.num_samples))
        keys = _mix(_mix(np.array([self.seed], dtype=np.uint64) + _ROUND_CONSTANTS[0]) ^ epochs)
        values = self._permute(values, keys)
        outside = np.flatnonzero(values >= self.num_samples)
        while outside.size:
            values[outside] = self._permute(values[outside], keys[outside])
            outside = outside[values[outside] >= self.num_samples]
        samples = values.astype(np.int64).reshape(positions.shape)
        return int(samples) if isinstance(position, int) else samples

    def _permute(self, values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """One pass of the network: each round changes one part by a function of the other, and so can be undone."""
        high, low = values >> self._low_bits, values & self._low_mask
        for index, constant in enumerate(_ROUND_CONSTANTS):
            round_keys = _mix(keys + constant)
            if index % 2:
                low = low ^ (_mix(high ^ round_keys) & self._low_mask)
            else:
                high = high ^ (_mix(low ^ round_keys) & self._high_mask)
        return (high << self._low_bits) | low


def micro_batch_positions(
    step: int, accumulation_index: int, rank: int, *, micro_batch_size: int, accumulation_steps: int, world_size: int
) -> npt.NDArray[np.int64]:
    """Positions (int64 [micro_batch_size]) in the order of samples that one rank takes in one forward pass.

    The global batch of optimizer step s is accumulation_steps * world_size micro-batches in a row; number
    accumulation_index * world_size + rank is this one. So the micro-batches of a step do not depend on how their
    number is split in accumulation steps and ranks.

    Args:
        step: optimizer step, from 0.
        accumulation_index: forward pass within the step, 0 ... accumulation_steps - 1.
        rank: data-parallel rank, 0 ... world_size - 1.

    Raises: ValueError: an index is out of its range.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size is {micro_batch_size}; it must be at least 1")
    if step < 0:
        raise ValueError(f"step is {step}; it must not be negative")
    if not 0 <= accumulation_index < accumulation_steps:
        raise ValueError(f"accumulation_index is {accumulation_index}; accumulation_steps is {accumulation_steps}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; world_size is {world_size}")
    number = (step * accumulation_steps + accumulation_index) * world_size + rank
    return number * micro_batch_size + np.arange(micro_batch_size, dtype=np.int64)


def micro_batch(
    order: SampleOrder,
    step: int,
    accumulation_index: int,
    rank: int,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    world_size: int,
) -> npt.NDArray[np.int64]:
    """Sample indices (int64 [micro_batch_size]) at `micro_batch_positions`, whose arguments and errors these are."""
    return order[
        micro_batch_positions(
            step,
            accumulation_index,
            rank,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            world_size=world_size,
        )
    ]
