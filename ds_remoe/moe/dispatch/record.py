"""The records that dispatch hands on: to the experts what they work on, to combine what it needs to go back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ds_remoe.kernels.exchange import Room
from ds_remoe.kernels.pair_groups import RowOrder


@dataclass(frozen=True)
class Dispatched:
    """What the experts of this rank work on.

    Attributes:
        rows: [M_rows, D] token rows.
        row_ids_M: row of each pair, in `rows` and in the result, grouped by local expert.
        weights_M: routing weight of each pair, differentiable.
        counts_L: pairs of each local expert, on the host.
        order: the pairs row by row; None where that is still to be made.
        plan: what `combine` needs to send results home; None without expert parallelism.
    """

    rows: Tensor
    row_ids_M: Tensor
    weights_M: Tensor
    counts_L: list[int]
    order: RowOrder | None
    plan: ExchangePlan | None


@dataclass(frozen=True)
class ExchangePlan:
    """The way of a layer's tokens.

    Attributes:
        stages: that they went through, first to last; their results come back in reverse.
        home_TD: the tokens before the first stage, without a graph, to be sent again.
        rows_per_token: rows that a token became in the mean of all ranks' tokens, the same number on all.
    """

    stages: tuple[StagePlan, ...]
    home_TD: Tensor
    rows_per_token: float


@dataclass(frozen=True)
class StagePlan:
    """One exchange over one group.

    Attributes:
        sizes: on the host.
        row_tokens_N: int64, home token of each row sent, by peer and token.
        prefix_rows: int32 [P * T + 1], rows before each (peer, token).
    """

    sizes: StageSizes
    row_tokens_N: Tensor
    prefix_rows: Tensor


@dataclass(frozen=True)
class StageSizes:
    """Sizes of one exchange over one group.

    The lists are in peer order: the other ranks of the group in rank order, then this rank, whose own rows never
    enter the collective.

    Attributes:
        send_rows_P / recv_rows_P: rows to and from each peer.
        send_pairs_P / recv_pairs_P: pairs to and from each peer.
        num_tokens: T, home tokens.
        group: where the exchange takes place.
        wire_dtype: in which rows travel; None for their own.
    """

    send_rows_P: list[int]
    recv_rows_P: list[int]
    send_pairs_P: list[int]
    recv_pairs_P: list[int]
    num_tokens: int
    group: dist.ProcessGroup
    wire_dtype: torch.dtype | None

    @property
    def remote_out(self) -> int:
        """Rows that leave this rank."""
        return sum(self.send_rows_P[:-1])

    @property
    def remote_in(self) -> int:
        """Rows that come from other ranks."""
        return sum(self.recv_rows_P[:-1])

    @property
    def arrived_rows(self) -> int:
        """Rows on this rank after the exchange, its own included."""
        return sum(self.recv_rows_P)


@dataclass
class LastSent:
    """What one stage of a layer's dispatch sent the last time.

    Attributes:
        tokens: of that time.
        room: for as much, and somewhat more; None before the first.
    """

    tokens: int = 0
    room: Room | None = None

    def is_like(self, tokens: int) -> bool:
        """True for about as many tokens; the room of others would be far too large or too small."""
        return 16 * abs(tokens - self.tokens) <= self.tokens


@dataclass(frozen=True)
class LastDispatch:
    """Of both stages of a layer's dispatch, the second only with nodes; a layer keeps one for its next dispatch."""

    first: LastSent = field(default_factory=LastSent)
    second: LastSent = field(default_factory=LastSent)
