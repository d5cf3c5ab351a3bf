# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel that sums the pairs' results of each row in the pairs' order, without atomics: one program a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_remoe.kernels.backend import on_its_device
from ds_remoe.kernels.pair_groups import RowOrder

MAX_BLOCK = 1024


@triton.jit
def _is_of_call(pair, first, count):
    return (pair >= first) & (pair < first + count)


@triton.jit(do_not_specialize=["first", "count"])
def _sum_kernel(pair_rows, pairs, starts, out, first, count, width, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = out + row * width + column
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if ACCUMULATE:
        wanted = 0
        for index in range(start, end):
            wanted += _is_of_call(tl.load(pairs + index), first, count).to(tl.int32)
        if wanted == 0:
            return
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for index in range(start, end):
        pair = tl.load(pairs + index)
        if _is_of_call(pair, first, count):
            value = tl.load(pair_rows + (pair - first).to(tl.int64) * width + column, mask=inside, other=0.0)
            total += value.to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@on_its_device
def sum_rows(pair_rows_MD: Tensor, order: RowOrder, out_RD: Tensor, accumulate: bool) -> None:
    """out[r] = Σ over the pairs m of r of pair_rows[m], in fp32.

    Args:
        pair_rows_MD: results of the pairs from `order.first` on, contiguous.
        order: of all pairs.
        out_RD: contiguous.
        accumulate: add to what is there; else rows without pairs become zeros.
    """
    num_rows, width = out_RD.shape
    if out_RD.numel() == 0:
        return
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    _sum_kernel[(num_rows, triton.cdiv(width, block))](
        pair_rows_MD,
        order.pairs_M,
        order.starts,
        out_RD,
        order.first,
        len(pair_rows_MD),
        width,
        ACCUMULATE=accumulate,
        BLOCK=block,
    )
