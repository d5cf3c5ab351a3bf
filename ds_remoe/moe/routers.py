"""Routers: logits in fp32, a frozen Routing record, the layer's auxiliary loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_remoe.moe.routing import Routing
from ds_remoe.moe.sparsity import SparsitySlot
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
        if not 1 <= k <= num_experts:
            raise ValueError(f"k = {k}: must be between 1 and num_experts = {num_experts}")
        self.wg = nn.Linear(hidden_size, num_experts, bias=False)
        self.num_experts = num_experts
        self.k = k
        self.statistics = StatisticsSlot()

    def logits(self, x_TD: Tensor) -> Tensor:
        """x W in fp32 (fp64 for fp64 input), whatever the dtype of the weights: [T, E]."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.to(dtype), self.wg.weight.to(dtype))

    def forward(self, x_TD: Tensor, used_token_T: Tensor | None = None) -> tuple[Routing, Tensor]:
        """Route tokens.

        Args:
            x_TD: tokens, any floating dtype.
            used_token_T: where zero or False, the token passes no expert and counts nowhere (DeepSpeed's `used_token`).

        Returns:
            The routing, and the layer's auxiliary loss: a scalar, coefficient included.
        """
        raise TypeError(f"{type(self).__name__} is a base class: use ReLURouter or TopKRouter")


class ReLURouter(Router):
    """R(x) = ReLU(x W), eq. (5): no top-k, no sort, no normalisation; the non-zero entries are the routing."""

    def __init__(self, hidden_size: int, num_experts: int, k: int) -> None:
        super().__init__(hidden_size, num_experts, k)
        self.control = SparsitySlot()

    def forward(self, x_TD: Tensor, used_token_T: Tensor | None = None) -> tuple[Routing, Tensor]:
        """Route by ReLU; the auxiliary loss is this layer's share of λ·L_reg (6, 9, 10)."""
        weights_TE = F.relu(self.logits(x_TD))
        if used_token_T is not None:
            weights_TE = weights_TE * (used_token_T.reshape(-1, 1) != 0)
        routing = Routing.from_mask(weights_TE, weights_TE > 0)
        weight_sums_E, tokens = weights_TE.sum(dim=0), _count_tokens(x_TD, used_token_T)
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
        self.aux_loss_coefficient = aux_loss_coefficient

    def forward(self, x_TD: Tensor, used_token_T: Tensor | None = None) -> tuple[Routing, Tensor]:
        """Route to the k experts of the largest probability."""
        probs_TE = torch.softmax(self.logits(x_TD), dim=-1)
        chosen_Tk = probs_TE.topk(self.k, dim=-1, sorted=False).indices
        mask_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, chosen_Tk, True)
        if used_token_T is not None:
            mask_TE = mask_TE & (used_token_T.reshape(-1, 1) != 0)
        routing = Routing.from_mask(probs_TE, mask_TE)
        tokens = _count_tokens(x_TD, used_token_T)
        counted = tokens.clamp(min=1)
        share_E = routing.counts_E.to(probs_TE.dtype) / (self.k * counted)
        used_TE = probs_TE if used_token_T is None else probs_TE * (used_token_T.reshape(-1, 1) != 0)
        switch_loss = self.num_experts * (share_E * used_TE.sum(dim=0) / counted).sum()
        if self.training:
            weight_sums_E = (probs_TE.detach() * mask_TE).sum(dim=0)
            self.statistics.add(routing.counts_E, weight_sums_E, switch_loss, tokens)
        return routing, self.aux_loss_coefficient * switch_loss


def _count_tokens(x_TD: Tensor, used_token_T: Tensor | None) -> Tensor:
    """Tokens that are routed, as an int64 scalar that stays on the device."""
    if used_token_T is None:
        return torch.full((), x_TD.shape[0], device=x_TD.device)
    return used_token_T.count_nonzero()
