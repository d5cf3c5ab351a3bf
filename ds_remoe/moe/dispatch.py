"""Dispatch and combine over the expert-parallel group: each token goes once to each rank that owns one of its experts.

A rank sends to another one segment of bytes: the rows of its tokens, then a weight and a row number for each active
pair. Sizes differ freely. The pair counts per expert travel ahead, and reading them is the layer's only wait for the
device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_remoe.moe.routing import Routing

ROW_ID_BYTES = 4


@dataclass(frozen=True)
class Dispatched:
    """What the experts of this rank work on.

    Attributes:
        rows: [M_rows, D] token rows; may hold rows between the segments that no pair names.
        in_row_ids_M: row of `rows` of each pair, grouped by local expert.
        out_row_ids_M: row of the result of each pair.
        weights_M: routing weight of each pair, differentiable.
        counts_L: pairs of each local expert, on the host.
        num_out_rows: rows of the result.
        plan: what `combine` needs to send results home; None without expert parallelism.
    """

    rows: Tensor
    in_row_ids_M: Tensor
    out_row_ids_M: Tensor
    weights_M: Tensor
    counts_L: list[int]
    num_out_rows: int
    plan: ExchangePlan | None


@dataclass(frozen=True)
class ExchangePlan:
    """Sizes and indices of one layer's exchange.

    Attributes:
        send_rows_R / recv_rows_R: tokens to and from each rank.
        send_pairs_R / recv_pairs_R: pairs to and from each rank.
        row_tokens_N: home token of each row sent, by rank and token.
        group: the expert-parallel group.
    """

    send_rows_R: list[int]
    recv_rows_R: list[int]
    send_pairs_R: list[int]
    recv_pairs_R: list[int]
    row_tokens_N: Tensor
    group: dist.ProcessGroup


def dispatch(x_TD: Tensor, routing: Routing, group: dist.ProcessGroup | None) -> Dispatched:
    """Bring each token to the ranks of its active experts.

    Args:
        x_TD: tokens of this rank.
        routing: their routing over all experts.
        group: expert-parallel group; None or a group of one rank means that all experts are here.
    """
    if group is None or dist.get_world_size(group) == 1:
        counts_L = routing.counts_E.tolist()
        token_ids_N, _, weights_N = routing.pairs(sum(counts_L))
        return Dispatched(x_TD, token_ids_N, token_ids_N, weights_N, counts_L, x_TD.shape[0], None)

    ranks = dist.get_world_size(group)
    needed_RT = routing.mask_TE.unflatten(1, (ranks, -1)).any(dim=-1).t()
    sent_RC = torch.cat([routing.counts_E.view(ranks, -1), needed_RT.sum(dim=1, keepdim=True)], dim=1)
    received_RC = torch.empty_like(sent_RC)
    dist.all_to_all_single(received_RC, sent_RC.contiguous(), group=group)
    sent, received = torch.stack([sent_RC, received_RC]).tolist()

    send_rows_R, recv_rows_R = [row[-1] for row in sent], [row[-1] for row in received]
    send_pairs_R, recv_pairs_R = [sum(row[:-1]) for row in sent], [sum(row[:-1]) for row in received]
    row_tokens_N = torch.nonzero_static(needed_RT, size=sum(send_rows_R))[:, 1]
    plan = ExchangePlan(send_rows_R, recv_rows_R, send_pairs_R, recv_pairs_R, row_tokens_N, group)

    token_ids_N, expert_ids_N, weights_N = routing.pairs(sum(send_pairs_R))
    row_of_token_RT = needed_RT.cumsum(dim=1) - 1
    owner_N = expert_ids_N // (routing.mask_TE.shape[1] // ranks)
    row_ids_N = row_of_token_RT[owner_N, token_ids_N].to(torch.int32)

    order_M, source_M = _group_by_expert(received_RC[:, :-1], sum(recv_pairs_R))
    rows, weights_M, row_ids_M = _SendTokens.apply(x_TD, weights_N, row_ids_N, plan)
    layout = _Segments.of(recv_rows_R, recv_pairs_R, x_TD, weights_N, ROW_ID_BYTES)
    recv_rows_dR = received_RC[:, -1]
    segment_rows_dR = layout.rows_on_device(recv_rows_dR, received_RC[:, :-1].sum(dim=1))
    in_row_ids_M = row_ids_M + _exclusive_sum(segment_rows_dR)[source_M]
    out_row_ids_M = row_ids_M + _exclusive_sum(recv_rows_dR)[source_M]
    return Dispatched(
        rows=rows,
        in_row_ids_M=in_row_ids_M[order_M],
        out_row_ids_M=out_row_ids_M[order_M],
        weights_M=_Permute.apply(weights_M, order_M),
        counts_L=[sum(column) for column in zip(*(row[:-1] for row in received), strict=True)],
        num_out_rows=sum(recv_rows_R),
        plan=plan,
    )


def combine(out_MD: Tensor, plan: ExchangePlan | None, num_tokens: int) -> Tensor:
    """Send each row of results home and add up the at most R rows of a token: [M, D] → [T, D]."""
    return out_MD if plan is None else _ReturnRows.apply(out_MD, plan, num_tokens)


def _exclusive_sum(sizes: Tensor) -> Tensor:
    """First index of each of the consecutive blocks of these sizes."""
    return sizes.cumsum(0) - sizes


def _group_by_expert(counts_RL: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Reorder pairs that arrived by (source rank, expert) to (expert, source rank), without a read from the device.

    Args:
        counts_RL: int64, pairs of each source rank and local expert.
        total: their sum, known to the host.

    Returns:
        order_M: arrival position of each pair in the new order; source_M: source rank of each pair as it arrived.
    """
    starts_RL = _exclusive_sum(counts_RL.flatten()).view_as(counts_RL)
    lengths_LR = counts_RL.t().flatten()
    shift_M = (starts_RL.t().flatten() - _exclusive_sum(lengths_LR)).repeat_interleave(lengths_LR, output_size=total)
    ranks = torch.arange(counts_RL.shape[0], device=counts_RL.device)
    source_M = ranks.repeat_interleave(counts_RL.sum(dim=1), output_size=total)
    return torch.arange(total, device=counts_RL.device) + shift_M, source_M


