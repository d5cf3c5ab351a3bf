"""The way home of one stage: a row for each (token, rank), added up where the token lives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_remoe.kernels import exchange
from ds_remoe.kernels.first_order import first_order
from ds_remoe.moe.dispatch.record import StagePlan, StageSizes
from ds_remoe.moe.dispatch.send import send_rows
from ds_remoe.moe.dispatch.wire import Transfer


def return_rows(out_MD: Tensor, plan: StagePlan) -> Tensor:
    """Send each result row to its token's home and add up there: [M_rows, D] → [T, D]."""
    result: Tensor = _ReturnRows.apply(out_MD, plan.row_tokens_N, plan.prefix_rows, plan.sizes)
    return result


class _ReturnRows(torch.autograd.Function):
    """Experts → home; backward sends each token's gradient out again."""

    @staticmethod
    def forward(ctx: Any, out_MD: Tensor, row_tokens_N: Tensor, prefix_rows: Tensor, sizes: StageSizes) -> Tensor:
        remote, local = out_MD.tensor_split([sizes.remote_in])
        sent = remote.to(sizes.wire_dtype or remote.dtype)
        received = Transfer(sent, sizes.recv_rows_P, sizes.send_rows_P, sizes.group).wait()
        ctx.save_for_backward(row_tokens_N)
        ctx.sizes = sizes
        return exchange.combine_rows(received, local, row_tokens_N, prefix_rows, sizes.send_rows_P, sizes.num_tokens)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (row_tokens_N,) = ctx.saved_tensors
        return send_rows(grads[0], row_tokens_N, ctx.sizes), None, None, None
