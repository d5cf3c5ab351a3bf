"""Dispatch to the experts' ranks and combine at home."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ds_remoe.moe.dispatch.counts import start_counts
from ds_remoe.moe.dispatch.give_back import return_rows
from ds_remoe.moe.dispatch.nodes import NodeGroups, start_on_nodes
from ds_remoe.moe.dispatch.record import Dispatched, ExchangePlan, LastDispatch
from ds_remoe.moe.dispatch.stage import Stage
from ds_remoe.moe.routing import Routing

PendingDispatch = Callable[[], Dispatched]


def dispatch(
    x_TD: Tensor,
    routing: Routing,
    group: dist.ProcessGroup | None,
    *,
    wire_dtype: torch.dtype | None = None,
    nodes: NodeGroups | None = None,
) -> Dispatched:
    """Bring each token to the ranks of its active experts; see `start_dispatch`."""
    return start_dispatch(x_TD, routing, group, wire_dtype=wire_dtype, nodes=nodes)()


def start_dispatch(
    x_TD: Tensor,
    routing: Routing,
    group: dist.ProcessGroup | None,
    *,
    wire_dtype: torch.dtype | None = None,
    nodes: NodeGroups | None = None,
    last: LastDispatch | None = None,
) -> PendingDispatch:
    """Start to bring each token to the ranks of its active experts; call the result to wait for them.

    Args:
        x_TD: tokens of this rank.
        routing: their routing over all experts.
        group: expert-parallel group; None or a group of one rank means that all experts are here.
        wire_dtype: in which rows travel between ranks, both ways, forward and backward; None for their own. Rows that
            stay on their rank are not rounded.
        nodes: of `node_groups(group)`; a token then crosses once to each node that wants it, and is spread there.
        last: kept from one call to the next, lets a GPU pack before the host knows how much it is.

    Raises:
        TypeError: wire_dtype is not the tokens' dtype and saves no bytes against it.
    """
    if wire_dtype is not None and wire_dtype != x_TD.dtype and wire_dtype.itemsize >= x_TD.dtype.itemsize:
        raise TypeError(
            f"wire_dtype = {wire_dtype}: hidden_states are {x_TD.dtype}, which takes no more bytes; leave it at 'auto'"
        )
    if group is None or dist.get_world_size(group) == 1:
        return lambda: _all_here(x_TD, routing)
    last = last or LastDispatch()
    if nodes is not None:
        return start_on_nodes(x_TD, routing, nodes, wire_dtype, last)
    counts = start_counts(routing, group)
    stage = Stage(x_TD, routing, counts, group, wire_dtype, last.first)

    def finish() -> Dispatched:
        rows, weights_M, row_ids_M, order = stage.pairs()
        plan = ExchangePlan((stage.plan,), x_TD.detach(), counts.rows_per_token())
        return Dispatched(rows, row_ids_M, weights_M, counts.of_experts(), order, plan)

    return finish


def combine(out_MD: Tensor, plan: ExchangePlan | None, num_tokens: int) -> Tensor:
    """Send each row of results home and add up the at most R rows of a token: [M_rows, D] → [T, D]."""
    for stage in reversed(plan.stages if plan is not None else ()):
        out_MD = return_rows(out_MD, stage)
    return out_MD


def _all_here(x_TD: Tensor, routing: Routing) -> Dispatched:
    pairs = routing.pairs()
    return Dispatched(x_TD, pairs.token_ids_N, pairs.weights_N, pairs.counts_E, pairs.order, None)
