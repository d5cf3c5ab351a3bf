"""Sum the pairs' results of each row in a fixed order and without atomics: a sort by row, then one program a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ds_remoe.kernels import grouped_swiglu_triton_kernels as kernels
from ds_remoe.kernels.backend import on_its_device

MAX_BLOCK = 1024


@dataclass(frozen=True)
class RowSegments:
    """The pairs, row by row.

    Attributes:
        pairs_M: pair ids ordered by row, those of a row in the order of the pairs.
        starts_R1: index of each row's first entry there, and M at the end.
    """

    pairs_M: Tensor
    starts_R1: Tensor

    @classmethod
    def of(cls, row_ids_M: Tensor, num_rows: int) -> RowSegments:
        """Group pairs by row, on their device and without a read from it."""
        sorted_M, pairs_M = torch.sort(row_ids_M.to(torch.int32), stable=True)
        rows = torch.arange(num_rows + 1, dtype=torch.int32, device=row_ids_M.device)
        return cls(pairs_M, torch.searchsorted(sorted_M, rows))


@on_its_device
def add_segments(pair_rows_MD: Tensor, segments: RowSegments, out_RD: Tensor) -> None:
    """out[r] += Σ over the pairs m of r of pair_rows[m], in the order of the pairs and in fp32."""
    num_rows, width = out_RD.shape
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    kernels.add_segments[(num_rows, triton.cdiv(width, block))](
        pair_rows_MD, segments.pairs_M, segments.starts_R1, out_RD, width, BLOCK=block
    )
