"""Which pairs go to which expert: the argument that all grouped kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PairGroups:
    """Active (row, local expert) pairs, grouped by expert.

    Attributes:
        in_row_ids_M: integer, row of `rows` of each pair.
        out_row_ids_M: integer, row of the result of each pair.
        weights_M: routing weights, fp32 or wider.
        counts_L: pairs of each local expert, on the host; their sum is M.
    """

    in_row_ids_M: Tensor
    out_row_ids_M: Tensor
    weights_M: Tensor
    counts_L: list[int]

    def spans(self) -> Iterator[tuple[int, slice]]:
        """(expert, its pairs) of each expert that has pairs."""
        start = 0
        for expert, count in enumerate(self.counts_L):
            if count:
                yield expert, slice(start, start + count)
            start += count
