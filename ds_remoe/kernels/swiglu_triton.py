"""Triton kernels of ds_remoe.kernels.swiglu: one program a row, the row's width in blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_remoe.kernels.backend import on_its_device

MAX_BLOCK = 2048


@triton.jit
def _forward_kernel(gate_up, weights, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up * weight
        tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad, gate_up, weights, grad_gate_up, grad_weights, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        total += upstream * hidden
        weighted = upstream * weight
        grad_gate = weighted * up * (sigmoid + silu - silu * sigmoid)
        tl.store(grad_gate_up + row * 2 * width + column, grad_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
        tl.store(
            grad_gate_up + row * 2 * width + width + column,
            (weighted * silu).to(grad_gate_up.dtype.element_ty),
            mask=inside,
        )
        tl.store(out + row * width + column, (hidden * weight).to(out.dtype.element_ty), mask=inside)
    tl.store(grad_weights + row, tl.sum(total, axis=0))


@on_its_device
def forward(gate_up_N2H: Tensor, weights_N: Tensor) -> Tensor:
    """See ds_remoe.kernels.swiglu.weighted_swiglu."""
    rows, width = gate_up_N2H.shape[0], gate_up_N2H.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up_N2H.dtype, device=gate_up_N2H.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    _forward_kernel[(rows,)](gate_up_N2H.contiguous(), weights_N.contiguous(), out, width, BLOCK=block)
    return out


@on_its_device
def backward(grad_NH: Tensor, gate_up_N2H: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ds_remoe.kernels.swiglu.weighted_swiglu_backward."""
    rows, width = grad_NH.shape
    grad_NH, gate_up_N2H, weights_N = grad_NH.contiguous(), gate_up_N2H.contiguous(), weights_N.contiguous()
    grad_gate_up, grad_weights_N = torch.empty_like(gate_up_N2H), torch.empty_like(weights_N)
    out = torch.empty_like(grad_NH, dtype=gate_up_N2H.dtype)
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    _backward_kernel[(rows,)](
        grad_NH,
        gate_up_N2H,
        weights_N,
        grad_gate_up,
        grad_weights_N,
        out,
        width,
        BLOCK=block,
    )
    return grad_gate_up, grad_weights_N, out
