"""Dispatch and combine over the expert-parallel group: each token goes once to each rank that owns one of its experts.

`counts` tells the ranks how much comes; `stage` is one exchange of tokens (`flight` its buffers, `wire` its collective)
and `send` a second one of the same tokens; `give_back` is the results' way home; `api` takes one stage over the whole
group, `nodes` one between nodes and one within.
"""

from ds_remoe.moe.dispatch.api import PendingDispatch, combine, dispatch, start_dispatch
from ds_remoe.moe.dispatch.nodes import NodeGroups, node_groups
from ds_remoe.moe.dispatch.record import Dispatched, ExchangePlan, LastDispatch
from ds_remoe.moe.dispatch.send import send_again

__all__ = [
    "Dispatched",
    "ExchangePlan",
    "LastDispatch",
    "NodeGroups",
    "PendingDispatch",
    "combine",
    "dispatch",
    "node_groups",
    "send_again",
    "start_dispatch",
]
