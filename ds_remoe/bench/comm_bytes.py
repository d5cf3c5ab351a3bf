"""Bytes on the wire: those that a piece of work sends, counted at torch's collectives, and the least it could send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUTING_WEIGHT_BYTES = 4
ROWS_PER_TOKEN_AND_RANK = 4


class SentBytes(TorchDispatchMode):
    """Counts, while active, what this rank sends to other ranks, by operation; forward and backward alike.

    Every collective of torch.distributed passes torch's dispatcher as an operation of the namespace c10d, however it
    was called, so none escapes. What a rank sends to itself is not counted; a reduction counts as a ring's.

    Raises:
        NotImplementedError: for an operation that it does not know, rather than leaving it out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.by_operation.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "c10d" in func.namespace:
            name = func._opname
            if func.namespace != "c10d" or name not in _SENT:
                raise NotImplementedError(f"{func}: SentBytes does not know how many bytes it sends; teach it here")
            bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            self.by_operation[name] += _SENT[name](bound, dist.ProcessGroup.unbox(bound["process_group"]))
        return func(*args, **(kwargs or {}))


def least_bytes(masks_R: Sequence[Tensor], hidden_size: int, element_size: int) -> int:
    """The least that all ranks together must send for one layer, forward and backward.

    For each ordered pair of different ranks: each token that an expert over there wants, once, in each of the four
    directions (tokens out, results home, gradients of results out, gradients of tokens home); with each of these rows
    one bit per expert over there, rounded up to bytes, that says which; and for each active pair its routing weight
    (fp32), and that weight's gradient back.

    Args:
        masks_R: of each rank its tokens' mask_TE; the experts stand on the ranks in equal, consecutive blocks.
        hidden_size: D.
        element_size: bytes of one element of a row on the wire.
    """
    ranks = len(masks_R)
    total = 0
    for source, mask_TE in enumerate(masks_R):
        for target, local_TL in enumerate(mask_TE.chunk(ranks, dim=1)):
            if source != target:
                rows, pairs = int(local_TL.any(dim=1).sum()), int(local_TL.sum())
                row_bytes = ROWS_PER_TOKEN_AND_RANK * hidden_size * element_size + (local_TL.shape[1] + 7) // 8
                total += rows * row_bytes + pairs * 2 * ROUTING_WEIGHT_BYTES
    return total


def _all_to_all_single(arguments: dict[str, Any], group: dist.ProcessGroup) -> int:
    sent: Tensor = arguments["input"]
    if sent.numel() == 0:
        return 0
    splits = arguments["input_split_sizes"] or [sent.shape[0] // group.size()] * group.size()
    row_bytes = sent.nbytes // sent.shape[0]
    return (sum(splits) - splits[group.rank()]) * row_bytes


def _all_to_all(arguments: dict[str, Any], group: dist.ProcessGroup) -> int:
    sent = arguments["input_tensors"]
    return sum(tensor.nbytes for rank, tensor in enumerate(sent) if rank != group.rank())


def _all_reduce(arguments: dict[str, Any], group: dist.ProcessGroup) -> int:
    size = sum(tensor.nbytes for tensor in arguments["tensors"])
    return -(-2 * size * (group.size() - 1) // group.size())


def _all_gather(arguments: dict[str, Any], group: dist.ProcessGroup) -> int:
    sent = arguments.get("input_tensors", [arguments.get("input_tensor")])
    return (group.size() - 1) * sum(tensor.nbytes for tensor in sent)


def _send(arguments: dict[str, Any], group: dist.ProcessGroup) -> int:
    return sum(tensor.nbytes for tensor in arguments["tensors"])


def _nothing(arguments: dict[str, Any], group: dist.ProcessGroup) -> int:
    return 0


_SENT: dict[str, Callable[[dict[str, Any], dist.ProcessGroup], int]] = {
    "alltoall_base_": _all_to_all_single,
    "alltoall_": _all_to_all,
    "allreduce_": _all_reduce,
    "allgather_": _all_gather,
    "_allgather_base_": _all_gather,
    "send": _send,
    "recv_": _nothing,
    "recv_any_source_": _nothing,
    "barrier": _nothing,
}
