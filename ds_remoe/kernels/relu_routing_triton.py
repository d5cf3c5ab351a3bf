"""Triton kernels of ds_remoe.kernels.relu_routing: most have one program for each expert and block of its tokens.

A pair's place in the list is the number of pairs before its block plus those before it in the block, so both the list
and its gradient are written in one pass, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_remoe.kernels.backend import on_its_device

SMALLEST_BLOCK, LARGEST_BLOCK = 32, 8192
WANTED_BLOCK = 1024
MOST_BLOCKS = 64
CHUNK = 4096
RANKED_TOKENS = 128
"""Tokens of a program that goes through all experts: few, so that many programs share the loads' latency."""


@triton.jit
def _tokens_of_block(tokens, BLOCK: tl.constexpr):
    """(expert, token ids, which of them exist, offsets in [E, T]) of this program."""
    expert = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return expert, token, token < tokens, expert * tokens + token


@triton.jit
def _activate(logits, used, mask, block_counts, block_sums, tokens, HAS_USED: tl.constexpr, BLOCK: tl.constexpr):
    expert, token, inside, place = _tokens_of_block(tokens, BLOCK)
    logit = tl.load(logits + place, mask=inside, other=0.0)
    if HAS_USED:
        logit = tl.where(tl.load(used + token, mask=inside, other=0) != 0, logit, 0.0)
    weight = tl.where(logit <= 0, 0.0, logit)  # not a maximum: NaN stays
    weight = tl.where(logit == float("-inf"), float("nan"), weight)
    active = weight != 0
    tl.store(logits + place, weight, mask=inside)
    tl.store(mask + place, active.to(tl.uint8), mask=inside)
    block = expert * tl.num_programs(0) + tl.program_id(0)
    tl.store(block_counts + block, tl.sum(active.to(tl.int32), axis=0))
    tl.store(block_sums + block, tl.sum(weight, axis=0))


@triton.jit
def _add_up(block_counts, block_sums, counts, sums, block_starts, blocks, BLOCKS: tl.constexpr, CHUNK: tl.constexpr):
    expert = tl.program_id(0)
    first = expert * blocks
    before = tl.zeros((CHUNK,), dtype=tl.int64)
    for start in range(0, first, CHUNK):
        index = start + tl.arange(0, CHUNK)
        before += tl.load(block_counts + index, mask=index < first, other=0)
    block = tl.arange(0, BLOCKS)
    inside = block < blocks
    count = tl.load(block_counts + first + block, mask=inside, other=0).to(tl.int64)
    tl.store(counts + expert, tl.sum(count, axis=0))
    tl.store(sums + expert, tl.sum(tl.load(block_sums + first + block, mask=inside, other=0.0), axis=0))
    tl.store(block_starts + first + block, tl.sum(before, axis=0) + tl.cumsum(count, axis=0) - count, mask=inside)


@triton.jit
def _pair_places(mask, block_starts, expert, place, inside, num_pairs):
    """(which tokens of the block are active, their places in the list of pairs)."""
    active = tl.load(mask + place, mask=inside, other=0) != 0
    start = tl.load(block_starts + expert * tl.num_programs(0) + tl.program_id(0))
    pair = start + tl.cumsum(active.to(tl.int32), axis=0) - 1
    return active & (pair < num_pairs), pair


@triton.jit
def _rank_experts(mask, ranks, totals, tokens, experts, BLOCK: tl.constexpr):
    """One program a block of tokens: it goes through the experts and counts."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    place = token.to(tl.int64)
    for _ in range(experts):
        active = tl.load(mask + place, mask=inside, other=0) != 0
        tl.store(ranks + place, total.to(tl.int16), mask=active)
        total += active.to(tl.int32)
        place += tokens
    tl.store(totals + 1 + token, total, mask=inside)
    tl.store(totals + token, 0, mask=token == 0)


@triton.jit(do_not_specialize=["num_pairs"])
def _compact(
    weights, mask, block_starts, ranks, starts, token_ids, out, by_token, tokens, num_pairs, BLOCK: tl.constexpr
):
    expert, token, inside, place = _tokens_of_block(tokens, BLOCK)
    active, pair = _pair_places(mask, block_starts, expert, place, inside, num_pairs)
    tl.store(token_ids + pair, token.to(tl.int64), mask=active)
    tl.store(out + pair, tl.load(weights + place, mask=active, other=0.0), mask=active)
    index = tl.load(starts + token, mask=active, other=0) + tl.load(ranks + place, mask=active, other=0)
    tl.store(by_token + index, pair.to(tl.int32), mask=active)


@triton.jit(do_not_specialize=["num_pairs"])
def _compact_backward(grad, mask, block_starts, out, tokens, num_pairs, BLOCK: tl.constexpr):
    expert, _, inside, place = _tokens_of_block(tokens, BLOCK)
    active, pair = _pair_places(mask, block_starts, expert, place, inside, num_pairs)
    tl.store(out + place, tl.load(grad + pair, mask=active, other=0.0), mask=inside)


@triton.jit
def _activate_backward(
    grad_weights,
    grad_sums,
    mask,
    out,
    tokens,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    expert, _, inside, place = _tokens_of_block(tokens, BLOCK)
    active = tl.load(mask + place, mask=inside, other=0) != 0
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_WEIGHTS:
        total += tl.load(grad_weights + place, mask=active, other=0.0)
    if HAS_SUMS:
        total += tl.load(grad_sums + expert)
    tl.store(out + place, tl.where(active, total, 0.0), mask=inside)


@on_its_device
def activate_(logits_ET: Tensor, used_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ds_remoe.kernels.relu_routing.activate_; the fields of `Activation` in their order."""
    experts, tokens = logits_ET.shape
    block, blocks = _blocks(tokens)
    mask_ET = torch.empty_like(logits_ET, dtype=torch.bool)
    block_counts = torch.empty(experts, blocks, dtype=torch.int32, device=logits_ET.device)
    block_sums = torch.empty(experts, blocks, dtype=logits_ET.dtype, device=logits_ET.device)
    _activate[(blocks, experts)](
        logits_ET,
        logits_ET if used_T is None else used_T.contiguous().view(torch.uint8),
        mask_ET.view(torch.uint8),
        block_counts,
        block_sums,
        tokens,
        HAS_USED=used_T is not None,
        BLOCK=block,
    )
    counts_E = torch.empty(experts, dtype=torch.int64, device=logits_ET.device)
    weight_sums_E = torch.empty(experts, dtype=logits_ET.dtype, device=logits_ET.device)
    block_starts = torch.empty(experts, blocks, dtype=torch.int64, device=logits_ET.device)
    _add_up[(experts,)](
        block_counts,
        block_sums,
        counts_E,
        weight_sums_E,
        block_starts,
        blocks,
        BLOCKS=triton.next_power_of_2(blocks),
        CHUNK=CHUNK,
    )
    return mask_ET, counts_E, weight_sums_E, block_starts


