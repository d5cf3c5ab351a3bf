"""Routing statistics: counted on the device in every micro-batch, made global once per optimizer step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class LayerRouting:
    """One layer over one optimizer step, all micro-batches and ranks together.

    Attributes:
        index: position of the layer among the model's routers.
        tokens: tokens that passed the layer, at least one.
        active: active tokens of each expert.
        weight_sums: sum of the router weights of each expert.
        aux_loss: mean over micro-batches and ranks of the layer's auxiliary loss before its coefficient:
            the regulariser of eq. (9) or (10) for this layer, or the Switch loss.
    """

    index: int
    tokens: int
    active: tuple[int, ...]
    weight_sums: tuple[float, ...]
    aux_loss: float

    @property
    def sparsity(self) -> float:
        """Share of (token, expert) pairs that are inactive."""
        return 1.0 - sum(self.active) / (self.tokens * len(self.active))

    @property
    def load(self) -> tuple[float, ...]:
        """Share of the tokens that each expert saw."""
        return tuple(count / self.tokens for count in self.active)


@dataclass(frozen=True)
class RoutingReport:
    """The layers that routed a token in one optimizer step, in the model's order; at least one."""

    layers: tuple[LayerRouting, ...]

    @property
    def sparsity(self) -> float:
        """S of eq. (8): over all layers, micro-batches and data-parallel ranks."""
        pairs = sum(layer.tokens * len(layer.active) for layer in self.layers)
        return 1.0 - sum(sum(layer.active) for layer in self.layers) / pairs

    @property
    def active_experts_per_token(self) -> float:
        """Mean number of active experts of a token in a layer."""
        return sum(sum(layer.active) for layer in self.layers) / sum(layer.tokens for layer in self.layers)

    @property
    def aux_loss(self) -> float:
        """Mean of the layers' auxiliary losses before their coefficient: L_reg for ReLU routers."""
        return sum(layer.aux_loss for layer in self.layers) / len(self.layers)


@dataclass(frozen=True)
class _Row:
    """Views of one layer's row of sums: tokens, (passes,) auxiliary losses, counts and weight sums, in this order."""

    tokens: Tensor
    aux_loss: Tensor
    counts_E: Tensor
    weight_sums_E: Tensor

    @classmethod
    def of(cls, row: Tensor, num_experts: int) -> _Row:
        return cls(row[0], row[2], row[3 : 3 + num_experts], row[3 + num_experts : 3 + 2 * num_experts])


