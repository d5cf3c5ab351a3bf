"""SwiGLU with the routing weight folded in: y = w · silu(gate) · up, one pass over memory each way.

The weight multiplies the hidden activation before the down projection (down(w·h) = w·down(h) for a projection without
bias), so the expert's output need not be kept for the weight's gradient.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_remoe.kernels.backend import use_triton


def weighted_swiglu(gate_up_N2H: Tensor, weights_N: Tensor) -> Tensor:
    """w · silu(gate) · up.

    Args:
        gate_up_N2H: gate and up side by side, [N, 2H], any floating dtype.
        weights_N: routing weights, [N], fp32 or wider.

    Returns:
        [N, H] in the dtype of gate_up_N2H; the product is taken in the wider of the two dtypes.
    """
    if use_triton(gate_up_N2H):
        return _triton().forward(gate_up_N2H, weights_N)
    return torch_weighted_swiglu(gate_up_N2H, weights_N)


def weighted_swiglu_backward(grad_NH: Tensor, gate_up_N2H: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `weighted_swiglu`, with the forward value beside them for the down projection's weight gradient.

    Returns:
        grad of gate_up [N, 2H], grad of the weights [N], and w · silu(gate) · up [N, H] recomputed.
    """
    if use_triton(gate_up_N2H):
        return _triton().backward(grad_NH, gate_up_N2H, weights_N)
    return torch_weighted_swiglu_backward(grad_NH, gate_up_N2H, weights_N)


def torch_weighted_swiglu(gate_up_N2H: Tensor, weights_N: Tensor) -> Tensor:
    """The plain-torch twin of the Triton kernel."""
    gate, up = gate_up_N2H.chunk(2, dim=-1)
    if gate_up_N2H.dtype == weights_N.dtype:
        return F.silu(gate).mul_(up).mul_(weights_N.unsqueeze(-1))
    wide = weights_N.dtype
    return F.silu(gate.to(wide)).mul_(up).mul_(weights_N.unsqueeze(-1)).to(gate_up_N2H.dtype)


def torch_weighted_swiglu_backward(
    grad_NH: Tensor, gate_up_N2H: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain-torch twin of the Triton kernel."""
    dtype, wide = gate_up_N2H.dtype, weights_N.dtype
    gate, up = gate_up_N2H.to(wide).chunk(2, dim=-1)
    grad = grad_NH.to(wide)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * up
    grad_weights_N = torch.einsum("nh,nh->n", grad, hidden)
    weighted_grad = grad * weights_N.unsqueeze(-1)
    grad_gate_up = torch.empty_like(gate_up_N2H)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    grad_up.copy_(weighted_grad * silu)
    grad_gate.copy_(weighted_grad.mul_(up).mul_(torch.addcmul(sigmoid, silu, 1 - sigmoid)))
    return grad_gate_up, grad_weights_N, hidden.mul_(weights_N.unsqueeze(-1)).to(dtype)


@functools.cache
def _triton() -> ModuleType:
    from ds_remoe.kernels import swiglu_triton

    return swiglu_triton
