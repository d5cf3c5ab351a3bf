"""What the rivals of the layer benchmark have in common.

Every rival computes a MoE layer's output for one `Case`, with the same weights and the same given routing; what it
needs to turn that routing into a dispatch is its own business and is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ds_remoe.bench.workloads import Workload
from ds_remoe.moe.experts import SwiGLU

ExpertGradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of one expert's gate [H, D], up [H, D] and down [D, H]; None stands for zero."""


class LeftOut(Exception):
    """A rival does not take part in a case; the message says why."""


@dataclass(frozen=True)
class Case:
    """What the rivals of one workload share, on the device.

    Attributes:
        workload: sizes and routing.
        x_TD: tokens, a leaf with gradient.
        scores_ET: the workload's scores, fp32, a leaf with gradient; the routing weights under the mask. They lie
            expert-major in memory, as a ReLU router gives them.
        mask_TE: bool, a transposed view likewise.
        grad_TD: gradient of the output.
        gate_up: experts' gate above up, [E, 2H, D].
        down: [E, D, H].
        router_ED: a router weight with x_TD · router_ED^T = scores_TE, None where E > D leaves no such weight.
    """

    workload: Workload
    x_TD: Tensor
    scores_ET: Tensor
    mask_TE: Tensor
    grad_TD: Tensor
    gate_up: Tensor
    down: Tensor
    router_ED: Tensor | None

    @property
    def width(self) -> int:
        return self.workload.expert_width

    @property
    def scores_TE(self) -> Tensor:
        """A view of scores_ET, with gradient."""
        return self.scores_ET.t()


def make_case(workload: Workload, device: torch.device, dtype: torch.dtype, seed: int) -> Case:
    """Draw tokens and weights for a workload."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width, experts = workload.hidden_size, workload.expert_width, workload.num_experts
    x_TD = torch.randn(workload.tokens, hidden, generator=generator)
    grad_TD = torch.randn(workload.tokens, hidden, generator=generator)
    router_ED = None
    if experts <= hidden:
        # Orthonormal rows, so that moving x within their span gives the router the scores as its logits.
        router_ED = torch.linalg.qr(torch.randn(hidden, experts, generator=generator)).Q.t().contiguous()
        x_TD += (workload.scores_TE - x_TD @ router_ED.t()) @ router_ED
    device_generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        bound = shape[-1] ** -0.5
        return torch.empty(shape, dtype=dtype, device=device).uniform_(-bound, bound, generator=device_generator)

    return Case(
        workload=workload,
        x_TD=x_TD.to(device, dtype).requires_grad_(),
        scores_ET=workload.scores_TE.t().contiguous().to(device, copy=True).requires_grad_(),
        mask_TE=workload.mask_TE.t().contiguous().to(device).t(),
        grad_TD=grad_TD.to(device, dtype),
        gate_up=draw(experts, 2 * width, hidden),
        down=draw(experts, hidden, width),
        router_ED=None if router_ED is None else router_ED.to(device, dtype),
    )


@dataclass(frozen=True)
class Result:
    """What one forward and backward pass gives.

    Attributes:
        output_TD: the layer's output.
        grad_x_TD: gradient of the tokens.
        grad_routing: gradient of what the rival takes the routing weights from.
        grad_experts: those of each expert.
    """

    output_TD: Tensor
    grad_x_TD: Tensor
    grad_routing: Tensor
    grad_experts: list[ExpertGradients]


class Rival(nn.Module):
    """One implementation of the layer, bound to its case; its parameters are the case's weights.

    Attributes:
        computes_the_layer: False for the dense FFNs, whose output is another function's.
    """

    computes_the_layer: ClassVar[bool] = True

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self) -> Tensor:
        """One forward pass over the case's tokens: [T, D]."""
        raise TypeError(f"{type(self).__name__} is a base class")

    def backward(self, output_TD: Tensor) -> None:
        """One backward pass."""
        output_TD.backward(self.case.grad_TD)

    def flops(self, passes: int) -> int:
        """FLOPs of the matrix products: `passes` is 1 for forward, 3 for forward and backward."""
        return self.case.workload.flops(passes)

    def clear(self) -> None:
        """Free all gradients."""
        for tensor in (self.case.x_TD, self.case.scores_ET, *self.parameters()):
            tensor.grad = None

    def result(self) -> Result:
        """One forward and backward pass, its gradients taken out."""
        output_TD = self()
        self.backward(output_TD)
        grad_x_TD = self.case.x_TD.grad
        assert grad_x_TD is not None
        result = Result(output_TD.detach(), grad_x_TD, self.routing_gradient(), self.expert_gradients())
        self.clear()
        return result

    def routing_gradient(self) -> Tensor:
        """Gradient of what the rival takes the routing weights from: of the scores, [T, E]."""
        grad_ET = self.case.scores_ET.grad
        assert grad_ET is not None
        return grad_ET.t()

    def expert_gradients(self) -> list[ExpertGradients]:
        """See Result.grad_experts."""
        raise TypeError(f"{type(self).__name__} has no experts")

    def expected(self, ours: Result) -> Result:
        """What `result` must be, given ours."""
        return ours


RivalFactory = Callable[[Case], Rival]


def list_pairs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Active pairs by expert: token ids [N], weights [N] with gradient, counts [E]."""
    mask_ET = case.mask_TE.t()
    return mask_ET.nonzero()[:, 1], case.scores_ET.masked_select(mask_ET), case.mask_TE.sum(dim=0)


def add_weighted(case: Case, results_ND: Tensor, token_ids_N: Tensor, weights_N: Tensor) -> Tensor:
    """Σ over a token's pairs of weight · result: [T, D]."""
    weighted_ND = results_ND * weights_N.unsqueeze(1).to(results_ND.dtype)
    return torch.zeros_like(case.x_TD).index_add_(0, token_ids_N, weighted_ND)


def separate_experts(case: Case) -> nn.ModuleList:
    """One SwiGLU module an expert, over the case's weights without a copy."""
    experts = nn.ModuleList()
    for gate_up, down in zip(case.gate_up, case.down, strict=True):
        with torch.device("meta"):
            expert = SwiGLU(case.workload.hidden_size, case.width)
        expert.gate_proj.weight = nn.Parameter(gate_up[: case.width])
        expert.up_proj.weight = nn.Parameter(gate_up[case.width :])
        expert.down_proj.weight = nn.Parameter(down)
        experts.append(expert)
    return experts


def separate_gradients(experts: nn.ModuleList) -> list[ExpertGradients]:
    """Gradients of `separate_experts`."""
    modules = (cast(SwiGLU, expert) for expert in experts)
    return [(e.gate_proj.weight.grad, e.up_proj.weight.grad, e.down_proj.weight.grad) for e in modules]


def stacked_gradients(gate_up: Tensor | None, down: Tensor | None, width: int) -> list[ExpertGradients]:
    """Gradients of stacked experts, expert by expert."""
    assert gate_up is not None
    assert down is not None
    return [(g[:width], g[width:], d) for g, d in zip(gate_up, down, strict=True)]
