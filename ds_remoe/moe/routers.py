"""Routers: logits in fp32, a frozen Routing record, the layer's auxiliary loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_remoe.kernels.first_order import first_order
from ds_remoe.moe.arguments import finite_number, whole_number
from ds_remoe.moe.routing import Routing
from ds_remoe.moe.sparsity import SparsitySlot, at_least_one
from ds_remoe.moe.statistics import StatisticsSlot


class Router(nn.Module):
    """Base of the routers: one bias-free projection, named as DeepSpeed names it (`wg.weight`, [E, D]).

    Args:
        hidden_size: D.
        num_experts: E.
        k: wanted mean number of active experts a token.
    """

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__()
        hidden_size, num_experts = whole_number("hidden_size", hidden_size), whole_number("num_experts", num_experts)
        k = whole_number("k", k)
        if k > num_experts:
            raise ValueError(f"k = {k}: must be between 1 and num_experts = {num_experts}")
        self.wg = nn.Linear(hidden_size, num_experts, bias=False)
        self.num_experts = num_experts
        self.k = k
        self.statistics = StatisticsSlot()

    def logits(self, x_TD: Tensor) -> Tensor:
        """x W in fp32 (fp64 for fp64 input), whatever the dtype of the weights: [E, T], contiguous.

        Raises:
            ValueError: the tokens have another width than the router.
        """
        if x_TD.shape[1] != self.wg.in_features:
            raise ValueError(f"hidden_states have width {x_TD.shape[1]}, but hidden_size = {self.wg.in_features}")
        logits: Tensor = _Logits.apply(x_TD, self.wg.weight)
        return logits

    def forward(self, x_TD: Tensor, used_token_T: Tensor | None = None) -> tuple[Routing, Tensor]:
        """Route tokens.

        Args:
            x_TD: tokens, any floating dtype.
            used_token_T: where zero or False, the token passes no expert and counts nowhere (DeepSpeed's `used_token`).

        Returns:
            The routing, and the layer's auxiliary loss: a scalar, coefficient included.
        """
        raise TypeError(f"{type(self).__name__} is a base class: use ReLURouter or TopKRouter")


class _Logits(torch.autograd.Function):
    """W · xᵀ in fp32 or wider; keeps the tokens as they came, not their copy in fp32."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            return torch.mm(weight_ED.to(dtype), x_TD.to(dtype).t())

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        (grad_ET,) = grads
        grad_x_TD = grad_weight_ED = None
        with torch.autocast(x_TD.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x_TD = torch.mm(grad_ET.t(), weight_ED.to(grad_ET.dtype)).to(x_TD.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight_ED = torch.mm(grad_ET, x_TD.to(grad_ET.dtype)).to(weight_ED.dtype)
        return grad_x_TD, grad_weight_ED


class ReLURouter(Router):
    """R(x) = ReLU(x W), eq. (5): no top-k, no sort, no normalisation; the non-zero entries are the routing."""

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__(hidden_size, num_experts, k)
        self.control = SparsitySlot()

    def forward(self, x_TD: Tensor, used_token_T: Tensor | None = None) -> tuple[Routing, Tensor]:
        """Route by ReLU; the auxiliary loss is this layer's share of λ·L_reg (6, 9, 10)."""
        tokens = _count_tokens(x_TD, used_token_T)
        routing, weight_sums_E = Routing.from_relu_(self.logits(x_TD), used_token_T)
        aux_loss, regulariser = self.control.loss(weight_sums_E, routing.counts_E, tokens, self.k, self.training)
        if self.training:
            self.statistics.add(routing.counts_E, weight_sums_E, regulariser, tokens)
        return routing, aux_loss


class TopKRouter(Router):
    """R(x) = TopK(Softmax(x W), k), eq. (2), dropless: the paper's baseline.

    Args:
        aux_loss_coefficient: weight of each layer's Switch load-balancing loss E Σ_e f_e P_e (arXiv 2101.03961).
    """

    def __init__(self, hidden_size: int, num_experts: int, k: int, aux_loss_coefficient: float = 0.01) -> None:
        super().__init__(hidden_size, num_experts, k)
        self.aux_loss_coefficient = finite_number("aux_loss_coefficient", aux_loss_coefficient, 0.0)

    def forward(self, x_TD: Tensor, used_token_T: Tensor | None = None) -> tuple[Routing, Tensor]:
        """Route to the k experts of the largest probability."""
        tokens = _count_tokens(x_TD, used_token_T)
        probs_ET = torch.softmax(self.logits(x_TD), dim=0)
        chosen_kT = probs_ET.topk(self.k, dim=0, sorted=False).indices
        mask_ET = torch.zeros_like(probs_ET, dtype=torch.bool).scatter_(0, chosen_kT, True)
        used_ET = probs_ET
        if used_token_T is not None:
            used_T = used_token_T.reshape(-1) != 0
            mask_ET, used_ET = mask_ET & used_T, probs_ET * used_T
        routing = Routing.from_mask(probs_ET.t(), mask_ET.t())
        counted = at_least_one(tokens)
        share_E = routing.counts_E.to(probs_ET.dtype) / (self.k * counted)
        switch_loss = self.num_experts * (share_E * used_ET.sum(dim=1) / counted).sum()
        if self.training:
            weight_sums_E = (probs_ET.detach() * mask_ET).sum(dim=1)
            self.statistics.add(routing.counts_E, weight_sums_E, switch_loss, tokens)
        return routing, self.aux_loss_coefficient * switch_loss


def _count_tokens(x_TD: Tensor, used_token_T: Tensor | None) -> Tensor | int:
    """Tokens that are routed: on the host where all are, else an int64 scalar that stays on the device."""
    if used_token_T is None:
        return x_TD.shape[0]
    if used_token_T.numel() != x_TD.shape[0]:
        raise ValueError(
            f"used_token has shape {tuple(used_token_T.shape)}, but must have one entry for each of the "
            f"{x_TD.shape[0]} tokens"
        )
    return used_token_T.count_nonzero()
