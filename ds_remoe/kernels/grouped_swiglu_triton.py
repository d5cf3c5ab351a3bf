"""Grouped SwiGLU in Triton: the implementation of ds_remoe.kernels.grouped_swiglu for a GPU.

Forward is a grouped GEMM over gathered rows with SwiGLU and routing weight in its epilogue, the down projection pair by
pair, and a sum per row. Backward is one grouped GEMM up to the pre-activation's gradient, the two weight gradients, and
a grouped GEMM with a sum per row for the rows' gradient. Any counts go, and any D and H; no sum uses atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ds_remoe.kernels import grouped_swiglu_triton_kernels as kernels
from ds_remoe.kernels.grouped_swiglu_triton_schedule import expert_table, tile_rows, tile_table, upload
from ds_remoe.kernels.grouped_swiglu_triton_tuning import MIN_BLOCK_N, dot_precision
from ds_remoe.kernels.pair_groups import PairGroups
from ds_remoe.kernels.row_sums_triton import sum_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward(
    rows: Tensor, groups: PairGroups, gate_up: Tensor, down: Tensor, out: Tensor, accumulate: bool = False
) -> Tensor:
    """See ds_remoe.kernels.grouped_swiglu.forward.

    Raises:
        TypeError: the tensors differ in dtype, or the kernels do not know it.
        ValueError: `out` is not contiguous.
    """
    _check_dtypes(rows=rows, gate_up=gate_up, down=down)
    _check_contiguous(out=out)
    pairs, (width, hidden_size) = groups.weights_M.shape[0], (down.shape[2], down.shape[1])
    pre_activation = rows.new_empty(pairs, 2 * width)
    if pairs == 0:
        if not accumulate:
            out.zero_()
        return pre_activation
    height = tile_rows(groups.counts_L, rows.dtype)
    with torch.cuda.device_of(rows):
        (tiles,) = upload([tile_table(groups.counts_L, height)], rows.device)
        hidden = rows.new_empty(pairs, width)
        _launch_swiglu(rows, groups, gate_up, pre_activation, hidden, tiles, height)
        results = rows.new_empty(pairs, hidden_size)
        kernels.pair_matmul[_grid(tiles, hidden_size)](
            hidden,
            down.contiguous(),
            results,
            tiles,
            hidden_size,
            width,
            width,
            1,
            BLOCK_M=height,
            PRECISION=dot_precision(rows.dtype),
        )
        sum_rows(results, groups.in_order(len(out)), out, accumulate)
    return pre_activation


def up_projection(rows: Tensor, groups: PairGroups, gate_up: Tensor) -> Tensor:
    """See ds_remoe.kernels.grouped_swiglu.up_projection.

    Raises:
        TypeError: the tensors differ in dtype, or the kernels do not know it.
    """
    _check_dtypes(rows=rows, gate_up=gate_up)
    pre_activation = rows.new_empty(groups.weights_M.shape[0], gate_up.shape[1])
    if len(pre_activation):
        height = tile_rows(groups.counts_L, rows.dtype)
        with torch.cuda.device_of(rows):
            (tiles,) = upload([tile_table(groups.counts_L, height)], rows.device)
            _launch_swiglu(rows, groups, gate_up, pre_activation, None, tiles, height)
    return pre_activation


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
    """See ds_remoe.kernels.grouped_swiglu.backward.

    Raises:
        TypeError: the tensors differ in dtype, or the kernels do not know it.
        ValueError: a tensor to be written is not contiguous.
    """
    _check_dtypes(grad_out=grad_out, rows=rows, gate_up=gate_up, down=down, pre_activation=pre_activation)
    _check_contiguous(grad_rows=grad_rows, grad_gate_up=grad_gate_up, grad_down=grad_down)
    pairs, (width, hidden_size) = groups.weights_M.shape[0], (down.shape[2], down.shape[1])
    if pairs == 0:
        if not accumulate_rows:
            grad_rows.zero_()
        if not accumulate_weights:
            grad_gate_up.zero_()
            grad_down.zero_()
        return torch.zeros_like(groups.weights_M)
    grad_out, rows, pre_activation = grad_out.contiguous(), rows.contiguous(), pre_activation.contiguous()
    gate_up, down = gate_up.contiguous(), down.contiguous()
    row_ids_M = groups.row_ids_M.contiguous()
    height, precision = tile_rows(groups.counts_L, rows.dtype), dot_precision(rows.dtype)
    with torch.cuda.device_of(rows):
        tiles, experts = upload(
            [tile_table(groups.counts_L, height), expert_table(groups.counts_L, with_empty=not accumulate_weights)],
            rows.device,
        )
        grad_pre, hidden = torch.empty_like(pre_activation), rows.new_empty(pairs, width)
        weight_parts = torch.empty(triton.cdiv(width, MIN_BLOCK_N), pairs, dtype=torch.float32, device=rows.device)
        kernels.swiglu_backward[_grid(tiles, width)](
            grad_out,
            row_ids_M,
            groups.weights_M.contiguous(),
            down,
            pre_activation,
            grad_pre,
            hidden,
            weight_parts,
            tiles,
            pairs,
            hidden_size,
            width,
            BLOCK_M=height,
            PRECISION=precision,
        )
        written = triton.cdiv(width, kernels.swiglu_backward.best_config.kwargs["BLOCK_N"])
        grad_weights_M = weight_parts[:written].sum(dim=0).to(groups.weights_M.dtype)
        _add_weight_gradient(grad_out, hidden, row_ids_M, grad_down, experts, True, accumulate_weights)
        _add_weight_gradient(grad_pre, rows, row_ids_M, grad_gate_up, experts, False, accumulate_weights)
        # One pair's hidden and its gradient of the row never lie in memory together.
        del hidden, weight_parts
        results = rows.new_empty(pairs, hidden_size)
        kernels.pair_matmul[_grid(tiles, hidden_size)](
            grad_pre,
            gate_up,
            results,
            tiles,
            hidden_size,
            2 * width,
            1,
            hidden_size,
            BLOCK_M=height,
            PRECISION=precision,
        )
        sum_rows(results, groups.in_order(len(grad_rows)), grad_rows, accumulate_rows)
    return grad_weights_M


def _launch_swiglu(
    rows: Tensor,
    groups: PairGroups,
    gate_up: Tensor,
    pre_activation: Tensor,
    hidden: Tensor | None,
    tiles: Tensor,
    height: int,
) -> None:
    kernels.swiglu_forward[_grid(tiles, gate_up.shape[1] // 2)](
        rows.contiguous(),
        groups.row_ids_M.contiguous(),
        groups.weights_M.contiguous(),
        gate_up.contiguous(),
        pre_activation,
        # In the place of no tensor one of the same dtype, which is part of the key: the same shape, so the same bits.
        pre_activation if hidden is None else hidden,
        tiles,
        gate_up.shape[2],
        gate_up.shape[1] // 2,
        BLOCK_M=height,
        STORE_HIDDEN=hidden is not None,
        PRECISION=dot_precision(rows.dtype),
    )


def _add_weight_gradient(
    left: Tensor, right: Tensor, row_ids_M: Tensor, grad: Tensor, experts: Tensor, gather_left: bool, accumulate: bool
) -> None:
    _, height, width = grad.shape

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (len(experts) * triton.cdiv(height, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"]),)

    kernels.weight_gradient[grid](
        left,
        right,
        row_ids_M,
        grad,
        experts,
        height,
        width,
        GATHER_LEFT=gather_left,
        ACCUMULATE=accumulate,
        PRECISION=dot_precision(left.dtype),
    )


def _grid(tiles: Tensor, columns: int) -> Any:
    return lambda meta: (len(tiles) * triton.cdiv(columns, meta["BLOCK_N"]),)


def _check_dtypes(**tensors: Tensor) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise TypeError(f"grouped SwiGLU in Triton: {found}; must all be one of bfloat16, float16 and float32")


def _check_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: must be contiguous, as it is written in place")
