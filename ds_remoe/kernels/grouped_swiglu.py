"""Grouped SwiGLU: every expert's FFN over its own pairs, results summed per row.

For the pairs m of expert e: out[row[m]] += w[m] · FFN_e(rows[row[m]]). The pairs stand expert by expert; any count
goes, none included. Three implementations stand behind `forward` and `backward`: Triton kernels on a GPU, a C++
kernel on the CPU, and the plain-torch twin, against which both are tested.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ds_remoe.kernels import grouped_swiglu_cpu
from ds_remoe.kernels.backend import use_triton
from ds_remoe.kernels.pair_groups import PairGroups, RowOrder, sum_buffer, sum_dtype
from ds_remoe.kernels.swiglu import weighted_swiglu, weighted_swiglu_backward


def forward(
    rows: Tensor, groups: PairGroups, gate_up: Tensor, down: Tensor, out: Tensor, accumulate: bool = False
) -> Tensor:
    """Sum every pair's weighted result into its row of `out`, in fp32 or wider.

    Args:
        rows: [M_rows, D].
        groups: the pairs.
        gate_up: [L, 2H, D], gate above up.
        down: [L, D, H].
        out: [M_rows, D]; to accumulate, fp32 or wider.
        accumulate: add to what is in `out`; else it is overwritten, where a row has no pairs with zeros.

    Returns:
        pre_activation [M, 2H] in the dtype of `rows`, which `backward` takes.
    """
    kernel = _kernel(rows, groups)
    if kernel is not None:
        pre_activation: Tensor = kernel.forward(rows, groups, gate_up, down, out, accumulate)
        return pre_activation
    return torch_forward(rows, groups, gate_up, down, out, accumulate)


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
    accumulate_rows: bool = False,
    accumulate_weights: bool = False,
) -> Tensor:
    """Gradients of `forward`, deterministic.

    Args:
        grad_out: [M_rows, D], gradient of the result.
        pre_activation: what `forward` returned.
        grad_rows: [M_rows, D]; to accumulate, fp32 or wider.
        grad_gate_up, grad_down: as gate_up and down; experts without pairs get zeros.
        accumulate_rows: add to what is in grad_rows instead of overwriting it.
        accumulate_weights: the same for grad_gate_up and grad_down.

    Returns:
        gradient of the routing weights, [M].
    """
    kernel = _kernel(rows, groups)
    function = torch_backward if kernel is None else kernel.backward
    grad_weights_M: Tensor = function(
        grad_out,
        rows,
        groups,
        gate_up,
        down,
        pre_activation,
        grad_rows,
        grad_gate_up,
        grad_down,
        accumulate_rows,
        accumulate_weights,
    )
    return grad_weights_M


def row_order(rows: Tensor, groups: PairGroups) -> RowOrder | None:
    """The order that `forward` and `backward` sum these pairs in; None where the implementation has no use for it."""
    return groups.in_order(rows.shape[0]) if use_triton(rows) else None


def new_sums(rows: Tensor, calls: int) -> Tensor:
    """An unwritten tensor for the sums of some calls of `forward` or `backward`, of the shape of `rows`.

    It is wider than the rows where it is added into: by the second call, or by the twin, expert by expert.
    """
    written_once = calls == 1 and use_triton(rows)
    return rows.new_empty(rows.shape, dtype=rows.dtype if written_once else sum_dtype(rows))


def _kernel(rows: Tensor, groups: PairGroups) -> ModuleType | None:
    """The implementation that serves these tensors; None for the twin."""
    if use_triton(rows):
        return _gpu()
    return grouped_swiglu_cpu if grouped_swiglu_cpu.serves(rows, groups) else None


@functools.cache
def _gpu() -> ModuleType:
    from ds_remoe.kernels import grouped_swiglu_gpu

    return grouped_swiglu_gpu


def torch_forward(
    rows: Tensor, groups: PairGroups, gate_up: Tensor, down: Tensor, out: Tensor, accumulate: bool = False
) -> Tensor:
    """The plain-torch twin: one GEMM per expert and projection."""
    total = sum_buffer(out, accumulate)
    pre_activation = torch_up_projection(rows, groups, gate_up)
    for e, span in groups.spans():
        hidden = weighted_swiglu(pre_activation[span], groups.weights_M[span])
        total.index_add_(0, groups.row_ids_M[span], (hidden @ down[e].t()).to(total.dtype))
    if total is not out:
        out.copy_(total)
    return pre_activation


def torch_up_projection(rows: Tensor, groups: PairGroups, gate_up: Tensor) -> Tensor:
    """The plain-torch twin."""
    pre_activation = rows.new_empty(len(groups.row_ids_M), gate_up.shape[1])
    for e, span in groups.spans():
        torch.mm(rows.index_select(0, groups.row_ids_M[span]), gate_up[e].t(), out=pre_activation[span])
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
    accumulate_rows: bool = False,
    accumulate_weights: bool = False,
) -> Tensor:
    """The plain-torch twin."""
    total = sum_buffer(grad_rows, accumulate_rows)
    grad_weights_M = torch.empty_like(groups.weights_M)
    beta = 1 if accumulate_weights else 0
    if not accumulate_weights:
        for e, count in enumerate(groups.counts_L):
            if count == 0:
                grad_gate_up[e].zero_()
                grad_down[e].zero_()
    for e, span in groups.spans():
        ids = groups.row_ids_M[span]
        grad_y = grad_out.index_select(0, ids)
        grad_pre, grad_weights_M[span], hidden = weighted_swiglu_backward(
            grad_y @ down[e], pre_activation[span], groups.weights_M[span]
        )
        grad_down[e].addmm_(grad_y.t(), hidden, beta=beta)
        grad_gate_up[e].addmm_(grad_pre.t(), rows.index_select(0, ids), beta=beta)
        total.index_add_(0, ids, (grad_pre @ gate_up[e]).to(total.dtype))
    if total is not grad_rows:
        grad_rows.copy_(total)
    return grad_weights_M
