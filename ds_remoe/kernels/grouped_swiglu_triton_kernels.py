# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of ds_remoe.kernels.grouped_swiglu_triton.

M pairs, D hidden size, H width of an expert, L experts. A kernel over pairs has one program for each tile of the tile
table and block of columns; pairs name their row of the activations by its id, so no copy of the rows in pair order is
made. All sums are in fp32 and in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_remoe.kernels.grouped_swiglu_triton_tuning import INTERPRETED, tuned

GROUP = tl.constexpr(8)
"""Tiles that are walked together through all columns, so that their rows and the weights stay in the L2 cache."""

WIDEN = tl.constexpr(INTERPRETED)
"""The interpreter multiplies the bit patterns of bf16, so there the factors become fp32 first, which is exact."""


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a · b."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _place(blocks):
    """(tile, block of columns) of this program."""
    program = tl.program_id(0)
    tiles = tl.num_programs(0) // blocks
    first = program // (GROUP * blocks) * GROUP
    size = min(tiles - first, GROUP)
    inside = program % (GROUP * blocks)
    return first + inside % size, inside // size


@triton.jit
def _span(table, index):
    """(expert, first pair, number of pairs) of a table's row."""
    expert = tl.load(table + 3 * index).to(tl.int64)
    start = tl.load(table + 3 * index + 1).to(tl.int64)
    return expert, start, tl.load(table + 3 * index + 2)


@tuned(key=["D", "H", "BLOCK_M"], matrices=2)
@triton.jit
def swiglu_forward(
    rows,
    row_ids,
    weights,
    gate_up,
    pre_activation,
    hidden,
    tiles,
    D,
    H,
    BLOCK_M: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """pre_activation[m] = gate_up[e] · rows[row[m]]; with STORE_HIDDEN also hidden[m] = w[m] · silu(gate) · up."""
    tile, block = _place(tl.cdiv(H, BLOCK_N))
    expert, start, count = _span(tiles, tile)
    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Lanes outside read row 0 or weight row 0 and store nothing. Along a contiguous dimension a mask does it, as a
    # choice of addresses would hide from the compiler that it may load several elements at once.
    row = tl.load(row_ids + start + m, mask=m < count, other=0).to(tl.int64)
    column = tl.where(n < H, n, 0)
    x_at = rows + row[:, None] * D + k[None, :]
    gate_at = gate_up + expert * 2 * H * D + column[None, :] * D + k[:, None]
    up_at = gate_at + H * D
    gate_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, D, BLOCK_K):
        x = tl.load(x_at, mask=k[None, :] < D - done, other=0.0)
        gate_block = tl.load(gate_at, mask=k[:, None] < D - done, other=0.0)
        up_block = tl.load(up_at, mask=k[:, None] < D - done, other=0.0)
        gate_sum = _dot(x, gate_block, gate_sum, PRECISION)
        up_sum = _dot(x, up_block, up_sum, PRECISION)
        x_at += BLOCK_K
        gate_at += BLOCK_K
        up_at += BLOCK_K

    inside = (m < count)[:, None] & (n < H)[None, :]
    # Rounded as stored, as backward starts from what is stored.
    gate_stored = gate_sum.to(pre_activation.dtype.element_ty)
    up_stored = up_sum.to(pre_activation.dtype.element_ty)
    pre_at = pre_activation + start * 2 * H + (m[:, None] * 2 * H + n[None, :])
    tl.store(pre_at, gate_stored, mask=inside)
    tl.store(pre_at + H, up_stored, mask=inside)
    if STORE_HIDDEN:
        weight = tl.load(weights + start + m, mask=m < count, other=0.0).to(tl.float32)
        gate = gate_stored.to(tl.float32)
        value = gate * tl.sigmoid(gate) * up_stored.to(tl.float32) * weight[:, None]
        hidden_at = hidden + start * H + (m[:, None] * H + n[None, :])
        tl.store(hidden_at, value.to(hidden.dtype.element_ty), mask=inside)


@tuned(key=["N", "K", "stride_k", "BLOCK_M"])
@triton.jit
def pair_matmul(
    pair_rows,
    matrices,
    result,
    tiles,
    N,
    K,
    stride_n,
    stride_k,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """result[m, n] = Σ_k pair_rows[m, k] · matrices[e][n, k], a matrix lying with the strides given."""
    tile, block = _place(tl.cdiv(N, BLOCK_N))
    expert, start, count = _span(tiles, tile)
    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = start + tl.where(m < count, m, 0)
    a_at = pair_rows + row[:, None] * K + k[None, :]
    b_at = matrices + expert * N * K + n[None, :] * stride_n + k[:, None] * stride_k
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, K, BLOCK_K):
        a = tl.load(a_at, mask=k[None, :] < K - done, other=0.0)
        b = tl.load(b_at, mask=(k[:, None] < K - done) & (n[None, :] < N), other=0.0)
        total = _dot(a, b, total, PRECISION)
        a_at += BLOCK_K
        b_at += BLOCK_K * stride_k
    inside = (m < count)[:, None] & (n < N)[None, :]
    at = result + start * N + (m[:, None] * N + n[None, :])
    tl.store(at, total.to(result.dtype.element_ty), mask=inside)


