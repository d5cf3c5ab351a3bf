"""Hierarchical exchange: a token crosses to another node once, however many of its ranks want it.

Between nodes it travels to the rank that has the same place on the other node (its rail), and from there within the
node to the experts' ranks. Results come back the same way, added up within the node first. Both stages are ordinary
exchanges; what arrives by the first is a routing over the node's experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from ds_remoe.launch_environment import RANKS_PER_NODE, ranks_per_node
from ds_remoe.moe.dispatch.counts import SHARE_COLUMNS, Counts, Table, count_table, share_columns
from ds_remoe.moe.dispatch.record import Dispatched, ExchangePlan, LastDispatch
from ds_remoe.moe.dispatch.stage import Stage
from ds_remoe.moe.routing import Routing

FIELD = "hierarchical_all_to_all = True"


@dataclass(frozen=True)
class NodeGroups:
    """This rank's two groups within an expert-parallel group that spans several nodes.

    Attributes:
        rail: the ranks with this rank's place on their node, in node order.
        node: the ranks of this node.
    """

    rail: dist.ProcessGroup
    node: dist.ProcessGroup


_made: weakref.WeakKeyDictionary[dist.ProcessGroup, NodeGroups | None] = weakref.WeakKeyDictionary()


def node_groups(ep_group: dist.ProcessGroup) -> NodeGroups | None:
    """The groups of a hierarchical exchange, made once for an expert-parallel group; every rank of the run calls this.

    Returns:
        None where the hierarchy is flat: each expert-parallel group on one node, or with one rank on each.

    Raises:
        ValueError: nothing says how many ranks a node has, the nodes differ, or an expert-parallel group has more
            ranks on one node than on another.
    """
    if ep_group not in _made:
        _made[ep_group] = _make_groups(ep_group)
    return _made[ep_group]


def split_by_node(ranks: Sequence[int], per_node: int) -> list[list[int]]:
    """The ranks of a group by node, consecutive global ranks sharing one.

    Raises:
        ValueError: the group has more ranks on one node than on another.
    """
    nodes: dict[int, list[int]] = {}
    for rank in ranks:
        nodes.setdefault(rank // per_node, []).append(rank)
    by_node = [nodes[node] for node in sorted(nodes)]
    if len({len(node) for node in by_node}) > 1:
        raise ValueError(
            f"{FIELD}: nodes of {per_node} ranks cut the expert-parallel group {list(ranks)} unevenly; let ep_size "
            "divide the ranks of a node or be a multiple of them"
        )
    return by_node


def _make_groups(ep_group: dist.ProcessGroup) -> NodeGroups | None:
    said: list[tuple[int | None, tuple[int, ...]]] = [(None, ())] * dist.get_world_size()
    dist.all_gather_object(said, (ranks_per_node(), tuple(dist.get_process_group_ranks(ep_group))))
    sizes = {size for size, _ in said}
    if None in sizes:
        raise ValueError(
            f"{FIELD}: needs the number of ranks on a node; launch with deepspeed or torchrun, or set "
            f"{RANKS_PER_NODE[0]}"
        )
    if len(sizes) > 1:
        raise ValueError(
            f"{FIELD}: the nodes have different numbers of ranks, {sorted(s for s in sizes if s)}; "
            "launch as many on each"
        )
    per_node = next(size for size in sizes if size)
    layouts = [split_by_node(ranks, per_node) for ranks in sorted({ranks for _, ranks in said})]
    if any(len(by_node) == 1 or len(by_node[0]) == 1 for by_node in layouts):
        return None
    me, rail, node = dist.get_rank(), None, None
    for by_node in layouts:
        for ranks in by_node:
            made = dist.new_group(ranks)
            node = made if me in ranks else node
        for lane in zip(*by_node, strict=True):
            made = dist.new_group(list(lane))
            rail = made if me in lane else rail
    if rail is None or node is None:
        raise RuntimeError(f"rank {me} is in no expert-parallel group")
    return NodeGroups(rail, node)


def start_on_nodes(
    x_TD: Tensor, routing: Routing, groups: NodeGroups, wire_dtype: torch.dtype | None, last: LastDispatch
) -> Callable[[], Dispatched]:
    """Start to bring tokens to the nodes that want them; the result waits and spreads them within this node."""
    rail_counts, node_counts = _start_counts(routing, groups)
    between = Stage(x_TD, routing, rail_counts, groups.rail, wire_dtype, last.first)

    def finish() -> Dispatched:
        within = Stage(*between.routing(), node_counts, groups.node, wire_dtype, last.second)
        rows, weights_M, row_ids_M, order = within.pairs()
        plan = ExchangePlan((between.plan, within.plan), x_TD.detach(), node_counts.rows_per_token())
        return Dispatched(rows, row_ids_M, weights_M, node_counts.of_experts(), order, plan)

    return finish


def _start_counts(routing: Routing, groups: NodeGroups) -> tuple[Counts, Counts]:
    """Count for both stages ahead of the first, so that one read tells the host all of them."""
    nodes, ranks = dist.get_world_size(groups.rail), dist.get_world_size(groups.node)
    table_NC = count_table(routing, nodes)
    rows_NG = routing.mask_TE.unflatten(1, (nodes, ranks, -1)).any(dim=-1).sum(dim=0, dtype=torch.int32)
    share_NC = share_columns(rows_NG.sum(), routing.mask_TE.shape[0], nodes)
    sent = torch.cat([table_NC, rows_NG, share_NC], dim=1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=groups.rail)
    arrived_NC, arrived_rows_NG, arrived_share_NC = received.split([table_NC.shape[1], ranks, SHARE_COLUMNS], dim=1)

    pairs_GL = arrived_NC[:, :-1].sum(dim=0, dtype=torch.int32).view(ranks, -1)
    rows_G = arrived_rows_NG.sum(dim=0, dtype=torch.int32)
    share_GC = arrived_share_NC.sum(dim=0, dtype=torch.int32).expand(ranks, -1)
    spread_GC = torch.cat([pairs_GL, rows_G.unsqueeze(1), share_GC], dim=1)
    gathered_GC = torch.empty_like(spread_GC)
    work = dist.all_to_all_single(gathered_GC, spread_GC, group=groups.node, async_op=True)
    tables = [table_NC, arrived_NC, spread_GC, gathered_GC]

    @cache
    def read() -> list[Table]:
        work.wait()
        values, result = iter(torch.cat([table.flatten() for table in tables]).tolist()), []
        for table in tables:
            lines, columns = table.shape
            result.append([[next(values) for _ in range(columns)] for _ in range(lines)])
        return result

    def read_rail() -> tuple[Table, Table]:
        return read()[0], read()[1]

    def read_node() -> tuple[Table, Table]:
        return read()[2], read()[3]

    return (
        Counts(table_NC, arrived_NC, dist.get_rank(groups.rail), read_rail, has_share=False),
        Counts(spread_GC, gathered_GC, dist.get_rank(groups.node), read_node, has_share=True),
    )
