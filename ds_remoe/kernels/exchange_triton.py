"""Triton kernels of ds_remoe.kernels.exchange."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_remoe.kernels.backend import on_its_device
from ds_remoe.kernels.exchange import Packed, PeerPrefix, Prefix, Room, mask_words

MAX_BLOCK = 2048
ROWS_AT_ONCE = 512


@triton.jit(do_not_specialize=["rows_room", "pairs_room", "remote_room", "words_room"])
def _pack_kernel(
    x,
    weights,
    mask,
    prefix_rows,
    prefix_pairs,
    rows,
    words,
    row_tokens,
    weight_ids,
    tokens,
    width,
    local,
    row_words,
    me,
    peers,
    x_stride,
    weights_stride_t,
    weights_stride_e,
    mask_stride_t,
    mask_stride_e,
    rows_room,
    pairs_room,
    remote_room,
    words_room,
    BLOCK: tl.constexpr,
):
    """One program a token: its row, weights and masks for every peer that wants it, as far as there is room."""
    token = tl.program_id(0).to(tl.int64)
    bits = tl.arange(0, 32)
    for peer in range(peers):
        place = peer * tokens + token
        pair = tl.load(prefix_pairs + place).to(tl.int64)
        if tl.load(prefix_pairs + place + 1) > pair:
            row = tl.load(prefix_rows + place).to(tl.int64)
            rows_before_peer = tl.load(prefix_rows + peer * tokens).to(tl.int64)
            pairs_through_peer = tl.load(prefix_pairs + (peer + 1) * tokens).to(tl.int64)
            rank = tl.where(peer == peers - 1, me, peer + (peer >= me).to(tl.int32))
            tl.store(row_tokens + row, token, mask=row < rows_room)
            for word in range(row_words):
                column = word * 32 + bits
                expert = rank * local + column
                inside = column < local
                active = tl.load(mask + token * mask_stride_t + expert * mask_stride_e, mask=inside, other=0).to(
                    tl.int32
                )
                value = tl.load(
                    weights + token * weights_stride_t + expert * weights_stride_e, mask=active != 0, other=0.0
                )
                position = pair + tl.cumsum(active, axis=0) - active
                place = position + row_words * rows_before_peer
                tl.store(
                    words + place,
                    value.to(tl.int32, bitcast=True),
                    mask=(active != 0) & (place < words_room),
                )
                tl.store(
                    weight_ids + position,
                    expert.to(tl.int64) * tokens + token,
                    mask=(active != 0) & (position < pairs_room),
                )
                place = row * row_words + pairs_through_peer + word
                tl.store(words + place, tl.sum(active << bits, axis=0), mask=place < words_room)
                pair += tl.sum(active, axis=0)
            if (peer < peers - 1) & (row < remote_room):
                for start in range(0, width, BLOCK):
                    column = start + tl.arange(0, BLOCK)
                    values = tl.load(x + token * x_stride + column, mask=column < width)
                    tl.store(rows + row * width + column, values.to(rows.dtype.element_ty), mask=column < width)


@triton.jit
def _count_bits(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _rows_of_block(peer_rows, peer_pairs, rows, row_words, peers, BLOCK: tl.constexpr):
    """(rows of this program, which exist, where each one's mask begins, how far a pair's weight lies behind its place).

    Each peer's weights stand before the masks of its rows, so both are shifted by what the peers before it sent.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    masks_at = tl.zeros((BLOCK,), dtype=tl.int64)
    weights_at = tl.zeros((BLOCK,), dtype=tl.int64)
    for peer in range(peers):
        first_row = tl.load(peer_rows + peer)
        masks_at = tl.where(row >= first_row, tl.load(peer_pairs + peer + 1), masks_at)
        weights_at = tl.where(row >= first_row, first_row.to(tl.int64) * row_words, weights_at)
    return row, row < rows, masks_at + row.to(tl.int64) * row_words, weights_at