@tuned(key=["D", "H", "BLOCK_M"], max_sums=64)
@triton.jit(do_not_specialize=["pairs"])
def swiglu_backward(
    grad_out,
    row_ids,
    weights,
    down,
    pre_activation,
    grad_pre,
    hidden,
    grad_weight_parts,
    tiles,
    pairs,
    D,
    H,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad of the weighted hidden[m] = grad_out[row[m]] · down[e], and through the SwiGLU at once.

    Writes grad_pre, hidden again, and into each of the first ⌈H / BLOCK_N⌉ rows of grad_weight_parts the share that a
    block of columns has in the routing weights' gradients.
    """
    tile, block = _place(tl.cdiv(H, BLOCK_N))
    expert, start, count = _span(tiles, tile)
    m = tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.load(row_ids + start + m, mask=m < count, other=0).to(tl.int64)
    a_at = grad_out + row[:, None] * D + k[None, :]
    b_at = down + expert * D * H + k[:, None] * H + n[None, :]
    upstream = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, D, BLOCK_K):
        a = tl.load(a_at, mask=k[None, :] < D - done, other=0.0)
        b = tl.load(b_at, mask=(k[:, None] < D - done) & (n[None, :] < H), other=0.0)
        upstream = _dot(a, b, upstream, PRECISION)
        a_at += BLOCK_K
        b_at += BLOCK_K * H

    weight = tl.load(weights + start + m, mask=m < count, other=0.0).to(tl.float32)[:, None]
    pre_activation += start * 2 * H
    grad_pre += start * 2 * H
    hidden += start * H
    # In two halves, as the epilogue of a whole tile does not fit into the registers.
    halves = tl.permute(tl.reshape(upstream, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    low, high = tl.split(halves)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    share = _swiglu_backward_half(low, weight, pre_activation, grad_pre, hidden, m, count, n, H)
    n += BLOCK_N // 2
    share += _swiglu_backward_half(high, weight, pre_activation, grad_pre, hidden, m, count, n, H)
    tl.store(grad_weight_parts + block.to(tl.int64) * pairs + start + m, share, mask=m < count)


@triton.jit
def _swiglu_backward_half(upstream, weight, pre_activation, grad_pre, hidden, m, count, n, H):
    """Write grad_pre and hidden of rows m and columns n from the hidden's gradient; return Σ_n upstream · silu · up."""
    inside = (m < count)[:, None] & (n < H)[None, :]
    at = m[:, None] * 2 * H + n[None, :]
    gate = tl.load(pre_activation + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pre_activation + H + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    hidden_at = hidden + (m[:, None] * H + n[None, :])
    tl.store(hidden_at, (silu * up * weight).to(hidden.dtype.element_ty), mask=inside)
    share = tl.sum(upstream * silu * up, axis=1)
    weighted = upstream * weight
    tl.store(grad_pre + H + at, (weighted * silu).to(grad_pre.dtype.element_ty), mask=inside)
    grad_gate = weighted * up * (sigmoid + silu - silu * sigmoid)
    tl.store(grad_pre + at, grad_gate.to(grad_pre.dtype.element_ty), mask=inside)
    return share


@tuned(key=["I", "J", "GATHER_LEFT"], restore=["grad"])
@triton.jit
def weight_gradient(
    left,
    right,
    row_ids,
    grad,
    experts,
    I,  # noqa: E741
    J,
    GATHER_LEFT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad[e][i, j] = Σ over the pairs m of e of left[m, i] · right[m, j]; added with ACCUMULATE.

    One of the two is taken by row_ids[m] instead of m. An expert without pairs gets zeros.
    """
    blocks_j = tl.cdiv(J, BLOCK_N)
    blocks = tl.cdiv(I, BLOCK_M) * blocks_j
    expert, start, count = _span(experts, tl.program_id(0) // blocks)
    inside = tl.program_id(0) % blocks
    group = inside // (GROUP * blocks_j) * GROUP
    size = min(tl.cdiv(I, BLOCK_M) - group, GROUP)
    inside = inside % (GROUP * blocks_j)
    i = (group + inside % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = inside // size * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_K)
    left_at = left + i[:, None]
    right_at = right + j[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, count, BLOCK_K):
        pair = start + done + m
        valid = m < count - done
        row = tl.load(row_ids + pair, mask=valid, other=0).to(tl.int64)
        left_row, right_row = (row, pair) if GATHER_LEFT else (pair, row)
        a = tl.load(left_at + left_row[None, :] * I, mask=valid[None, :] & (i < I)[:, None], other=0.0)
        b = tl.load(right_at + right_row[:, None] * J, mask=valid[:, None] & (j < J)[None, :], other=0.0)
        total = _dot(a, b, total, PRECISION)
    at = grad + expert * I * J + i[:, None].to(tl.int64) * J + j[None, :]
    inside_grad = (i < I)[:, None] & (j < J)[None, :]
    if ACCUMULATE:
        total += tl.load(at, mask=inside_grad, other=0.0).to(tl.float32)
    tl.store(at, total.to(grad.dtype.element_ty), mask=inside_grad)
