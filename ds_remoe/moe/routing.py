"""The routing record: which (token, expert) pairs are active and with what weight.

Shape suffixes of this room: T tokens on this rank, D hidden size, E experts, N active (token, expert) pairs, R ranks in
the expert-parallel group, L experts on one rank, M rows or pairs that arrive on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """One layer's routing of one micro-batch on this rank; any number of experts a token, none and all included.

    Attributes:
        weights_TE: router weights in fp32 or wider, differentiable; only entries under the mask are read.
        mask_TE: bool, True where the pair is active.
        counts_E: int64, active tokens of each expert.
    """

    weights_TE: Tensor
    mask_TE: Tensor
    counts_E: Tensor

    @classmethod
    def from_mask(cls, weights_TE: Tensor, mask_TE: Tensor) -> Routing:
        """Count the mask and freeze the record."""
        return cls(weights_TE, mask_TE, mask_TE.sum(dim=0))

    def pairs(self, num_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
        """List the active pairs, expert-major and by token within an expert.

        Args:
            num_pairs: N, as counted; passed in because reading it off the device would wait for the device.

        Returns:
            token_ids_N (int64), expert_ids_N (int64), weights_N (differentiable, dtype of weights_TE).
        """
        pairs_N2 = torch.nonzero_static(self.mask_TE.t(), size=num_pairs)
        expert_ids_N, token_ids_N = pairs_N2.unbind(1)
        flat_N = token_ids_N * self.mask_TE.shape[1] + expert_ids_N
        return token_ids_N, expert_ids_N, _TakeUnique.apply(self.weights_TE, flat_N)


class _TakeUnique(torch.autograd.Function):
    """values.flatten()[index] for an index without repeats: its backward is a plain, deterministic scatter."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.shape = values.shape
        return values.reshape(-1).index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        flat = grads[0].new_zeros(ctx.shape.numel())
        return flat.scatter_(0, index_N, grads[0]).view(ctx.shape), None