@dataclass(frozen=True)
class _Segments:
    """Layout of one side of an exchange: per rank its rows, then its pairs' bytes, padded to whole rows.

    Padding to rows lets the receiver view the whole buffer as [rows, D] and use it without another copy.
    """

    token_rows_R: list[int]
    pairs_R: list[int]
    row_bytes: int
    pair_bytes: int

    @classmethod
    def of(cls, token_rows_R: list[int], pairs_R: list[int], x: Tensor, weights: Tensor, id_bytes: int) -> _Segments:
        return cls(
            token_rows_R, pairs_R, x.shape[1] * x.element_size(), weights.element_size() + id_bytes if pairs_R else 0
        )

    @property
    def rows_R(self) -> list[int]:
        """Rows of each segment, padding included."""
        return [
            rows - (-pairs * self.pair_bytes // self.row_bytes)
            for rows, pairs in zip(self.token_rows_R, self.pairs_R, strict=True)
        ]

    def rows_on_device(self, token_rows: Tensor, pairs: Tensor) -> Tensor:
        """`rows_R` from counts that lie on the device."""
        return token_rows - torch.div(-pairs * self.pair_bytes, self.row_bytes, rounding_mode="floor")

    @property
    def bytes_R(self) -> list[int]:
        return [rows * self.row_bytes for rows in self.rows_R]

    def spans(self) -> list[tuple[int, int, int]]:
        """Per rank: first byte of its rows, first byte of its pairs, end of its segment."""
        spans, start = [], 0
        for rows, size in zip(self.token_rows_R, self.bytes_R, strict=True):
            spans.append((start, start + rows * self.row_bytes, start + size))
            start += size
        return spans


def _exchange(buffer: Tensor, send: _Segments, recv: _Segments, group: dist.ProcessGroup) -> Tensor:
    received = buffer.new_empty(sum(recv.bytes_R))
    dist.all_to_all_single(received, buffer, recv.bytes_R, send.bytes_R, group=group)
    return received


def _pack(x: Tensor, row_ids: Tensor | None, values_R: list[list[Tensor]], segments: _Segments) -> Tensor:
    """Write rows of `x` (those named by `row_ids`, or in order) and each rank's values into one byte buffer."""
    buffer = torch.empty(sum(segments.bytes_R), dtype=torch.uint8, device=x.device)
    first = 0
    for rows, values, (start, middle, end) in zip(segments.token_rows_R, values_R, segments.spans(), strict=True):
        target = buffer[start:middle].view(x.dtype).view(rows, x.shape[1])
        if row_ids is None:
            target.copy_(x[first : first + rows])
        else:
            torch.index_select(x, 0, row_ids[first : first + rows], out=target)
        first += rows
        for value in values:
            size = value.numel() * value.element_size()
            buffer[middle : middle + size].copy_(value.contiguous().view(torch.uint8))
            middle += size
        buffer[middle:end].zero_()
    return buffer


def _unpack(buffer: Tensor, segments: _Segments, dtypes: list[torch.dtype]) -> list[Tensor]:
    """Concatenate over ranks the values that stand behind the rows, one tensor per dtype."""
    parts: list[list[Tensor]] = [[] for _ in dtypes]
    for pairs, (_, middle, _) in zip(segments.pairs_R, segments.spans(), strict=True):
        for part, dtype in zip(parts, dtypes, strict=True):
            part.append(buffer[middle : middle + pairs * dtype.itemsize])
            middle += pairs * dtype.itemsize
    return [torch.cat(part).view(dtype) for part, dtype in zip(parts, dtypes, strict=True)]


class _SendTokens(torch.autograd.Function):
    """Home → experts: rows, pair weights and pair rows in one uneven all-to-all; backward brings the gradients home."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_N: Tensor, row_ids_N: Tensor, plan: ExchangePlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        send = _Segments.of(plan.send_rows_R, plan.send_pairs_R, x_TD, weights_N, ROW_ID_BYTES)
        recv = _Segments.of(plan.recv_rows_R, plan.recv_pairs_R, x_TD, weights_N, ROW_ID_BYTES)
        values_R = [
            list(pair)
            for pair in zip(weights_N.split(plan.send_pairs_R), row_ids_N.split(plan.send_pairs_R), strict=True)
        ]
        received = _exchange(_pack(x_TD, plan.row_tokens_N, values_R, send), send, recv, plan.group)
        weights_M, row_ids_M = _unpack(received, recv, [weights_N.dtype, row_ids_N.dtype])
        rows = received.view(x_TD.dtype).view(-1, x_TD.shape[1])
        ctx.plan, ctx.num_tokens, ctx.weight_dtype = plan, x_TD.shape[0], weights_N.dtype
        ctx.mark_non_differentiable(row_ids_M)
        return rows, weights_M, row_ids_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_rows, grad_weights_M, _ = grads
        plan: ExchangePlan = ctx.plan
        forward_layout = _Segments.of(plan.recv_rows_R, plan.recv_pairs_R, grad_rows, grad_weights_M, ROW_ID_BYTES)
        send = _Segments.of(plan.recv_rows_R, plan.recv_pairs_R, grad_rows, grad_weights_M, 0)
        recv = _Segments.of(plan.send_rows_R, plan.send_pairs_R, grad_rows, grad_weights_M, 0)
        token_rows = torch.cat(
            [
                segment[:rows]
                for segment, rows in zip(grad_rows.split(forward_layout.rows_R), plan.recv_rows_R, strict=True)
            ]
        )
        values_R = [[part] for part in grad_weights_M.split(plan.recv_pairs_R)]
        received = _exchange(_pack(token_rows, None, values_R, send), send, recv, plan.group)
        (grad_weights_N,) = _unpack(received, recv, [ctx.weight_dtype])
        grad_x = _sum_rows(
            [
                received[start:middle].view(grad_rows.dtype).view(-1, grad_rows.shape[1])
                for start, middle, _ in recv.spans()
            ],
            plan,
            ctx.num_tokens,
        )
        return grad_x, grad_weights_N, None, None


class _ReturnRows(torch.autograd.Function):
    """Experts → home: one row per (token, rank), added up at home; backward sends each token's gradient out again."""

    @staticmethod
    def forward(ctx: Any, out_MD: Tensor, plan: ExchangePlan, num_tokens: int) -> Tensor:
        received = out_MD.new_empty(sum(plan.send_rows_R), out_MD.shape[1])
        dist.all_to_all_single(received, out_MD.contiguous(), plan.send_rows_R, plan.recv_rows_R, group=plan.group)
        ctx.plan = plan
        return _sum_rows(list(received.split(plan.send_rows_R)), plan, num_tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        plan: ExchangePlan = ctx.plan
        rows = grads[0].index_select(0, plan.row_tokens_N)
        received = rows.new_empty(sum(plan.recv_rows_R), rows.shape[1])
        dist.all_to_all_single(received, rows, plan.recv_rows_R, plan.send_rows_R, group=plan.group)
        return received, None, None


def _sum_rows(rows_R: list[Tensor], plan: ExchangePlan, num_tokens: int) -> Tensor:
    """Add the ranks' rows to their home tokens, in rank order; a token occurs once per rank: deterministic."""
    first = rows_R[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    total_TD = torch.zeros(num_tokens, first.shape[1], dtype=dtype, device=first.device)
    for rows, tokens in zip(rows_R, plan.row_tokens_N.split(plan.send_rows_R), strict=True):
        total_TD.index_add_(0, tokens, rows.to(dtype))
    return total_TD.to(first.dtype)


class _Permute(torch.autograd.Function):
    """values[order] for a permutation: its backward is a scatter without accumulation."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return values.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return torch.empty_like(grads[0]).scatter_(0, order, grads[0]), None