@triton.jit(do_not_specialize=["rows"])
def _count_kernel(words, peer_rows, peer_pairs, counts, rows, experts, row_words, peers, BLOCK: tl.constexpr):
    """One program a block of rows: counts the pairs of each row, and in the block those of each expert."""
    row, inside, masks_at, _ = _rows_of_block(peer_rows, peer_pairs, rows, row_words, peers, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for word in range(row_words):
        value = tl.load(words + masks_at + word, mask=inside, other=0).to(tl.uint32, bitcast=True)
        total += _count_bits(value)
        for bit in range(min(32, experts - 32 * word)):
            block = (32 * word + bit) * tl.num_programs(0) + tl.program_id(0)
            tl.store(counts + rows + 1 + block, tl.sum(((value >> bit) & 1).to(tl.int32), axis=0))
    tl.store(counts + 1 + row, total, mask=inside)
    tl.store(counts + row, 0, mask=row == 0)


@triton.jit(do_not_specialize=["rows", "pairs"])
def _unpack_kernel(
    words,
    peer_rows,
    peer_pairs,
    starts,
    row_ids,
    weights,
    by_row,
    rows,
    pairs,
    row_words,
    peers,
    BLOCK: tl.constexpr,
):
    """One program an expert and block of rows: it lists those that the expert has a pair with."""
    row, inside, masks_at, weights_at = _rows_of_block(peer_rows, peer_pairs, rows, row_words, peers, BLOCK)
    expert = tl.program_id(1)
    own_bit = expert % 32
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for word in range(expert // 32):
        value = tl.load(words + masks_at + word, mask=inside, other=0)
        before += _count_bits(value.to(tl.uint32, bitcast=True))
    value = tl.load(words + masks_at + expert // 32, mask=inside, other=0).to(tl.uint32, bitcast=True)
    before += _count_bits(value & ((tl.full((BLOCK,), 1, tl.uint32) << own_bit) - 1))
    mine = ((value >> own_bit) & 1).to(tl.int32)
    taken = mine != 0
    start = tl.load(starts + rows + expert * tl.num_programs(0) + tl.program_id(0)) - pairs
    place = start + tl.cumsum(mine, axis=0) - 1
    position = tl.load(starts + row, mask=taken, other=0) + before
    weight = tl.load(words + weights_at + position, mask=taken, other=0)
    tl.store(row_ids + place, row.to(tl.int64), mask=taken)
    tl.store(weights + place, weight.to(tl.float32, bitcast=True), mask=taken)
    tl.store(by_row + position, place, mask=taken)


@triton.jit
def _combine_kernel(remote, local, prefix_rows, out, tokens, width, peers, BLOCK: tl.constexpr):
    """One program a token and block of columns: at most one row of each peer, this rank's own first."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = (peers - 1) * tokens + token
    row = tl.load(prefix_rows + place).to(tl.int64)
    remote_rows = tl.load(prefix_rows + (peers - 1) * tokens).to(tl.int64)
    end = tl.where(tl.load(prefix_rows + place + 1) > row, width, 0)
    total = tl.load(local + (row - remote_rows) * width + column, mask=column < end, other=0.0).to(tl.float32)
    for peer in range(peers - 1):
        place = peer * tokens + token
        row = tl.load(prefix_rows + place).to(tl.int64)
        end = tl.where(tl.load(prefix_rows + place + 1) > row, width, 0)
        total += tl.load(remote + row * width + column, mask=column < end, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)


@on_its_device
def pack(
    x_TD: Tensor,
    weights_TE: Tensor,
    mask_TE: Tensor,
    prefix: Prefix,
    me: int,
    room: Room,
    wire_dtype: torch.dtype,
) -> Packed:
    """See ds_remoe.kernels.exchange.pack_ahead."""
    (tokens, width), local = x_TD.shape, mask_TE.shape[1] // prefix.peers
    row_words = mask_words(local, torch.int32)
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    rows = torch.empty(room.remote_rows, width, dtype=wire_dtype, device=x_TD.device)
    words = torch.empty(room.pairs + room.rows * row_words, dtype=torch.int32, device=x_TD.device)
    row_tokens_N = torch.empty(room.rows, dtype=torch.int64, device=x_TD.device)
    weight_ids_K = torch.empty(room.pairs, dtype=torch.int64, device=x_TD.device)
    _pack_kernel[(tokens,)](
        x_TD,
        weights_TE,
        mask_TE,
        prefix.rows,
        prefix.pairs,
        rows,
        words,
        row_tokens_N,
        weight_ids_K,
        tokens,
        width,
        local,
        row_words,
        me,
        prefix.peers,
        x_TD.stride(0),
        *weights_TE.stride(),
        *mask_TE.stride(),
        room.rows,
        room.pairs,
        room.remote_rows,
        len(words),
        BLOCK=min(MAX_BLOCK, triton.next_power_of_2(width)),
    )
    return Packed(rows, words, row_tokens_N, weight_ids_K)


@on_its_device
def unpack(
    words: Tensor, arrived: PeerPrefix, num_experts: int, num_rows: int, num_pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ds_remoe.kernels.exchange.unpack; the fields of the order are the last two."""
    row_ids_M = torch.empty(num_pairs, dtype=torch.int64, device=words.device)
    weights_M = torch.empty(num_pairs, dtype=torch.float32, device=words.device)
    by_row_M = torch.empty(num_pairs, dtype=torch.int32, device=words.device)
    blocks, row_words = triton.cdiv(num_rows, ROWS_AT_ONCE), mask_words(num_experts, torch.int32)
    peers = len(arrived.rows) - 1
    # A zero, the pairs of each row, and those of each expert and block: one running sum gives the places of both.
    starts = torch.empty(1 + num_rows + num_experts * blocks, dtype=torch.int32, device=words.device)
    sides = words, arrived.rows, arrived.pairs
    _count_kernel[(blocks,)](*sides, starts, num_rows, num_experts, row_words, peers, BLOCK=ROWS_AT_ONCE)
    starts.cumsum_(0)
    _unpack_kernel[(blocks, num_experts)](
        *sides,
        starts,
        row_ids_M,
        weights_M,
        by_row_M,
        num_rows,
        num_pairs,
        row_words,
        peers,
        BLOCK=ROWS_AT_ONCE,
    )
    return row_ids_M, weights_M, by_row_M, starts[: num_rows + 1]


@on_its_device
def combine_rows(remote: Tensor, local: Tensor, prefix_rows: Tensor, num_tokens: int) -> Tensor:
    """See ds_remoe.kernels.exchange.combine_rows."""
    width = local.shape[1]
    out = torch.empty(num_tokens, width, dtype=local.dtype, device=local.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    _combine_kernel[(num_tokens, triton.cdiv(width, block))](
        remote.contiguous(),
        local.contiguous(),
        prefix_rows,
        out,
        num_tokens,
        width,
        (len(prefix_rows) - 1) // num_tokens,
        BLOCK=block,
    )
    return out
