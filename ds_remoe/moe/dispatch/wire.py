"""The one collective that carries tokens: an uneven all-to-all that leaves this rank's own share out."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class Transfer:
    """Blocks along dimension 0 on their way between the ranks of a group; it keeps its buffers until it is done.

    Args:
        sent: blocks for the other ranks in rank order; none may be for this rank.
        send_P, recv_P: sizes of the blocks in peer order; the last, of this rank itself, is left out.
        group: all its ranks make one, also those with nothing to send.
        received: where the others' blocks go; made here if None.
    """

    def __init__(
        self,
        sent: Tensor,
        send_P: list[int],
        recv_P: list[int],
        group: dist.ProcessGroup,
        received: Tensor | None = None,
    ) -> None:
        me = dist.get_rank(group)
        send_R, recv_R = ([*sizes[:me], 0, *sizes[me:-1]] for sizes in (send_P, recv_P))
        self._sent = sent.contiguous()
        self._received = sent.new_empty(sum(recv_R), *sent.shape[1:]) if received is None else received
        self._work = dist.all_to_all_single(self._received, self._sent, recv_R, send_R, group=group, async_op=True)

    def wait(self) -> Tensor:
        """What the other ranks sent; on a GPU the stream waits for it, not the host."""
        self._work.wait()
        return self._received
