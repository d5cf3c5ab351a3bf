"""One exchange of tokens over one group, in two halves so that work can stand between.

Autograd sees each half as a node: the second half's backward starts the gradients' exchange, the first half's waits
for it. Autograd runs nodes in the reverse order of their making, so what was computed between the halves has its
backward between them, too. An empty tensor links the two, as the data between them is not there yet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_remoe.kernels import exchange
from ds_remoe.kernels.first_order import first_order
from ds_remoe.kernels.pair_groups import RowOrder
from ds_remoe.moe.dispatch.counts import Counts
from ds_remoe.moe.dispatch.flight import Flight
from ds_remoe.moe.dispatch.record import LastSent, StagePlan
from ds_remoe.moe.routing import Routing


class Stage:
    """Tokens on their way to the ranks of one group; made by all its ranks.

    Args:
        x_TD: tokens of this rank.
        routing: over the experts of the whole group, an equal consecutive share on each rank.
        counts: of this routing.
        group: where the exchange takes place.
        wire_dtype: in which rows travel; None for their own.
        last: what this stage of the layer sent the last time.
    """

    def __init__(
        self,
        x_TD: Tensor,
        routing: Routing,
        counts: Counts,
        group: dist.ProcessGroup,
        wire_dtype: torch.dtype | None,
        last: LastSent,
    ) -> None:
        self._flight = Flight(counts, group, wire_dtype, last)
        self._plan: list[StagePlan] = []
        self._link: Tensor = _Depart.apply(x_TD, routing.weights_TE, routing.mask_TE, self._flight, self._plan)

    @property
    def plan(self) -> StagePlan:
        """What `return_rows` needs."""
        return self._plan[0]

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, RowOrder]:
        """Wait; rows [M_rows, D], and the pairs by local expert: weights, rows (int64), and their order by row."""
        rows, weights_M, row_ids_M, by_row_M, starts = _ArrivePairs.apply(self._link, self._flight)
        return rows, weights_M, row_ids_M, RowOrder(by_row_M, starts)

    def routing(self) -> tuple[Tensor, Routing]:
        """Wait; rows [M_rows, D] and their routing over this rank's share of the experts."""
        rows, weights, mask = _ArriveRouting.apply(self._link, self._flight)
        return rows, Routing.from_mask(weights, mask)


class _Depart(torch.autograd.Function):
    """Pack and send; backward adds up what came home."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TE: Tensor,
        mask_TE: Tensor,
        flight: Flight,
        plans: list[StagePlan],
    ) -> Tensor:
        prefix = exchange.Prefix.of(mask_TE, dist.get_world_size(flight.group), dist.get_rank(flight.group))
        plan, weight_ids_K = flight.depart(x_TD, weights_TE, mask_TE, prefix)
        # The plan leaves by the list and its tensors stay by save_for_backward, so that activation checkpointing can
        # drop them.
        plans.append(plan)
        ctx.save_for_backward(plan.row_tokens_N, plan.prefix_rows, weight_ids_K)
        ctx.flight, ctx.weights_shape = flight, weights_TE.shape
        return x_TD.new_empty(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row_tokens_N, prefix_rows, weight_ids_K = ctx.saved_tensors
        flight: Flight = ctx.flight
        grad_weights_K = flight.returned_weights()
        grad_weights = grad_weights_K.new_zeros(ctx.weights_shape.numel())
        grad_weights.scatter_(0, weight_ids_K, grad_weights_K)
        remote, local = flight.returned_rows()
        grad_x = exchange.combine_rows(
            remote, local, row_tokens_N, prefix_rows, flight.sizes.send_rows_P, flight.sizes.num_tokens
        )
        return grad_x, grad_weights.view(ctx.weights_shape[::-1]).t(), None, None, None


class _ArrivePairs(torch.autograd.Function):
    """Wait and list the pairs by expert; backward sends the gradients home."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, flight: Flight) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        words, weight_dtype = flight.arrived_words()
        row_ids_M, weights_M, order = exchange.unpack(
            words,
            flight.counts.arrived(),
            flight.counts.num_experts,
            flight.sizes.arrived_rows,
            sum(flight.sizes.recv_pairs_P),
            weight_dtype,
        )
        ctx.save_for_backward(order.pairs_M)
        ctx.flight = flight
        ctx.mark_non_differentiable(row_ids_M, order.pairs_M, order.starts)
        return flight.arrived_rows(), weights_M, row_ids_M, order.pairs_M, order.starts

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (by_row_M,) = ctx.saved_tensors
        grad_rows, grad_weights_M = grads[:2]
        # Row by row is the order in which the weights came.
        ctx.flight.send_back(grad_rows, grad_weights_M.index_select(0, by_row_M))
        return grad_rows.new_empty(0), None


class _ArriveRouting(torch.autograd.Function):
    """Wait and make the rows' routing; backward sends the gradients home."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, flight: Flight) -> tuple[Tensor, Tensor, Tensor]:
        words, weight_dtype = flight.arrived_words()
        mask, weights, weight_ids_K = exchange.unpack_dense(
            words,
            flight.counts.arrived(),
            flight.counts.num_experts,
            flight.sizes.arrived_rows,
            sum(flight.sizes.recv_pairs_P),
            weight_dtype,
        )
        ctx.save_for_backward(weight_ids_K)
        ctx.flight = flight
        ctx.mark_non_differentiable(mask)
        return flight.arrived_rows(), weights, mask

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight_ids_K,) = ctx.saved_tensors
        grad_rows, grad_weights, _ = grads
        ctx.flight.send_back(grad_rows, grad_weights.flatten().index_select(0, weight_ids_K))
        return grad_rows.new_empty(0), None
