"""Grouped SwiGLU by torch's grouped_mm: rows copied in pair order, SwiGLU a kernel of its own.

On Hopper and Blackwell torch has its own kernel for bf16; elsewhere a loop over the experts that reads their counts
back from the device. `ds-remoe bench kernels` tells where it is faster than ours.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_remoe.kernels.backend import use_triton
from ds_remoe.kernels.grouped_swiglu_triton_schedule import upload
from ds_remoe.kernels.pair_groups import PairGroups, sum_buffer
from ds_remoe.kernels.swiglu import weighted_swiglu, weighted_swiglu_backward

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16
"""Bytes that rows must be a multiple of."""


def why_not(rows: Tensor, gate_up: Tensor) -> str | None:
    """What keeps grouped_mm from serving these tensors; None if nothing does."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if rows.dtype not in DTYPES:
        return f"it does not take {rows.dtype}"
    for name, size in (("hidden size", gate_up.shape[2]), ("expert width", gate_up.shape[1] // 2)):
        if size * rows.element_size() % ALIGNMENT:
            return f"{name} {size} in {rows.dtype} is no multiple of {ALIGNMENT} bytes"
    return None


def forward(
    rows: Tensor, groups: PairGroups, gate_up: Tensor, down: Tensor, out: Tensor, accumulate: bool = False
) -> Tensor:
    """See ds_remoe.kernels.grouped_swiglu.forward; `why_not` must be None."""
    if len(groups.weights_M) == 0:
        if not accumulate:
            out.zero_()
        return rows.new_empty(0, gate_up.shape[1])
    ends_L = _ends(groups, rows.device)
    pre_activation = _up_projection(rows, groups, gate_up, ends_L)
    hidden = weighted_swiglu(pre_activation, groups.weights_M)
    _sum_rows(F.grouped_mm(hidden, down.transpose(1, 2), offs=ends_L), groups, out, accumulate)
    return pre_activation


def up_projection(rows: Tensor, groups: PairGroups, gate_up: Tensor) -> Tensor:
    """See ds_remoe.kernels.grouped_swiglu.up_projection; `why_not` must be None."""
    if len(groups.weights_M) == 0:
        return rows.new_empty(0, gate_up.shape[1])
    return _up_projection(rows, groups, gate_up, _ends(groups, rows.device))


def backward(
    grad_out: Tensor,
    rows: Tensor,
    groups: PairGroups,
    gate_up: Tensor,
    down: Tensor,
    pre_activation: Tensor,
    grad_rows: Tensor,
    grad_gate_up: Tensor,
    grad_down: Tensor,
    accumulate_rows: bool = False,
    accumulate_weights: bool = False,
) -> Tensor:
    """See ds_remoe.kernels.grouped_swiglu.backward; `why_not` must be None."""
    if len(groups.weights_M) == 0:  # CUDA's kernel refuses a sum over nothing (pytorch/pytorch 192497)
        if not accumulate_rows:
            grad_rows.zero_()
        if not accumulate_weights:
            grad_gate_up.zero_()
            grad_down.zero_()
        return torch.zeros_like(groups.weights_M)
    ends_L = _ends(groups, rows.device)
    grad_pair_out = grad_out.index_select(0, groups.row_ids_M)
    grad_hidden = F.grouped_mm(grad_pair_out, down, offs=ends_L)
    grad_pre, grad_weights_M, hidden = weighted_swiglu_backward(grad_hidden, pre_activation, groups.weights_M)
    _store(F.grouped_mm(grad_pair_out.t(), hidden, offs=ends_L), groups, grad_down, accumulate_weights)
    del grad_pair_out, grad_hidden, hidden
    pair_rows = rows.index_select(0, groups.row_ids_M)
    _store(F.grouped_mm(grad_pre.t(), pair_rows, offs=ends_L), groups, grad_gate_up, accumulate_weights)
    del pair_rows
    _sum_rows(F.grouped_mm(grad_pre, gate_up, offs=ends_L), groups, grad_rows, accumulate_rows)
    return grad_weights_M


def _up_projection(rows: Tensor, groups: PairGroups, gate_up: Tensor, ends_L: Tensor) -> Tensor:
    return F.grouped_mm(rows.index_select(0, groups.row_ids_M), gate_up.transpose(1, 2), offs=ends_L)


def _ends(groups: PairGroups, device: torch.device) -> Tensor:
    """First pair after each expert's, int32 as grouped_mm wants it."""
    return upload([np.cumsum(groups.counts_L, dtype=np.int32)], device)[0]


def _sum_rows(pair_rows: Tensor, groups: PairGroups, out: Tensor, accumulate: bool) -> None:
    """Sum in the order of the pairs; index_add_ keeps it on a CPU, not on a GPU."""
    if use_triton(pair_rows):
        from ds_remoe.kernels.row_sums_triton import sum_rows

        sum_rows(pair_rows, groups.in_order(len(out)), out, accumulate)
        return
    total = sum_buffer(out, accumulate)
    total.index_add_(0, groups.row_ids_M, pair_rows.to(total.dtype))
    if total is not out:
        out.copy_(total)


def _store(product: Tensor, groups: PairGroups, grad: Tensor, accumulate: bool) -> None:
    # Older releases of torch leave the product of an empty group as the memory was.
    for expert, count in enumerate(groups.counts_L):
        if count == 0:
            product[expert].zero_()
    grad.add_(product) if accumulate else grad.copy_(product)
