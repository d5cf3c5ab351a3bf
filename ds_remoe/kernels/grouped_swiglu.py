"""Grouped SwiGLU: every expert's FFN over its own pairs, results summed per row.

For the pairs m of expert e: out[out_row[m]] += w[m] · FFN_e(rows[in_row[m]]). The pairs stand expert by expert; any
count goes, none included. Three implementations stand behind `forward` and `backward`: Triton kernels on a GPU, a C++
kernel on the CPU, and the plain-torch twin, against which both are tested.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ds_remoe.kernels import grouped_swiglu_cpu
from ds_remoe.kernels.backend import use_triton
from ds_remoe.kernels.pair_groups import PairGroups
from ds_remoe.kernels.swiglu import weighted_swiglu, weighted_swiglu_backward


def forward(rows: Tensor, groups: PairGroups, gate_up: Tensor, down: Tensor, out: Tensor) -> Tensor:
    """Add every pair's weighted result to its row of `out`.

    Args:
        rows: [M_rows, D].
        groups: the pairs.
        gate_up: [L, 2H, D], gate above up.
        down: [L, D, H].
        out: [num_out_rows, D], fp32 or wider; added into.

    Returns:
        pre_activation [M, 2H] in the dtype of `rows`, which `backward` takes.
    """
    kernel = _kernel(rows, groups)
    if kernel is not None:
        pre_activation: Tensor = kernel.forward(rows, groups, gate_up, down, out)
        return pre_activation
    return torch_forward(rows, groups, gate_up, down, out)


def up_projection(rows: Tensor, groups: PairGroups, gate_up: Tensor) -> Tensor:
    """The pre-activation alone, the same bits as `forward` returns: [M, 2H]."""
    kernel = _kernel(rows, groups)
    if kernel is not None:
        pre_activation: Tensor = kernel.up_projection(rows, groups, gate_up)
        return pre_activation
    return torch_up_projection(rows, groups, gate_up)


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
    accumulate: bool = False,
) -> Tensor:
    """Gradients of `forward`, deterministic.

    Args:
        grad_out: [num_out_rows, D], gradient of the result.
        pre_activation: what `forward` returned.
        grad_rows: [M_rows, D], fp32 or wider; added into.
        grad_gate_up, grad_down: as gate_up and down; experts without pairs get zeros.
        accumulate: add into grad_gate_up and grad_down instead of overwriting them.

    Returns:
        gradient of the routing weights, [M].
    """
    arguments = (grad_out, rows, groups, gate_up, down, pre_activation, grad_rows, grad_gate_up, grad_down, accumulate)
    kernel = _kernel(rows, groups)
    if kernel is not None:
        grad_weights_M: Tensor = kernel.backward(*arguments)
        return grad_weights_M
    return torch_backward(*arguments)


def _kernel(rows: Tensor, groups: PairGroups) -> ModuleType | None:
    """The implementation that serves these tensors; None for the twin."""
    if use_triton(rows):
        return _gpu()
    return grouped_swiglu_cpu if grouped_swiglu_cpu.serves(rows, groups) else None


@functools.cache
def _gpu() -> ModuleType:
    from ds_remoe.kernels import grouped_swiglu_gpu

    return grouped_swiglu_gpu


def torch_forward(rows: Tensor, groups: PairGroups, gate_up: Tensor, down: Tensor, out: Tensor) -> Tensor:
    """The plain-torch twin: one GEMM per expert and projection."""
    pre_activation = torch_up_projection(rows, groups, gate_up)
    for e, span in groups.spans():
        hidden = weighted_swiglu(pre_activation[span], groups.weights_M[span])
        out.index_add_(0, groups.out_row_ids_M[span], (hidden @ down[e].t()).to(out.dtype))
    return pre_activation


def torch_up_projection(rows: Tensor, groups: PairGroups, gate_up: Tensor) -> Tensor:
    """The plain-torch twin."""
    pre_activation = rows.new_empty(len(groups.in_row_ids_M), gate_up.shape[1])
    for e, span in groups.spans():
        torch.mm(rows.index_select(0, groups.in_row_ids_M[span]), gate_up[e].t(), out=pre_activation[span])
    return pre_activation


def torch_backward(
    grad_out: Tensor,
    rows: Tensor,
    groups: PairGroups,
    gate_up: Tensor,
    down: Tensor,
    pre_activation: Tensor,
    grad_rows: Tensor,
    grad_gate_up: Tensor,
    grad_down: Tensor,
    accumulate: bool = False,
) -> Tensor:
    """The plain-torch twin."""
    grad_weights_M = torch.empty_like(groups.weights_M)
    beta = 1 if accumulate else 0
    if not accumulate:
        for e, count in enumerate(groups.counts_L):
            if count == 0:
                grad_gate_up[e].zero_()
                grad_down[e].zero_()
    for e, span in groups.spans():
        in_ids = groups.in_row_ids_M[span]
        grad_y = grad_out.index_select(0, groups.out_row_ids_M[span])
        grad_pre, grad_weights_M[span], hidden = weighted_swiglu_backward(
            grad_y @ down[e], pre_activation[span], groups.weights_M[span]
        )
        grad_down[e].addmm_(grad_y.t(), hidden, beta=beta)
        grad_gate_up[e].addmm_(grad_pre.t(), rows.index_select(0, in_ids), beta=beta)
        grad_rows.index_add_(0, in_ids, (grad_pre @ gate_up[e]).to(grad_rows.dtype))
    return grad_weights_M
