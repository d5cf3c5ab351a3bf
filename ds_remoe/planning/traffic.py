"""Bytes on the wire of one optimizer step, by collective, as they leave one rank or one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.kernels.exchange import mask_words
from ds_remoe.moe.dispatch.counts import SHARE_COLUMNS
from ds_remoe.planning.activations import FP32, Load
from ds_remoe.planning.hardware import Cluster, Group, Hardware
from ds_remoe.planning.settings import EngineSettings
from ds_remoe.planning.sizes import ParamGroup, moe_layers

WORD_BYTES = FP32
"""A pair's weight on its way out and its gradient on its way home, and one entry of the table of counts."""

Kind = Literal["all-to-all", "all-reduce", "reduce", "all-gather"]


@dataclass(frozen=True)
class Flow:
    """One kind of collective over one optimizer step.

    Attributes:
        name: what travels.
        kind: of the collective.
        group: the ranks that take part.
        payload: bytes that one rank contributes in the step; of an all-to-all, to one rank of the group; of an
            all-gather, the whole that is gathered.
        calls: collectives of the step.
        hidden: whether backward goes on meanwhile.
        far_share: of an all-to-all's bytes to other nodes, those that cross where each token crosses once and is spread
            there; 1 sends every copy across.
    """

    name: str
    kind: Kind
    group: Group
    payload: float
    calls: int
    hidden: bool = False
    far_share: float = 1.0

    @property
    def rank_near(self) -> float:
        """Bytes that a rank sends to ranks of its node (of rings: along the ring)."""
        if self.kind == "all-to-all":
            spread = self.group.size - 1 - self.group.near if self.far_share < 1 else 0.0
            return self.payload * (self.group.near + spread)
        return self._ring if self.group.size > self.group.nodes else 0.0

    @property
    def node_far(self) -> float:
        """Bytes that the busiest node sends to other nodes."""
        if not self.group.crosses_nodes:
            return 0.0
        if self.kind == "all-to-all":
            return self.payload * self.group.node_far * self.far_share
        return self._ring * self.group.groups_in_node

    @property
    def _ring(self) -> float:
        """Bytes that a rank sends in a ring: each node's border is crossed by one rank's share of each group."""
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.payload * (self.group.size - 1) / self.group.size

    def seconds(self, hardware: Hardware) -> float:
        """Time on the wire: the slower of links and network, and the hops of every call."""
        near, far = self.group.hops
        rounds = 2 if self.kind == "all-reduce" else 1
        latency = rounds * (near * hardware.link_latency + far * hardware.network_latency)
        return max(self.rank_near / hardware.link_bytes, self.node_far / hardware.network_bytes) + self.calls * latency


def exchange_bytes(
    moe: MoEConfig, hidden_size: int, item: int, rows: float, pairs: float, passes: int = 1, resent_rows: float = 0.0
) -> float:
    """Bytes that one rank sends to one other in one layer and micro-batch, backward included.

    Args:
        item: bytes of an element of the tokens as they are computed with; moe.wire_dtype may make them travel in fewer.
        rows, pairs: that the other rank gets.
        passes: forward passes; 2 with activation checkpointing.
        resent_rows: rows of it that are sent again in backward.
    """
    local = moe.total_experts // moe.ep_size
    row = hidden_size * (2 if moe.wire_dtype == "bf16" else item)
    which_experts = mask_words(local, torch.float32) * WORD_BYTES
    counts = (local + 1 + SHARE_COLUMNS) * WORD_BYTES
    forward = rows * (2 * row + which_experts) + pairs * WORD_BYTES + counts
    return passes * forward + (2 * rows + resent_rows) * row + pairs * WORD_BYTES


def flows(
    model: ModelConfig,
    moe: MoEConfig,
    groups: Sequence[ParamGroup],
    settings: EngineSettings,
    cluster: Cluster,
    load: Load,
    balance_over_ranks: bool,
) -> list[Flow]:
    """Every collective of one optimizer step that carries more than a few bytes.

    Args:
        balance_over_ranks: the regulariser's balance weight is taken over all ranks, which costs an all-reduce a layer.
    """
    world = Group.of(cluster, cluster.world_size)
    layers = moe_layers(model, moe)
    found: list[Flow] = []
    if moe.ep_size > 1 and layers:
        passes = 2 if model.activation_checkpointing else 1
        each = exchange_bytes(
            moe,
            model.hidden_size,
            settings.item,
            load.rows_to_rank,
            load.pairs / moe.ep_size,
            passes,
            load.resent_rows_to_rank,
        )
        calls = layers * settings.accumulation
        group = Group.of(cluster, moe.ep_size)
        share = _crossing_share(moe, load, group) if moe.hierarchical_all_to_all else 1.0
        launched = round(calls * (3 * passes + 2 + load.resent_share))
        found.append(Flow("tokens to experts", "all-to-all", group, each * calls, launched, far_share=share))
    reductions = settings.accumulation if settings.stage == 2 else 1
    for name, is_expert in (("dense", False), ("expert", True)):
        parts = [group for group in groups if group.is_expert == is_expert]
        if not parts or parts[0].replicas == 1:
            continue
        group = Group.of(cluster, parts[0].replicas, moe.ep_size) if is_expert else world
        elements = sum(part.elements for part in parts)
        buckets = max(len(parts), -(-elements // settings.bucket))
        payload = elements * settings.wire_bytes * reductions
        hidden = settings.overlap and settings.stage > 0
        kind: Kind = "reduce" if settings.to_owner else "all-reduce"
        found.append(Flow(f"{name} gradients", kind, group, payload, buckets * reductions, hidden))
        if settings.stage > 0:
            whole = sum(part.padded for part in parts) * settings.item
            found.append(Flow(f"{name} parameters", "all-gather", group, whole, len(parts)))
    if cluster.world_size > 1 and layers:
        found.append(Flow("routing statistics", "all-reduce", world, layers * (3 + 2 * moe.total_experts) * 8, 2))
        if balance_over_ranks:
            calls = layers * settings.accumulation
            found.append(Flow("balance weights", "all-reduce", world, calls * (moe.total_experts + 1) * FP32, calls))
    return found


def _crossing_share(moe: MoEConfig, load: Load, group: Group) -> float:
    """Rows that a node needs of a token, each once, against the rows that its ranks need."""
    in_node = group.size // group.nodes
    if load.rows_to_rank == 0 or not group.crosses_nodes:
        return 1.0
    needed = load.tokens * (1 - (1 - load.density) ** (in_node * moe.total_experts // moe.ep_size))
    return needed / (in_node * load.rows_to_rank)
