"""Which program works on which pairs: tables made on the host from the counts, which lie there already."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_ROWS, MAX_ROWS = 16, 128
"""Least and greatest height of a tile; 16 is the least that the tensor cores take."""


def tile_rows(counts_L: Sequence[int], dtype: torch.dtype) -> int:
    """Height of the tiles, a power of two.

    A little above the mean count of the experts that have pairs, so that most of those with few pairs need one tile
    and read their weights once. fp32 has half the registers and shared memory per element and gets half the height.
    """
    active = [count for count in counts_L if count]
    mean = sum(active) / max(len(active), 1)
    highest = MAX_ROWS // 2 if dtype == torch.float32 else MAX_ROWS
    rows = MIN_ROWS
    while rows < min(1.25 * mean, highest):
        rows *= 2
    return rows


def tile_table(counts_L: Sequence[int], rows: int) -> NDArray[np.int32]:
    """Cut each expert's pairs into tiles of at most `rows`, expert by expert, so that neighbours share weights.

    Returns:
        [tiles, 3]: expert, first pair, number of pairs (at least 1).
    """
    counts = np.asarray(counts_L, dtype=np.int64)
    tiles_L = -(-counts // rows)
    experts = np.repeat(np.arange(len(counts)), tiles_L)
    within = np.arange(len(experts)) - (np.cumsum(tiles_L) - tiles_L)[experts]
    starts = (np.cumsum(counts) - counts)[experts] + within * rows
    sizes = np.minimum(counts[experts] - within * rows, rows)
    return np.stack([experts, starts, sizes], axis=1).astype(np.int32)


def expert_table(counts_L: Sequence[int], with_empty: bool) -> NDArray[np.int32]:
    """The experts' spans, the longest first, so that no long one is started last and waited for.

    Args:
        with_empty: keep the experts without pairs, whose gradients must be written as zeros.

    Returns:
        [experts, 3]: expert, first pair, number of pairs.
    """
    counts = np.asarray(counts_L, dtype=np.int64)
    table = np.stack([np.arange(len(counts)), np.cumsum(counts) - counts, counts], axis=1)
    table = table[np.argsort(-counts, kind="stable")]
    return (table if with_empty else table[table[:, 2] > 0]).astype(np.int32)


def upload(tables: Sequence[NDArray[np.int32]], device: torch.device) -> list[Tensor]:
    """Bring the tables to the device in one copy, for which neither side waits."""
    joined = torch.from_numpy(np.concatenate(tables))
    if device.type == "cuda":
        joined = joined.pin_memory().to(device, non_blocking=True)
    return list(joined.split([len(table) for table in tables]))
