"""The router's epilogue: logits to ReLU weights, mask, counts and weight sums, then the list of active pairs; and back.

All of it is expert-major, [E, T]: the pairs of an expert then lie side by side in memory, in the order in which the
experts want them, and listing them needs no sort. Only the mask and the pairs' positions are kept for backward.

A logit of NaN or -inf has the weight NaN and is active, so that a token that is not finite comes out of the layer as
such: by ReLU alone it would pass no expert, and its output of zero would hide it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ds_remoe.kernels.backend import use_triton


@dataclass(frozen=True)
class Activation:
    """What `activate_` finds.

    Attributes:
        mask_ET: bool, True where the weight is not zero.
        counts_E: int64, active tokens of each expert.
        weight_sums_E: sum of each expert's weights, in their dtype; NaN where one of its weights is.
        block_starts: int64 [E, blocks of tokens], number of pairs listed before each block, for the Triton kernels;
            None where the twin ran.
    """

    mask_ET: Tensor
    counts_E: Tensor
    weight_sums_E: Tensor
    block_starts: Tensor | None


@dataclass(frozen=True)
class TokenPlaces:
    """Where each pair stands in the list of pairs by token and by expert within a token.

    Attributes:
        ranks_ET: int16, active experts of the token before this one; written under the mask alone.
        starts: int32 [T + 1], pairs of the tokens before each, and their number.
    """

    ranks_ET: Tensor
    starts: Tensor


@dataclass(frozen=True)
class Pairs:
    """Active (token, expert) pairs, expert-major and by token within an expert.

    Attributes:
        token_ids_N: int64.
        weights_N: their weights.
        by_token_N: int32, the pairs ordered by token, for a list made with `TokenPlaces`; else None.
        positions: what `compact_backward` takes: the pairs' flat positions in [E, T], or the block starts.
    """

    token_ids_N: Tensor
    weights_N: Tensor
    by_token_N: Tensor | None
    positions: Tensor


def activate_(logits_ET: Tensor, used_T: Tensor | None = None) -> Activation:
    """Replace logits by weights, ReLU(logits), in place, and count them.

    Args:
        logits_ET: fp32 or fp64, contiguous; overwritten.
        used_T: bool; the weights of the other tokens become 0.

    Raises:
        ValueError: the logits are not contiguous.
    """
    if not logits_ET.is_contiguous():
        raise ValueError(
            f"activate_: logits_ET has the strides {logits_ET.stride()}, but is overwritten expert by expert: it must "
            "be contiguous [E, T]; compute it as weight_ED @ x_TD.t()"
        )
    if use_triton(logits_ET):
        return Activation(*_triton().activate_(logits_ET, used_T))
    return torch_activate_(logits_ET, used_T)


def activate_backward(
    grad_weights_ET: Tensor | None, grad_weight_sums_E: Tensor | None, mask_ET: Tensor
) -> Tensor | None:
    """Gradient of the logits: that of the weights plus that of their sums (the L1 term), where the mask is True.

    Args:
        grad_weights_ET, grad_weight_sums_E: None where nothing came back.

    Returns:
        [E, T] in the dtype of the gradients; None where both are None.
    """
    grad = grad_weights_ET if grad_weights_ET is not None else grad_weight_sums_E
    if grad is None:
        return None
    if use_triton(grad) and mask_ET.numel():
        gradient: Tensor = _triton().activate_backward(grad_weights_ET, grad_weight_sums_E, mask_ET)
        return gradient
    return torch_activate_backward(grad_weights_ET, grad_weight_sums_E, mask_ET)


def token_places(mask_ET: Tensor, block_starts: Tensor | None) -> TokenPlaces | None:
    """Number the pairs by token, without a read from the device; None where the twin ran, which does not."""
    return None if block_starts is None else TokenPlaces(*_triton().token_places(mask_ET))


def compact(
    weights_ET: Tensor,
    mask_ET: Tensor,
    counts_E: Tensor,
    block_starts: Tensor | None,
    places: TokenPlaces | None,
    num_pairs: int,
) -> Pairs:
    """List the active pairs.

    Args:
        weights_ET: router weights.
        mask_ET, counts_E, block_starts: see `Activation`. Without block starts the twin runs, for any strides.
        places: of `token_places`, with block starts.
        num_pairs: N, the sum of the counts, on the host.
    """
    if block_starts is None or places is None:
        return torch_compact(weights_ET, mask_ET, counts_E, num_pairs)
    token_ids_N, weights_N, by_token_N = _triton().compact(
        weights_ET, mask_ET, block_starts, places.ranks_ET, places.starts, num_pairs
    )
    return Pairs(token_ids_N, weights_N, by_token_N, block_starts)


def compact_backward(grad_weights_N: Tensor, mask_ET: Tensor, positions: Tensor) -> Tensor:
    """Bring the gradient of the pairs' weights to [E, T]; zero where no pair is."""
    if positions.dim() == 2:
        gradient: Tensor = _triton().compact_backward(grad_weights_N, mask_ET, positions)
        return gradient
    return torch_compact_backward(grad_weights_N, mask_ET, positions)


def torch_activate_(logits_ET: Tensor, used_T: Tensor | None = None) -> Activation:
    """The plain-torch twin."""
    weights_ET = logits_ET.masked_fill_(logits_ET == -math.inf, math.nan).relu_()
    if used_T is not None:
        weights_ET.masked_fill_(~used_T, 0.0)
    mask_ET = weights_ET != 0
    return Activation(mask_ET, mask_ET.sum(dim=1), weights_ET.sum(dim=1), None)


def torch_activate_backward(
    grad_weights_ET: Tensor | None, grad_weight_sums_E: Tensor | None, mask_ET: Tensor
) -> Tensor | None:
    """The plain-torch twin. Products with the mask, as the CPU's `where` branches at each element."""
    if grad_weight_sums_E is None:
        return None if grad_weights_ET is None else grad_weights_ET * mask_ET
    if grad_weights_ET is None:
        return grad_weight_sums_E.unsqueeze(1) * mask_ET
    return (grad_weights_ET + grad_weight_sums_E.unsqueeze(1)).mul_(mask_ET)


def torch_compact(weights_ET: Tensor, mask_ET: Tensor, counts_E: Tensor, num_pairs: int) -> Pairs:
    """The plain-torch twin, and NumPy's on the CPU: without branches it is several times faster than torch's."""
    experts, tokens = mask_ET.shape
    if mask_ET.device.type == "cpu":
        positions_N = torch.from_numpy(np.flatnonzero(mask_ET.numpy()))
    else:
        positions_N = torch.nonzero_static(mask_ET.reshape(-1), size=num_pairs).squeeze(1)
    expert_ids_N = torch.arange(experts, device=mask_ET.device).repeat_interleave(counts_E, output_size=num_pairs)
    token_ids_N = torch.sub(positions_N, expert_ids_N, alpha=tokens)
    weights_N = weights_ET.reshape(-1).index_select(0, positions_N)
    return Pairs(token_ids_N, weights_N, None, positions_N)


def torch_compact_backward(grad_weights_N: Tensor, mask_ET: Tensor, positions_N: Tensor) -> Tensor:
    """The plain-torch twin: a scatter without repeats, so in no order that could matter."""
    grad_weights_ET = grad_weights_N.new_zeros(mask_ET.shape)
    grad_weights_ET.view(-1).scatter_(0, positions_N, grad_weights_N)
    return grad_weights_ET


@functools.cache
def _triton() -> ModuleType:
    from ds_remoe.kernels import relu_routing_triton

    return relu_routing_triton