class RoutingStatistics:
    """Collects what the routers of one model did since the last `reduce`.

    One tensor holds all layers; a router adds to its row without reading anything back, and what the host knows is
    counted there. A forward pass that repeats an earlier one inside backward (activation checkpointing) is not counted
    again. One without gradients is counted, as reentrant checkpointing runs that first; where none repeats it, `reduce`
    warns of an evaluation in training mode.

    Args:
        experts_per_layer: number of experts of each router, in the model's order.
    """

    def __init__(self, experts_per_layer: Sequence[int]) -> None:
        self.experts_per_layer = tuple(experts_per_layer)
        self._sums: Tensor | None = None
        self._rows: list[_Row] = []
        self._host_sums = [[0, 0] for _ in experts_per_layer]
        self._without_gradients = 0
        self._warned = False

    def add_repetition(self) -> None:
        """Note a forward pass inside backward; the first one was counted."""
        self._without_gradients -= 1

    def add(self, layer: int, counts_E: Tensor, weight_sums_E: Tensor, aux_loss: Tensor, tokens: Tensor | int) -> None:
        """Add one micro-batch of one layer; nothing is read from the device."""
        if self._sums is None:
            width = 3 + 2 * max(self.experts_per_layer)
            with torch.inference_mode(False):  # an evaluation may come first
                self._sums = torch.zeros(
                    len(self.experts_per_layer), width, dtype=torch.float64, device=counts_E.device
                )
            self._rows = [_Row.of(*row) for row in zip(self._sums, self.experts_per_layer, strict=True)]
        row, host_sums = self._rows[layer], self._host_sums[layer]
        if isinstance(tokens, Tensor):
            row.tokens.add_(tokens)
        else:
            host_sums[0] += tokens
        host_sums[1] += 1
        self._without_gradients += not torch.is_grad_enabled()
        row.aux_loss.add_(aux_loss.detach())
        row.counts_E.add_(counts_E)
        row.weight_sums_E.add_(weight_sums_E.detach())

    def reduce(self, group: dist.ProcessGroup | None = None) -> RoutingReport | None:
        """Sum over all ranks of `group` (default: the world), reset, and return the report.

        Every rank of the group must call it. One all-reduce and one read from the device.

        Returns:
            None where no rank routed a token since the last call.
        """
        distributed = dist.is_available() and dist.is_initialized()
        if self._sums is None:
            if not distributed or dist.get_world_size(group) == 1:
                return None
            raise RuntimeError(
                "RoutingStatistics.reduce: this rank ran no training forward pass since the model was made, so the "
                "ranks cannot agree; run the model in training mode before the optimizer step"
            )
        sums = self._sums.clone()
        sums[:, :2] += torch.tensor(self._host_sums, dtype=sums.dtype, device=sums.device)
        self._sums.zero_()
        self._host_sums = [[0, 0] for _ in self.experts_per_layer]
        if self._without_gradients > 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._without_gradients} forward passes of MoE layers in training mode had no gradients, and no "
                "backward pass repeated them; they count in the measured sparsity, by which λ moves. Call model.eval() "
                "for an evaluation",
                stacklevel=2,
            )
        self._without_gradients = 0
        if distributed and dist.get_world_size(group) > 1:
            dist.all_reduce(sums, group=group)
        rows = zip(sums.tolist(), self.experts_per_layer, strict=True)
        layers = [self._layer(index, row, experts) for index, (row, experts) in enumerate(rows) if row[0] > 0]
        return RoutingReport(tuple(layers)) if layers else None

    @staticmethod
    def _layer(index: int, row: list[float], num_experts: int) -> LayerRouting:
        return LayerRouting(
            index=index,
            tokens=int(row[0]),
            active=tuple(int(count) for count in row[3 : 3 + num_experts]),
            weight_sums=tuple(row[3 + num_experts : 3 + 2 * num_experts]),
            aux_loss=row[2] / row[1],
        )


class StatisticsSlot:
    """A router's place in the statistics; empty until `connect`, and in a copy of the model."""

    def __init__(self) -> None:
        self._statistics: weakref.ref[RoutingStatistics] | None = None
        self._layer = -1

    def __reduce__(self) -> tuple[type[StatisticsSlot], tuple[()]]:
        return type(self), ()

    def connect(self, statistics: RoutingStatistics, layer: int) -> None:
        """Count into row `layer` of `statistics` from now on."""
        self._statistics, self._layer = weakref.ref(statistics), layer

    def add(self, counts_E: Tensor, weight_sums_E: Tensor, aux_loss: Tensor, tokens: Tensor | int) -> None:
        """Count one forward pass, unless it is a recomputation or nobody listens."""
        statistics = self._statistics() if self._statistics is not None else None
        if statistics is None:
            return
        if in_backward():
            statistics.add_repetition()
        else:
            statistics.add(self._layer, counts_E, weight_sums_E, aux_loss, tokens)


def connect_all(slots: Iterable[tuple[StatisticsSlot, int]]) -> RoutingStatistics:
    """Give every (slot, number of experts) a row in one new `RoutingStatistics`."""
    pairs = list(slots)
    statistics = RoutingStatistics([num_experts for _, num_experts in pairs])
    for layer, (slot, _) in enumerate(pairs):
        slot.connect(statistics, layer)
    return statistics


def in_backward() -> bool:
    """True while autograd runs a backward pass, where a forward pass is a recomputation."""
    return torch._C._current_graph_task_id() != -1
