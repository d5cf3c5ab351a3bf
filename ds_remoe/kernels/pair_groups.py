"""What all grouped kernels share: which pairs go to which expert, which belong to a row, and how rows are summed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowOrder:
    """The pairs row by row, for sums over the pairs of a row.

    Attributes:
        pairs_M: int32, indices into the list of pairs, sorted by row; those of a row keep the list's order.
        starts: int32 [M_rows + 1], where each row's pairs start there, and their number.
        first: where in the list a call begins that gets a part of it, while this order is of the whole list.
    """

    pairs_M: Tensor
    starts: Tensor
    first: int = 0

    @classmethod
    def of(cls, row_ids_M: Tensor, num_rows: int) -> RowOrder:
        """By a sort on the pairs' device, without a read from it."""
        sorted_M, pairs_M = torch.sort(row_ids_M.to(torch.int32), stable=True)
        rows = torch.arange(num_rows + 1, dtype=torch.int32, device=row_ids_M.device)
        return cls(pairs_M.to(torch.int32), torch.searchsorted(sorted_M, rows, out_int32=True))


@dataclass(frozen=True)
class PairGroups:
    """Active (row, local expert) pairs, grouped by expert.

    Attributes:
        row_ids_M: integer, row of each pair, in the tokens and in the result.
        weights_M: routing weights, fp32 or wider.
        counts_L: pairs of each local expert, on the host; their sum is M.
        order: the same pairs row by row; None where nobody made it yet.
    """

    row_ids_M: Tensor
    weights_M: Tensor
    counts_L: list[int]
    order: RowOrder | None = None

    def in_order(self, num_rows: int) -> RowOrder:
        """`order`, made now where nobody did."""
        return self.order or RowOrder.of(self.row_ids_M, num_rows)

    def spans(self) -> Iterator[tuple[int, slice]]:
        """(expert, its pairs) of each expert that has pairs."""
        start = 0
        for expert, count in enumerate(self.counts_L):
            if count:
                yield expert, slice(start, start + count)
            start += count


def sum_dtype(rows: Tensor) -> torch.dtype:
    """Sums over the pairs of a row are in fp32 at least."""
    return torch.promote_types(rows.dtype, torch.float32)


def sum_buffer(target: Tensor, accumulate: bool) -> Tensor:
    """What to add into: `target`, set to zero unless it accumulates, or zeros of a wider dtype, to be copied back."""
    if accumulate:
        return target
    dtype = sum_dtype(target)
    return target.zero_() if target.dtype == dtype else torch.zeros_like(target, dtype=dtype)
