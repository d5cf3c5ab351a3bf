"""The MoE layer of this package as a rival: past its router, with it, and without its activation budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ds_remoe.bench.rivals import Case, ExpertGradients, LeftOut, Result, Rival, RivalFactory, stacked_gradients
from ds_remoe.moe.experts import StackedSwiGLU, SwiGLU
from ds_remoe.moe.layer import MoE
from ds_remoe.moe.routing import Routing
from ds_remoe.moe.sparsity import SparsityController

OURS = "ours"
WITH_ROUTER = "ours, with router"
WITHOUT_BUDGET = "ours, no budget"


class Ours(Rival):
    """`ds_remoe.MoE` past x W and the auxiliary loss: ReLU, compaction, dispatch, grouped experts and combine."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.layer = _layer(case)
        self.layer.deepspeed_moe.register_module("gate", _FixedRouter(case))

    def forward(self) -> Tensor:
        output_TD: Tensor = self.layer(self.case.x_TD)[0]
        return output_TD

    def expert_gradients(self) -> list[ExpertGradients]:
        stacked = _stacked(self.layer)
        return stacked_gradients(stacked.gate_up.grad, stacked.down.grad, self.case.width)


class OursWithoutBudget(Ours):
    """Nothing is recomputed in backward, where the layer by itself would."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        routed, workload = self.layer.deepspeed_moe, case.workload
        budget = routed.activation_budget
        if budget is None or workload.pairs <= budget * workload.k * workload.tokens:
            raise LeftOut("as ours: all pairs are within the budget")
        routed.activation_budget = None


class OursWithRouter(Ours):
    """The whole `ds_remoe.MoE`, with the routing drawn by its router, its statistics and its auxiliary loss."""

    def __init__(self, case: Case) -> None:
        if case.router_ED is None:
            raise LeftOut("no router gives this routing, as there are more experts than hidden dimensions")
        Rival.__init__(self, case)
        self.layer = _layer(case)
        self.layer.deepspeed_moe.gate.wg.weight = nn.Parameter(case.router_ED)
        self.controller = SparsityController(self.layer)
        self.aux_loss = case.grad_TD.new_zeros(())

    def forward(self) -> Tensor:
        output_TD, self.aux_loss, _ = self.layer(self.case.x_TD)
        return output_TD

    def backward(self, output_TD: Tensor) -> None:
        torch.autograd.backward([output_TD, self.aux_loss], [self.case.grad_TD, None])

    def clear(self) -> None:
        super().clear()
        self.aux_loss = self.aux_loss.detach()

    def routing_gradient(self) -> Tensor:
        grad_ED = self.layer.deepspeed_moe.gate.wg.weight.grad
        assert grad_ED is not None
        return grad_ED

    def expected(self, ours: Result) -> Result:
        """The routing weights' gradient goes on into the router and the tokens."""
        assert self.case.router_ED is not None
        wide = ours.grad_routing.dtype
        grad_x_TD = ours.grad_x_TD + ours.grad_routing @ self.case.router_ED.to(wide)
        grad_router_ED = ours.grad_routing.t() @ self.case.x_TD.detach().to(wide)
        return Result(ours.output_TD, grad_x_TD, grad_router_ED, ours.grad_experts)


class _FixedRouter(nn.Module):
    """Stands where the router does and gives the case's routing, from a copy in place of x W."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.k = case, case.workload.k

    def forward(self, x_TD: Tensor, used_token_T: Tensor | None = None) -> tuple[Routing, Tensor]:
        routing, _ = Routing.from_relu_(self.case.scores_ET.clone())
        return routing, x_TD.new_zeros(())


def _layer(case: Case) -> MoE:
    workload = case.workload
    with torch.device(case.x_TD.device):
        expert = SwiGLU(workload.hidden_size, case.width).to(case.x_TD.dtype)
        layer = MoE(workload.hidden_size, expert, workload.num_experts, k=workload.k, expert_init="copy")
    stacked = _stacked(layer)
    stacked.gate_up, stacked.down = nn.Parameter(case.gate_up), nn.Parameter(case.down)
    return layer


def _stacked(layer: MoE) -> StackedSwiGLU:
    return cast(StackedSwiGLU, layer.deepspeed_moe.experts.deepspeed_experts)


RIVALS: Mapping[str, RivalFactory] = {
    OURS: Ours,
    WITH_ROUTER: OursWithRouter,
    WITHOUT_BUDGET: OursWithoutBudget,
}
