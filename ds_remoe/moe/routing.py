"""The routing record: which (token, expert) pairs are active and with what weight.

Shape suffixes of this room: T tokens on this rank, D hidden size, E experts, N active (token, expert) pairs, R ranks in
the expert-parallel group, L experts on one rank, M rows or pairs that arrive on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_remoe.kernels import relu_routing
from ds_remoe.kernels.first_order import first_order
from ds_remoe.kernels.pair_groups import RowOrder


@dataclass(frozen=True)
class Routing:
    """One layer's routing of one micro-batch on this rank; any number of experts a token, none and all included.

    A ReLU routing lies expert-major in memory: its weights_TE and mask_TE are transposed views of [E, T].

    Attributes:
        weights_TE: router weights in fp32 or wider, differentiable; only entries under the mask are read.
        mask_TE: bool, True where the pair is active.
        counts_E: int64, active tokens of each expert.
        block_starts: where the Triton kernels find the pairs (see `ds_remoe.kernels.relu_routing`); None elsewhere.
    """

    weights_TE: Tensor
    mask_TE: Tensor
    counts_E: Tensor
    block_starts: Tensor | None = None

    @classmethod
    def from_mask(cls, weights_TE: Tensor, mask_TE: Tensor) -> Routing:
        """Count the mask and freeze the record."""
        return cls(weights_TE, mask_TE, mask_TE.sum(dim=0))

    @classmethod
    def from_relu_(cls, logits_ET: Tensor, used_token_T: Tensor | None = None) -> tuple[Routing, Tensor]:
        """Route by ReLU(logits), the mask being its non-zero entries; see `relu_routing` for what is not finite.

        Args:
            logits_ET: fp32 or fp64, contiguous; overwritten with the weights.
            used_token_T: where zero or False, the token passes no expert and its weights are 0.

        Returns:
            The routing, and weight_sums_E, each expert's sum of weights, differentiable.
        """
        used_T = None if used_token_T is None else used_token_T.reshape(-1) != 0
        weights_ET, mask_ET, counts_E, weight_sums_E, block_starts = _Activate.apply(logits_ET, used_T)
        return cls(weights_ET.t(), mask_ET.t(), counts_E, block_starts), weight_sums_E

    def pairs(self) -> RoutedPairs:
        """List the active pairs, expert-major and by token within an expert; the host waits for the counts."""
        # Launched ahead of the wait, so that less is left to launch while the device has nothing to do.
        places = relu_routing.token_places(self.mask_TE.t(), self.block_starts)
        counts_E = self.counts_E.tolist()
        token_ids_N, weights_N, by_token_N = _Compact.apply(
            self.weights_TE.t(), self.mask_TE.t(), self.counts_E, self.block_starts, places, sum(counts_E)
        )
        order = None if places is None else RowOrder(by_token_N, places.starts)
        return RoutedPairs(token_ids_N, weights_N, counts_E, order)


@dataclass(frozen=True)
class RoutedPairs:
    """The active pairs of a routing, grouped by expert.

    Attributes:
        token_ids_N: int64.
        weights_N: differentiable, dtype of weights_TE.
        counts_E: of each expert, on the host.
        order: the pairs token by token; None where that is still to be made.
    """

    token_ids_N: Tensor
    weights_N: Tensor
    counts_E: list[int]
    order: RowOrder | None


class _Activate(torch.autograd.Function):
    """`relu_routing.activate_`; keeps the mask, a byte an entry, and no weights."""

    @staticmethod
    def forward(ctx: Any, logits_ET: Tensor, used_T: Tensor | None) -> tuple[Tensor | None, ...]:
        found = relu_routing.activate_(logits_ET, used_T)
        ctx.mark_dirty(logits_ET)
        ctx.mark_non_differentiable(*(t for t in (found.mask_ET, found.counts_E, found.block_starts) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(found.mask_ET)
        return logits_ET, found.mask_ET, found.counts_E, found.weight_sums_E, found.block_starts

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        (mask_ET,) = ctx.saved_tensors
        return relu_routing.activate_backward(grads[0], grads[3], mask_ET), None


class _Compact(torch.autograd.Function):
    """`relu_routing.compact`; keeps what finds the pairs again."""

    @staticmethod
    def forward(
        ctx: Any,
        weights_ET: Tensor,
        mask_ET: Tensor,
        counts_E: Tensor,
        block_starts: Tensor | None,
        places: relu_routing.TokenPlaces | None,
        num_pairs: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        pairs = relu_routing.compact(weights_ET, mask_ET, counts_E, block_starts, places, num_pairs)
        ctx.mark_non_differentiable(*(t for t in (pairs.token_ids_N, pairs.by_token_N) if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask_ET, pairs.positions)
        return pairs.token_ids_N, pairs.weights_N, pairs.by_token_N

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
        mask_ET, positions = ctx.saved_tensors
        grad = None if grads[1] is None else relu_routing.compact_backward(grads[1], mask_ET, positions)
        return grad, None, None, None, None, None
