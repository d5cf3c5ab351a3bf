"""The C++ kernel of ds_remoe.kernels.grouped_swiglu: fp32 and fp64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_remoe.kernels import cpu_library
from ds_remoe.kernels.pair_groups import PairGroups


def serves(rows: Tensor, groups: PairGroups) -> bool:
    """True where the kernel can run: CPU tensors, fp32 or fp64 throughout, and a compiler that made it."""
    return cpu_library.serves(rows, groups.weights_M)


def forward(
    rows: Tensor, groups: PairGroups, gate_up: Tensor, down: Tensor, out: Tensor, accumulate: bool = False
) -> Tensor:
    """See ds_remoe.kernels.grouped_swiglu.forward."""
    return torch.ops.ds_remoe.grouped_swiglu(
        rows.contiguous(),
        groups.row_ids_M.long().contiguous(),
        groups.weights_M.contiguous(),
        groups.counts_L,
        gate_up.contiguous(),
        down.contiguous(),
        out,
        accumulate,
    )


def up_projection(rows: Tensor, groups: PairGroups, gate_up: Tensor) -> Tensor:
    """See ds_remoe.kernels.grouped_swiglu.up_projection."""
    return torch.ops.ds_remoe.grouped_up_projection(
        rows.contiguous(), groups.row_ids_M.long().contiguous(), groups.counts_L, gate_up.contiguous()
    )


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
    """See ds_remoe.kernels.grouped_swiglu.backward."""
    return torch.ops.ds_remoe.grouped_swiglu_backward(
        grad_out.contiguous(),
        rows.contiguous(),
        groups.row_ids_M.long().contiguous(),
        groups.weights_M.contiguous(),
        groups.counts_L,
        gate_up.contiguous(),
        down.contiguous(),
        pre_activation,
        grad_rows,
        grad_gate_up,
        grad_down,
        accumulate_rows,
        accumulate_weights,
    )
