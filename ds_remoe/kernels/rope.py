"""Rotary positions: plain torch, and on the CPU a C++ kernel that passes over memory once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_remoe.kernels.cpu_library import serves
from ds_remoe.kernels.first_order import first_order


def rotate(x_BHSh: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + h/2) of each head by its position's angles (arXiv 2104.09864), in fp32 or wider.

    Args:
        x_BHSh: any floating dtype and strides.
        cos, sin: fp32 [S, h/2].

    Returns:
        [B, H, S, h] in the dtype of the input.
    """
    # The compiler cannot look into the kernel, and fuses the passes of the twin.
    if not torch.compiler.is_compiling() and x_BHSh.stride(-1) == 1 and serves(x_BHSh):
        rotated: Tensor = _Rotate.apply(x_BHSh, *(table.to(x_BHSh.dtype).contiguous() for table in (cos, sin)))
        return rotated
    return torch_rotate(x_BHSh, cos, sin)


def torch_rotate(x_BHSh: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain-torch twin."""
    wide = x_BHSh.to(torch.promote_types(x_BHSh.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BHSh.dtype)


class _Rotate(torch.autograd.Function):
    """The result and the gradient lie in memory as the input does, so that no later step copies them into order."""

    @staticmethod
    def forward(ctx: Any, x_BHSh: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty_like(x_BHSh)
        torch.ops.ds_remoe.rotate(x_BHSh, cos, sin, False, out)
        ctx.save_for_backward(cos, sin)
        ctx.strides = out.stride()
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        out = torch.empty_strided(grad.shape, ctx.strides, dtype=grad.dtype, device=grad.device)
        torch.ops.ds_remoe.rotate(grad, *ctx.saved_tensors, True, out)
        return out, None, None
