"""Rows over one stage whose counts are known: gradients of results, and tokens that are sent a second time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_remoe.moe.dispatch.record import StageSizes
from ds_remoe.moe.dispatch.wire import Transfer


def send_rows(x_TD: Tensor, row_tokens_N: Tensor, sizes: StageSizes) -> Tensor:
    """A row for each (token, rank), in the order in which the stage brought them: [T, D] → [M_rows, D].

    Args:
        x_TD: of this rank's tokens.
        row_tokens_N, sizes: of the stage's plan.
    """
    sent = x_TD.index_select(0, row_tokens_N[: sizes.remote_out]).to(sizes.wire_dtype or x_TD.dtype)
    rows = x_TD.new_empty(sizes.arrived_rows, x_TD.shape[1])
    arriving = rows[: sizes.remote_in] if sent.dtype == rows.dtype else None
    transfer = Transfer(sent, sizes.send_rows_P, sizes.recv_rows_P, sizes.group, arriving)
    torch.index_select(x_TD, 0, row_tokens_N[sizes.remote_out :], out=rows[sizes.remote_in :])
    arrived = transfer.wait()
    if arrived.dtype != rows.dtype:
        rows[: sizes.remote_in] = arrived
    return rows


def send_again(x_TD: Tensor, row_tokens: Sequence[Tensor], sizes: Sequence[StageSizes]) -> Tensor:
    """Send tokens once more through the stages of a plan, first to last; without stages they are where they are."""
    for row_tokens_N, stage in zip(row_tokens, sizes, strict=True):
        x_TD = send_rows(x_TD, row_tokens_N, stage)
    return x_TD
