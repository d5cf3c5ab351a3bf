"""Gradients of gradients are refused wherever a backward pass of ds_remoe has no derivative."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ds_remoe.kernels
import ds_remoe.model
import ds_remoe.moe
from ds_remoe import MoE, SwiGLU
from ds_remoe.kernels.rms_norm import rms_norm
from ds_remoe.kernels.rope import rotate
from ds_remoe.model.loss import head_loss

D = 4
REFUSED = r"create_graph=True: ds_remoe's \w+ has first derivatives alone"
CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "stacked experts": lambda x: MoE(D, SwiGLU(D, 3), num_experts=2).eval()(x)[0].sum(),
    "any experts": lambda x: MoE(D, nn.Linear(D, D), num_experts=2).eval()(x)[0].sum(),
    "topk": lambda x: MoE(D, SwiGLU(D, 3), num_experts=2, router="topk").eval()(x)[0].sum(),
    "auxiliary loss": lambda x: MoE(D, SwiGLU(D, 3), num_experts=2).eval()(x)[1],
    "head and loss": lambda x: head_loss(x, torch.ones(7, D), torch.zeros(2, 3, dtype=torch.int64)),
    "norm": lambda x: rms_norm(x, torch.ones(D), 1e-5).sum(),
    "positions": lambda x: rotate(x.unsqueeze(0), torch.ones(3, D // 2), torch.zeros(3, D // 2)).sum(),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sum_s_gradient_is_not_differentiated_in_silence(case: str) -> None:
    """The gradient that comes into the backward pass is a constant here, for which torch raises nothing."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, D, requires_grad=True)
    value = CASES[case](x)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(value, x, create_graph=True)
    torch.autograd.grad(CASES[case](x), x)


def test_every_function_refuses() -> None:
    """Also those that need several ranks."""
    for package in (ds_remoe.kernels, ds_remoe.moe, ds_remoe.model):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "triton" not in module.name:  # those read TRITON_INTERPRET when they are imported
                importlib.import_module(module.name)
    functions = [f for f in torch.autograd.Function.__subclasses__() if f.__module__.startswith("ds_remoe.")]
    assert len(functions) >= 11
    for function in functions:
        with pytest.raises(RuntimeError, match="create_graph=True"):
            function.backward(None)
