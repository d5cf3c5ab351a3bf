"""The stacked SwiGLU experts as one differentiable function that keeps no more pre-activations than a budget allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_remoe.kernels import grouped_swiglu
from ds_remoe.kernels.first_order import first_order
from ds_remoe.kernels.pair_groups import PairGroups, RowOrder
from ds_remoe.moe.budget import ActivationBudget, Chunk, plan_chunks
from ds_remoe.moe.dispatch import ExchangePlan, send_again


def budgeted_swiglu(
    rows: Tensor,
    groups: PairGroups,
    gate_up: Tensor,
    down: Tensor,
    budget: ActivationBudget | None,
    resend: ExchangePlan | None = None,
) -> Tensor:
    """Σ of w · FFN_e(row) over the pairs of each row; an expert without pairs has zero gradients.

    Saved for backward: rows, weights, ids, their order by row, and the pre-activation [M, 2H], less what the budget
    takes away.
    With `resend` the tokens at home stand in for the rows; all ranks of the group must come to backward then.
    The chunks follow from the counts and the budget alone, and a pre-activation comes out the same the second time, so
    the same step gives the same bits. On the torch path output and gradients are also the same bits as without a
    budget where no expert has more pairs than a chunk; a cut through an expert changes the shape of its GEMMs and the
    order of its weight gradient's sum, and they agree to rounding.

    Args:
        rows: [M_rows, D].
        groups: the pairs; its weights are differentiable.
        gate_up: [L, 2H, D].
        down: [L, D, H].
        budget: None keeps every pre-activation.
        resend: the way on which the rows came, to have them come again in backward.

    Returns:
        [M_rows, D] in the dtype of `rows`, summed in fp32 or wider.
    """
    order = grouped_swiglu.row_order(rows, groups)
    result: Tensor = _BudgetedSwiGLU.apply(
        rows,
        groups.weights_M,
        gate_up,
        down,
        groups.row_ids_M,
        None if order is None else order.pairs_M,
        None if order is None else order.starts,
        plan_chunks(groups.counts_L, budget),
        resend,
    )
    return result


class _BudgetedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights_M: Tensor,
        gate_up: Tensor,
        down: Tensor,
        row_ids_M: Tensor,
        order_M: Tensor | None,
        order_starts: Tensor | None,
        chunks: list[Chunk],
        resend: ExchangePlan | None,
    ) -> Tensor:
        out, kept = grouped_swiglu.new_sums(rows, len(chunks)), []
        for index, chunk in enumerate(chunks):
            pairs = _pairs_of(chunk, row_ids_M, weights_M, order_M, order_starts)
            w_up, w_down = gate_up[chunk.experts], down[chunk.experts]
            pre_activation = grouped_swiglu.forward(rows, pairs, w_up, w_down, out, accumulate=index > 0)
            if chunk.keep:
                kept.append(pre_activation)
            del pre_activation  # before the next chunk's is made
        stages = () if resend is None else resend.stages
        source = [rows] if resend is None else [resend.home_TD, *(stage.row_tokens_N for stage in stages)]
        ctx.save_for_backward(weights_M, gate_up, down, row_ids_M, order_M, order_starts, *source, *kept)
        ctx.chunks, ctx.dtype, ctx.sent_again = chunks, rows.dtype, [stage.sizes for stage in stages]
        return out.to(rows.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights_M, gate_up, down, row_ids_M, order_M, order_starts, source, *rest = ctx.saved_tensors
        stages = len(ctx.sent_again)
        rows = send_again(source, rest[:stages], ctx.sent_again).to(ctx.dtype)
        waiting = iter(rest[stages:])
        grad_rows, grad_weights = grouped_swiglu.new_sums(rows, len(ctx.chunks)), []
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for index, chunk in enumerate(ctx.chunks):
            pairs = _pairs_of(chunk, row_ids_M, weights_M, order_M, order_starts)
            w_up, w_down = gate_up[chunk.experts], down[chunk.experts]
            pre_activation = next(waiting) if chunk.keep else grouped_swiglu.up_projection(rows, pairs, w_up)
            grad_weights.append(
                grouped_swiglu.backward(
                    grads[0],
                    rows,
                    pairs,
                    w_up,
                    w_down,
                    pre_activation,
                    grad_rows,
                    grad_gate_up[chunk.experts],
                    grad_down[chunk.experts],
                    accumulate_rows=index > 0,
                    accumulate_weights=chunk.continues,
                )
            )
            del pre_activation
        grad_weights_M = grad_weights[0] if len(grad_weights) == 1 else torch.cat(grad_weights)
        return grad_rows.to(rows.dtype), grad_weights_M, grad_gate_up, grad_down, *(None,) * 5


def _pairs_of(
    chunk: Chunk, row_ids_M: Tensor, weights_M: Tensor, order_M: Tensor | None, order_starts: Tensor | None
) -> PairGroups:
    order = None
    if order_M is not None and order_starts is not None:
        order = RowOrder(order_M, order_starts, first=chunk.pairs.start)
    return PairGroups(row_ids_M[chunk.pairs], weights_M[chunk.pairs], chunk.counts, order)
