"""RMSNorm: torch's own, and on the CPU a C++ kernel, where torch composes it of some twenty passes over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_remoe.kernels.cpu_library import serves
from ds_remoe.kernels.first_order import first_order


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467): [..., D].

    Args:
        x: [..., D], any floating dtype.
        weight: [D].
        eps: added to the mean square.
    """
    # The compiler cannot look into the kernel, and fuses the passes of torch's own.
    if not torch.compiler.is_compiling() and serves(x, weight):
        normed: Tensor = _RMSNorm.apply(x, weight, eps)
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one factor a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, factors = torch.ops.ds_remoe.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, factors)
        result: Tensor = y
        return result

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight = torch.ops.ds_remoe.rms_norm_backward(grads[0].contiguous(), *ctx.saved_tensors)
        return grad_x, grad_weight, None
