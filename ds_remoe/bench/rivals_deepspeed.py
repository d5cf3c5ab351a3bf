"""What DeepSpeed offers in place of the MoE layer: its `MOELayer` with two gates, and the pieces of AutoEP.

Checked against DeepSpeed 0.19.8. One process needs no process group for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.sharded_moe import MOELayer, TopKGate, top1gating, top2gating, topkgating
from torch import Tensor, nn

from ds_remoe.bench.rivals import (
    Case,
    ExpertGradients,
    LeftOut,
    Result,
    Rival,
    RivalFactory,
    add_weighted,
    list_pairs,
    separate_experts,
    separate_gradients,
)
from ds_remoe.moe.gate import ReLUGate

STOCK_RELU = "DeepSpeed, ReLUGate"
STOCK_TOPK = "DeepSpeed, TopKGate"
AUTO_EP = "DeepSpeed AutoEP"


class _StockLayer(Rival):
    """DeepSpeed's `MOELayer` behind a gate that takes the case's routing in place of x W."""

    def __init__(self, case: Case, gate: nn.Module) -> None:
        super().__init__(case)
        experts = Experts(nn.Identity(), 0)
        experts.deepspeed_experts = separate_experts(case)
        experts.num_local_experts = case.workload.num_experts
        self.layer = MOELayer(gate, experts, "ep_size_1", 1, case.workload.num_experts)

    def forward(self) -> Tensor:
        output_TD: Tensor = self.layer(self.case.x_TD, None)
        return output_TD

    def expert_gradients(self) -> list[ExpertGradients]:
        return separate_gradients(self.layer.experts.deepspeed_experts)


class StockReLU(_StockLayer):
    """The stock layer with ReLU routing: every expert padded to the largest."""

    def __init__(self, case: Case) -> None:
        # In evaluation mode the gate counts no statistics, which would need a controller.
        super().__init__(case, _FixedReLUGate(case).eval())


class StockTopK(_StockLayer):
    """The stock layer with TopK routing, dropless."""

    def __init__(self, case: Case) -> None:
        gate = _FixedTopKGate(case)
        super().__init__(case, gate)
        self.logits_TE = gate.logits_TE

    def routing_gradient(self) -> Tensor:
        grad_TE = self.logits_TE.grad
        assert grad_TE is not None
        return grad_TE

    def expected(self, ours: Result) -> Result:
        """The weights are a softmax of the logits; for k > 1 over the chosen experts, the others having none."""
        probs_TE = torch.softmax(self.logits_TE.detach(), dim=1)
        weighted_TE = probs_TE * ours.grad_routing
        grad_TE = weighted_TE - probs_TE * weighted_TE.sum(dim=1, keepdim=True)
        return Result(ours.output_TD, ours.grad_x_TD, grad_TE, ours.grad_experts)


class _FixedReLUGate(ReLUGate):
    def __init__(self, case: Case) -> None:
        super().__init__(case.workload.hidden_size, case.workload.num_experts)
        self.requires_grad_(False)
        self.case = case

    def logits(self, x_TD: Tensor) -> Tensor:
        return self.case.scores_ET.clone()  # the router overwrites its logits


class _FixedTopKGate(TopKGate):
    """`TopKGate(drop_tokens=False)` with logits whose k largest give the case's routing."""

    def __init__(self, case: Case) -> None:
        k = case.workload.fixed_k
        if k is None:
            raise LeftOut("TopKGate needs the same number of experts for every token")
        super().__init__(case.workload.hidden_size, case.workload.num_experts, k, min_capacity=0, drop_tokens=False)
        self.requires_grad_(False)
        self.logits_TE = nn.Parameter(_topk_logits(case, k))

    def forward(
        self, input: Tensor, used_token: Tensor | None = None, sparse_routes: bool = True, use_tutel: bool = False
    ) -> Any:
        if self.k == 1:
            return top1gating(self.logits_TE, 1.0, 0, drop_tokens=False, use_rts=False, sparse_routes=True)
        if self.k == 2:
            return top2gating(
                self.logits_TE, 1.0, 0, drop_tokens=False, top2_2nd_expert_sampling=False, sparse_routes=True
            )
        return topkgating(self.logits_TE, self.k, 1.0, 0, drop_tokens=False, sparse_routes=True)


def _topk_logits(case: Case, k: int) -> Tensor:
    """Logits from which TopKGate computes the routing weights: for k = 1 it does not normalise over the chosen."""
    mask_TE, weights_TE = case.mask_TE, case.scores_TE.detach()
    if k > 1:
        sums_T = (weights_TE * mask_TE).sum(dim=1)
        if not torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-5):
            raise LeftOut("TopKGate's weights add up to 1 for k > 1, these do not")
        return torch.where(mask_TE, weights_TE.clamp(min=0).log(), -1e4)
    others = case.workload.num_experts - 1
    if others == 0:
        raise LeftOut("TopKGate's weight of a single expert is 1, this is not")
    share_T = (weights_TE * mask_TE).sum(dim=1, keepdim=True)
    if not bool(((share_T * (others + 1) > 1) & (share_T < 1)).all()):
        raise LeftOut("TopKGate's weights are the largest probability for k = 1, these are not")
    return torch.where(mask_TE, share_T.log(), ((1 - share_T) / others).log())


class AutoEP(Rival):
    """AutoEP's permutation and grouped experts; around them gather and weighted sum for any number of experts."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        try:
            from deepspeed.module_inject.auto_ep_layer import permute_by_local_expert, unpermute_by_local_expert
            from deepspeed.moe.ep_experts import GroupedExperts
        except ImportError as error:
            raise LeftOut(f"this DeepSpeed has no AutoEP ({error})") from None
        self.permute, self.unpermute = permute_by_local_expert, unpermute_by_local_expert
        with torch.device("meta"):
            self.experts = GroupedExperts(case.workload.hidden_size, case.width, case.workload.num_experts)
        gate, up = case.gate_up.split(case.width, dim=1)
        self.experts.w1 = nn.Parameter(gate.contiguous())
        self.experts.w3 = nn.Parameter(up.contiguous())
        self.experts.w2 = nn.Parameter(case.down)

    def forward(self) -> Tensor:
        token_ids_N, weights_N, counts_E = list_pairs(self.case)
        rows, places, padded_counts_E, num_pairs = self.permute(self.case.x_TD.index_select(0, token_ids_N), counts_E)
        results_ND = self.unpermute(self.experts(rows, padded_counts_E), places, num_pairs)
        return add_weighted(self.case, results_ND, token_ids_N, weights_N)

    def expert_gradients(self) -> list[ExpertGradients]:
        gradients = (self.experts.w1.grad, self.experts.w3.grad, self.experts.w2.grad)
        return list(zip(*gradients, strict=True))


RIVALS: Mapping[str, RivalFactory] = {STOCK_RELU: StockReLU, STOCK_TOPK: StockTopK, AUTO_EP: AutoEP}
