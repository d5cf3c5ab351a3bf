"""ReLU routing inside DeepSpeed's own `MOELayer`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ds_remoe.moe.arguments import whole_number
from ds_remoe.moe.routers import ReLURouter
from ds_remoe.moe.routing import Routing


class ReLUGate(ReLURouter):
    """A ReLU gate in place of `deepspeed.moe.sharded_moe.TopKGate`; its weight is `wg.weight`, [E, D].

    It speaks both gate protocols: from DeepSpeed 0.19.4 `gate(x, used_token, True, use_tutel)` is asked for routes,
    before that `gate(x, used_token)` for dense masks. The stock layer pads every expert to the largest count over the
    ranks; `ds_remoe.MoE` does not. A gate of another number of experts than its layer is refused by
    `ds_remoe.initialize` and `SparsityController`, as the layer would mix experts up.

    Args:
        model_dim: D.
        num_experts: E.
        k: wanted mean number of active experts a token.
    """

    def __init__(self, model_dim: int, num_experts: int, k: int = 1) -> None:
        super().__init__(whole_number("model_dim", model_dim), num_experts, k)
        self.ep_group: dist.ProcessGroup | None = None

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        self.ep_group = ep_group

    def forward(
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> tuple[Any, ...]:
        """Route tokens [S, D].

        Returns:
            sparse_routes: (l_aux, C, E, indices [K, S] int32, locations [K, S] int32, gates [K, S], exp_counts [E]),
            an unused route having index −1; else (l_aux, combine_weights [S, E, C], dispatch_mask [S, E, C],
            exp_counts [E]). C is the largest number of tokens of an expert on any rank of the EP group.
        """
        routing, l_aux = super().forward(input, used_token)
        capacity = routing.counts_E.amax().clamp(min=1)
        if self.ep_group is not None and dist.get_world_size(self.ep_group) > 1:
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.ep_group)
        locations_SE = routing.mask_TE.cumsum(dim=0) - 1
        if not sparse_routes:
            slots_SEC = F.one_hot(locations_SE.clamp(min=0), num_classes=int(capacity)).to(routing.weights_TE.dtype)
            combine_SEC = (routing.weights_TE * routing.mask_TE).unsqueeze(-1) * slots_SEC
            return l_aux, combine_SEC, combine_SEC.bool(), routing.counts_E
        indices, locations, gates = _routes(routing, locations_SE)
        return l_aux, capacity, self.num_experts, indices, locations, gates, routing.counts_E


def _routes(routing: Routing, locations_SE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """List each token's active experts in K columns, K the largest number that a token has (at least 1)."""
    per_token_S = routing.mask_TE.sum(dim=1)
    routes = max(int(per_token_S.amax()) if len(per_token_S) else 0, 1)
    # A stable sort of the inverted mask puts a token's active experts first, in their order.
    expert_SK = (~routing.mask_TE).to(torch.uint8).sort(dim=1, stable=True).indices[:, :routes]
    used_SK = torch.arange(routes, device=expert_SK.device) < per_token_S.unsqueeze(1)
    indices = torch.where(used_SK, expert_SK, -1)
    locations = torch.where(used_SK, locations_SE.gather(1, expert_SK), 0)
    gates = torch.where(used_SK, routing.weights_TE.gather(1, expert_SK), 0.0)
    return (
        indices.t().to(torch.int32).contiguous(),
        locations.t().to(torch.int32).contiguous(),
        gates.t().contiguous(),
    )