@on_its_device
def activate_backward(grad_weights_ET: Tensor | None, grad_weight_sums_E: Tensor | None, mask_ET: Tensor) -> Tensor:
    """See ds_remoe.kernels.relu_routing.activate_backward; one of the gradients is there."""
    experts, tokens = mask_ET.shape
    block, blocks = _blocks(tokens)
    grads = [grad.contiguous() for grad in (grad_weights_ET, grad_weight_sums_E) if grad is not None]
    out = torch.empty(experts, tokens, dtype=grads[0].dtype, device=mask_ET.device)
    _activate_backward[(blocks, experts)](
        grads[0],
        grads[-1],
        mask_ET.view(torch.uint8),
        out,
        tokens,
        HAS_WEIGHTS=grad_weights_ET is not None,
        HAS_SUMS=grad_weight_sums_E is not None,
        BLOCK=block,
    )
    return out


@on_its_device
def token_places(mask_ET: Tensor) -> tuple[Tensor, Tensor]:
    """See ds_remoe.kernels.relu_routing.token_places; the fields of `TokenPlaces` in their order."""
    experts, tokens = mask_ET.shape
    ranks_ET = torch.empty(experts, tokens, dtype=torch.int16, device=mask_ET.device)
    totals = torch.empty(tokens + 1, dtype=torch.int32, device=mask_ET.device)
    _rank_experts[(triton.cdiv(tokens, RANKED_TOKENS),)](
        mask_ET.view(torch.uint8), ranks_ET, totals, tokens, experts, BLOCK=RANKED_TOKENS
    )
    return ranks_ET, totals.cumsum_(0)


@on_its_device
def compact(
    weights_ET: Tensor, mask_ET: Tensor, block_starts: Tensor, ranks_ET: Tensor, starts: Tensor, num_pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ds_remoe.kernels.relu_routing.compact; the first fields of `Pairs` in their order."""
    experts, tokens = mask_ET.shape
    block, blocks = _blocks(tokens)
    token_ids_N = torch.empty(num_pairs, dtype=torch.int64, device=mask_ET.device)
    weights_N = torch.empty(num_pairs, dtype=weights_ET.dtype, device=mask_ET.device)
    by_token_N = torch.empty(num_pairs, dtype=torch.int32, device=mask_ET.device)
    if num_pairs:
        _compact[(blocks, experts)](
            weights_ET.contiguous(),
            mask_ET.view(torch.uint8),
            block_starts,
            ranks_ET,
            starts,
            token_ids_N,
            weights_N,
            by_token_N,
            tokens,
            num_pairs,
            BLOCK=block,
        )
    return token_ids_N, weights_N, by_token_N


@on_its_device
def compact_backward(grad_weights_N: Tensor, mask_ET: Tensor, block_starts: Tensor) -> Tensor:
    """See ds_remoe.kernels.relu_routing.compact_backward."""
    experts, tokens = mask_ET.shape
    block, blocks = _blocks(tokens)
    out = torch.empty(experts, tokens, dtype=grad_weights_N.dtype, device=mask_ET.device)
    _compact_backward[(blocks, experts)](
        grad_weights_N.contiguous(),
        mask_ET.view(torch.uint8),
        block_starts,
        out,
        tokens,
        len(grad_weights_N),
        BLOCK=block,
    )
    return out


def _blocks(tokens: int) -> tuple[int, int]:
    """(tokens of a block, number of blocks): at most MOST_BLOCKS an expert, unless the blocks grew too large."""
    wanted = min(tokens, max(WANTED_BLOCK, triton.cdiv(tokens, MOST_BLOCKS)))
    block = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, triton.next_power_of_2(wanted)))
    return block, triton.cdiv(tokens, block)
