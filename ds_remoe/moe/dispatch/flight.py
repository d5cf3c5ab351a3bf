"""The buffers of one exchange while it is under way, out with the tokens and home with their gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ds_remoe.kernels import exchange
from ds_remoe.moe.dispatch.counts import Counts
from ds_remoe.moe.dispatch.record import LastSent, StagePlan, StageSizes
from ds_remoe.moe.dispatch.wire import Transfer


class Flight:
    """What the two halves of a stage share: sizes for good, buffers only between departure and arrival.

    Args:
        counts: of the stage.
        group: where the exchange takes place.
        wire_dtype: in which rows travel; None for their own.
        last: what this stage sent the last time; set for the next.
    """

    def __init__(
        self, counts: Counts, group: dist.ProcessGroup, wire_dtype: torch.dtype | None, last: LastSent
    ) -> None:
        self.counts, self.group, self.wire_dtype, self._last = counts, group, wire_dtype, last
        self.sizes: StageSizes
        self._words: tuple[Transfer, Tensor, torch.dtype] | None = None
        self._rows: tuple[Transfer, Tensor] | None = None
        self._grad_weights: tuple[Transfer, Tensor] | None = None
        self._grad_rows: tuple[Transfer, Tensor] | None = None

    def depart(
        self, x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, prefix: exchange.Prefix
    ) -> tuple[StagePlan, Tensor]:
        """Pack and send words and rows; what stays here is copied while the rest is under way.

        Returns:
            the plan, and of each pair in the order of departure the index of its weight in weights_TE.t().flatten().
        """
        tokens = x_TD, weights_TE, mask_TE, prefix, dist.get_rank(self.group)
        wire_dtype, room = self.wire_dtype or x_TD.dtype, self._last.room
        # On a GPU the counts, its own too, reach the host when their exchange is done; packing goes on meanwhile.
        packed = None
        if room is not None and self._last.is_like(x_TD.shape[0]):
            packed = exchange.pack_ahead(*tokens, room, wire_dtype)
        send_rows_P, send_pairs_P = self.counts.sent()
        leaving = exchange.Room(sum(send_rows_P), sum(send_pairs_P), sum(send_rows_P[:-1]))
        self._last.tokens, self._last.room = x_TD.shape[0], leaving.widened()
        if packed is not None and room is not None and room.holds(leaving):
            packed = packed.cut(leaving, exchange.mask_words(self.counts.num_experts, packed.words.dtype))
        else:
            packed = None  # its memory, before it is taken again
            packed = exchange.pack(*tokens, leaving, wire_dtype)
        recv_rows_P, recv_pairs_P = self.counts.received()
        self.sizes = sizes = StageSizes(
            send_rows_P, recv_rows_P, send_pairs_P, recv_pairs_P, x_TD.shape[0], self.group, self.wire_dtype
        )
        row_words = exchange.mask_words(self.counts.num_experts, packed.words.dtype)
        send_words_P = _words(send_rows_P, send_pairs_P, row_words)
        recv_words_P = _words(recv_rows_P, recv_pairs_P, row_words)
        self._words = *_transfer(packed.words, send_words_P, recv_words_P, self.group), weights_TE.dtype

        rows = x_TD.new_empty(sizes.arrived_rows, x_TD.shape[1])
        arriving = rows[: sizes.remote_in] if packed.rows.dtype == rows.dtype else None
        self._rows = Transfer(packed.rows, send_rows_P, recv_rows_P, self.group, arriving), rows
        torch.index_select(x_TD, 0, packed.row_tokens_N[sizes.remote_out :], out=rows[sizes.remote_in :])
        return StagePlan(sizes, packed.row_tokens_N, prefix.rows), packed.weight_ids_K

    def arrived_words(self) -> tuple[Tensor, torch.dtype]:
        """Wait for the words; with them the dtype of the weights in them."""
        assert self._words is not None
        (transfer, words, dtype), self._words = self._words, None
        transfer.wait()
        return words, dtype

    def arrived_rows(self) -> Tensor:
        """Wait for the rows; this rank's own come last."""
        assert self._rows is not None
        (transfer, rows), self._rows = self._rows, None
        received = transfer.wait()
        if received.dtype != rows.dtype:
            rows[: len(received)] = received
        return rows

    def send_back(self, grad_rows: Tensor, grad_weights_K: Tensor) -> None:
        """Send the gradients of what arrived home, weights in the order of arrival."""
        sizes = self.sizes
        self._grad_weights = _transfer(grad_weights_K, sizes.recv_pairs_P, sizes.send_pairs_P, self.group)
        remote, local = grad_rows.tensor_split([sizes.remote_in])
        sent = remote.to(self.wire_dtype or remote.dtype)
        self._grad_rows = Transfer(sent, sizes.recv_rows_P, sizes.send_rows_P, self.group), local

    def returned_weights(self) -> Tensor:
        """Wait for the weights' gradients, in the order of departure."""
        assert self._grad_weights is not None
        (transfer, grads), self._grad_weights = self._grad_weights, None
        transfer.wait()
        return grads

    def returned_rows(self) -> tuple[Tensor, Tensor]:
        """Wait for the rows' gradients: those from the other ranks, and this rank's own."""
        assert self._grad_rows is not None
        (transfer, local), self._grad_rows = self._grad_rows, None
        return transfer.wait(), local


def _words(rows_P: list[int], pairs_P: list[int], row_words: int) -> list[int]:
    return [rows * row_words + pairs for rows, pairs in zip(rows_P, pairs_P, strict=True)]


def _transfer(
    values: Tensor, send_P: list[int], recv_P: list[int], group: dist.ProcessGroup
) -> tuple[Transfer, Tensor]:
    """Send the others' blocks of `values`, copy this rank's own; the result is whole after the transfer's wait."""
    sent, received = sum(send_P[:-1]), sum(recv_P[:-1])
    result = values.new_empty(received + recv_P[-1])
    transfer = Transfer(values[:sent], send_P, recv_P, group, result[:received])
    result[received:] = values[sent:]
    return transfer, result
