"""How many rows and pairs go where: exchanged ahead of the tokens, and read by the host once a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ds_remoe.kernels.exchange import PeerPrefix, peers_first
from ds_remoe.moe.routing import Routing

Table = list[list[int]]
SHARE_COLUMNS = 2


class Counts:
    """The counts of one stage; tables have a line per rank: pairs of each of its experts, rows, and maybe a share.

    Args:
        sent_RC: int32, what this rank sends to each rank of the group.
        received_RC: int32, what each rank sends here; may be on its way until `read` was called.
        me: this rank's index in the group.
        read: waits for the exchange and returns both tables on the host, the layer's only wait for the device.
        has_share: the tables' last columns are those of `share_columns`.
    """

    def __init__(
        self,
        sent_RC: Tensor,
        received_RC: Tensor,
        me: int,
        read: Callable[[], tuple[Table, Table]],
        has_share: bool,
    ) -> None:
        self._sent_RC, self._received_RC, self._me, self._read = sent_RC, received_RC, me, read
        self._tables: tuple[Table, Table] | None = None
        self.num_experts = sent_RC.shape[1] - 1 - (SHARE_COLUMNS if has_share else 0)

    def sent(self) -> tuple[list[int], list[int]]:
        """(rows, pairs) to each peer; on the CPU known before the exchange is done."""
        if self._tables is None and self._sent_RC.device.type == "cpu":
            return self._of_peers(self._sent_RC.tolist())
        return self._of_peers(self._both()[0])

    def received(self) -> tuple[list[int], list[int]]:
        """(rows, pairs) from each peer."""
        return self._of_peers(self._both()[1])

    def of_experts(self) -> list[int]:
        """Pairs of each expert of this rank."""
        return [sum(column) for column in zip(*(line[: self.num_experts] for line in self._both()[1]), strict=True)]

    def rows_per_token(self) -> float:
        """Rows that a token becomes in the mean of all ranks' tokens, the same on all; for tables with a share."""
        rows, tokens = map(sum, zip(*(line[-SHARE_COLUMNS:] for line in self._both()[1]), strict=True))
        return rows / max(tokens, 1)

    def arrived(self) -> PeerPrefix:
        """Rows and pairs before each peer on the receiving side, on the device; after `received`."""
        peers_PC = peers_first(self._received_RC, self._me)
        return PeerPrefix.of(peers_PC[:, self.num_experts], peers_PC[:, : self.num_experts].sum(dim=1))

    def _both(self) -> tuple[Table, Table]:
        if self._tables is None:
            self._tables = self._read()
        return self._tables

    def _of_peers(self, table: Table) -> tuple[list[int], list[int]]:
        lines = [*table[: self._me], *table[self._me + 1 :], table[self._me]]
        return [line[self.num_experts] for line in lines], [sum(line[: self.num_experts]) for line in lines]


def count_table(routing: Routing, ranks: int) -> Tensor:
    """Pairs of each expert and rows, for each of `ranks` equal shares of the experts: int32 [R, E / R + 1]."""
    rows_R = routing.mask_TE.unflatten(1, (ranks, -1)).any(dim=-1).sum(dim=0)
    return torch.cat([routing.counts_E.view(ranks, -1), rows_R.unsqueeze(1)], dim=1).to(torch.int32)


def share_columns(rows: Tensor, tokens: int, lines: int) -> Tensor:
    """What each rank tells all others of itself, for `Counts.rows_per_token`: int32 [lines, SHARE_COLUMNS].

    Args:
        rows: that its tokens become over the whole expert-parallel group, a scalar.
        tokens: of it.
        lines: ranks it is told to.
    """
    return torch.stack([rows.to(torch.int32), torch.full_like(rows, tokens, dtype=torch.int32)]).expand(lines, -1)


def start_counts(routing: Routing, group: dist.ProcessGroup) -> Counts:
    """Start to tell each rank of the group what will come."""
    table_RC = count_table(routing, dist.get_world_size(group))
    share_RC = share_columns(table_RC[:, -1].sum(), routing.mask_TE.shape[0], len(table_RC))
    sent_RC = torch.cat([table_RC, share_RC], dim=1)
    received_RC = torch.empty_like(sent_RC)
    work = dist.all_to_all_single(received_RC, sent_RC, group=group, async_op=True)

    def read() -> tuple[Table, Table]:
        work.wait()
        sent, received = torch.stack([sent_RC, received_RC]).tolist()
        return sent, received

    return Counts(sent_RC, received_RC, dist.get_rank(group), read, has_share=True)
