"""Pack, unpack and combine: what an expert exchange does with rows before and after the wire.

A rank sends each peer one row per token that any of the peer's experts wants, and one message of words: the routing
weights of the pairs, row by row, then a bit mask of the peer's experts for each row. Row order and masks tell which
pair each weight belongs to, so neither row numbers nor expert numbers travel.

Shape suffixes beyond those of moe/routing.py: P the ranks of the group in peer order (the others by rank, then this
one), N rows, K pairs, L experts of one rank. A word is an integer as wide as a routing weight.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_remoe.kernels.backend import use_triton
from ds_remoe.kernels.pair_groups import RowOrder

SPARE = 64
"""Rows or pairs of a room beyond the sixteenth that it has more than was needed last."""


@dataclass(frozen=True)
class Prefix:
    """Where the rows and pairs of each (peer, token) start on the sending side.

    Attributes:
        rows: int32 [P * T + 1], rows before each (peer, token), peer-major, and their total.
        pairs: the same of pairs.
        peers: P.
    """

    rows: Tensor
    pairs: Tensor
    peers: int

    @classmethod
    def of(cls, mask_TE: Tensor, peers: int, me: int) -> Prefix:
        """Count along (peer, token), without a read from the device."""
        pairs_TR = mask_TE.unflatten(1, (peers, -1)).sum(dim=-1, dtype=torch.int32)
        pairs_PT = peers_first(pairs_TR.t(), me).flatten()
        return cls(_upto(pairs_PT > 0), _upto(pairs_PT), peers)

    def of_peers(self) -> PeerPrefix:
        """Rows and pairs before each peer."""
        starts = torch.arange(self.peers + 1, device=self.rows.device) * ((len(self.rows) - 1) // self.peers)
        return PeerPrefix(self.rows[starts], self.pairs[starts])


@dataclass(frozen=True)
class PeerPrefix:
    """Rows and pairs before each peer, and their totals: int32 [P + 1] each."""

    rows: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, rows_P: Tensor, pairs_P: Tensor) -> PeerPrefix:
        """From the counts of each peer."""
        return cls(_upto(rows_P), _upto(pairs_P))


@dataclass(frozen=True)
class Room:
    """How much leaves a rank, or fits into the buffers for it.

    Attributes:
        rows, pairs: over all peers, this rank included.
        remote_rows: rows of the other ranks.
    """

    rows: int
    pairs: int
    remote_rows: int

    def holds(self, other: Room) -> bool:
        """True if as much as `other` fits."""
        return self.rows >= other.rows and self.pairs >= other.pairs and self.remote_rows >= other.remote_rows

    def widened(self) -> Room:
        """A sixteenth more, as routing moves that little from one batch to the next."""
        return Room(*(n + n // 16 + SPARE for n in (self.rows, self.pairs, self.remote_rows)))


@dataclass(frozen=True)
class Packed:
    """What leaves a rank, peer by peer; the last peer is the rank itself, whose rows stay where they are.

    Attributes:
        rows: [rows for others, D] in the wire's dtype.
        words: for each peer the bits of its pairs' weights, then the masks of its rows.
        row_tokens_N: int64, token of each row, this rank's own included.
        weight_ids_K: int64, index of each pair's weight in weights_TE.t().flatten(), expert-major as routers make it.
    """

    rows: Tensor
    words: Tensor
    row_tokens_N: Tensor
    weight_ids_K: Tensor

    def cut(self, to: Room, row_words: int) -> Packed:
        """The part of buffers that were made for more."""
        words = self.words[: to.pairs + to.rows * row_words]
        return Packed(self.rows[: to.remote_rows], words, self.row_tokens_N[: to.rows], self.weight_ids_K[: to.pairs])


def peers_first(values: Tensor, me: int) -> Tensor:
    """Reorder dimension 0 from rank order to peer order; contiguous."""
    return torch.cat([values[:me], values[me + 1 :], values[me : me + 1]])


def word_dtype(weights: Tensor) -> torch.dtype:
    """Integer of the weights' width."""
    return torch.int64 if weights.element_size() == 8 else torch.int32


def mask_words(num_experts: int, dtype: torch.dtype) -> int:
    """Words of one row's mask."""
    return -(-num_experts // (8 * dtype.itemsize))


def pack(
    x_TD: Tensor,
    weights_TE: Tensor,
    mask_TE: Tensor,
    prefix: Prefix,
    me: int,
    leaving: Room,
    wire_dtype: torch.dtype,
) -> Packed:
    """Gather each token once for each peer that wants it, with the weights and masks of its pairs.

    Args:
        x_TD: tokens.
        weights_TE: routing weights, fp32 or fp64.
        mask_TE: bool, active pairs.
        prefix: of mask_TE.
        me: this rank's index in the group.
        leaving: how much that is.
        wire_dtype: of the rows that leave.
    """
    packed = pack_ahead(x_TD, weights_TE, mask_TE, prefix, me, leaving, wire_dtype)
    return torch_pack(x_TD, weights_TE, mask_TE, prefix, me, leaving, wire_dtype) if packed is None else packed


def pack_ahead(
    x_TD: Tensor,
    weights_TE: Tensor,
    mask_TE: Tensor,
    prefix: Prefix,
    me: int,
    room: Room,
    wire_dtype: torch.dtype,
) -> Packed | None:
    """`pack` before the host knows how much leaves: what has no place in the room is left out.

    Returns:
        None where only the twin runs, which has to know.
    """
    if use_triton(x_TD) and weights_TE.dtype == torch.float32:
        packed: Packed = _triton().pack(x_TD, weights_TE, mask_TE, prefix, me, room, wire_dtype)
        return packed
    return None


def unpack(
    words: Tensor, arrived: PeerPrefix, num_experts: int, num_rows: int, num_pairs: int, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, RowOrder]:
    """List the pairs that arrived, grouped by expert and by row within an expert.

    Args:
        words: as packed, of all peers.
        arrived: rows and pairs before each peer.
        num_experts: L.
        num_rows, num_pairs: totals.
        weight_dtype: of the weights.

    Returns:
        row_ids_M (int64), weights_M, and the pairs row by row, which is their order of arrival.
    """
    if num_pairs and use_triton(words) and weight_dtype == torch.float32:
        row_ids_M, weights_M, by_row_M, starts = _triton().unpack(words, arrived, num_experts, num_rows, num_pairs)
        return row_ids_M, weights_M, RowOrder(by_row_M, starts)
    return torch_unpack(words, arrived, num_experts, num_rows, num_pairs, weight_dtype)


def unpack_dense(
    words: Tensor, arrived: PeerPrefix, num_experts: int, num_rows: int, num_pairs: int, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What arrived as a routing of its rows: mask [N, L] (bool), weights [N, L] with zeros, weight_ids_K (int64)."""
    weights_K, mask_NL = _read_words(words, arrived, num_experts, num_rows, num_pairs, weight_dtype)
    weight_ids_K = torch.nonzero_static(mask_NL.flatten(), size=num_pairs).squeeze(1)
    dense = weights_K.new_zeros(mask_NL.numel()).index_copy_(0, weight_ids_K, weights_K)
    return mask_NL, dense.view(mask_NL.shape), weight_ids_K


def combine_rows(
    remote: Tensor, local: Tensor, row_tokens_N: Tensor, prefix_rows: Tensor, rows_P: list[int], num_tokens: int
) -> Tensor:
    """Add up each token's rows, at most one of each peer: this rank's own first, then the others' in rank order.

    Args:
        remote: [rows of the other peers, D], any floating dtype.
        local: [rows of this rank, D].
        row_tokens_N: token of each row, in peer order.
        prefix_rows: `Prefix.rows`.
        rows_P: rows of each peer.
        num_tokens: T.

    Returns:
        [T, D] in the dtype of `local`, summed in fp32 or wider; zeros where no row is.
    """
    if num_tokens and local.shape[1] and use_triton(prefix_rows) and local.dtype != torch.float64:
        return _triton().combine_rows(remote, local, prefix_rows, num_tokens)
    return torch_combine_rows(remote, local, row_tokens_N, rows_P, num_tokens)


def torch_pack(
    x_TD: Tensor,
    weights_TE: Tensor,
    mask_TE: Tensor,
    prefix: Prefix,
    me: int,
    leaving: Room,
    wire_dtype: torch.dtype,
) -> Packed:
    """The plain-torch twin."""
    num_rows, num_pairs = leaving.rows, leaving.pairs
    (tokens, experts), peers = mask_TE.shape, prefix.peers
    mask_PTL = peers_first(mask_TE.unflatten(1, (peers, -1)).transpose(0, 1), me)
    local = experts // peers
    row_N = torch.nonzero_static(prefix.rows.diff(), size=num_rows).squeeze(1)
    pair_K = torch.nonzero_static(mask_PTL.flatten(), size=num_pairs).squeeze(1)
    row_tokens_N = row_N % max(tokens, 1)
    peer_K = pair_K // max(tokens * local, 1)
    rank_K = torch.where(peer_K == peers - 1, me, peer_K + (peer_K >= me))
    weight_ids_K = (rank_K * local + pair_K % local) * tokens + pair_K // local % max(tokens, 1)

    word = word_dtype(weights_TE)
    words = torch.empty(num_pairs + num_rows * mask_words(local, word), dtype=word, device=x_TD.device)
    weight_places_K, mask_places = _places(prefix.of_peers(), num_rows, num_pairs, mask_words(local, word))
    words[weight_places_K] = weights_TE.t().reshape(-1)[weight_ids_K].view(word)
    words[mask_places] = _to_bits(mask_PTL.flatten(0, 1)[row_N], word)
    rows = x_TD.index_select(0, row_tokens_N[: leaving.remote_rows]).to(wire_dtype)
    return Packed(rows, words, row_tokens_N, weight_ids_K)


def torch_unpack(
    words: Tensor, arrived: PeerPrefix, num_experts: int, num_rows: int, num_pairs: int, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, RowOrder]:
    """The plain-torch twin."""
    weights_K, mask_NL = _read_words(words, arrived, num_experts, num_rows, num_pairs, weight_dtype)
    row_ids_K, expert_K = torch.nonzero_static(mask_NL, size=num_pairs).unbind(1)
    place_LN = (mask_NL.t().flatten().cumsum(0, dtype=torch.int32) - 1).view(num_experts, num_rows)
    by_row_M = place_LN[expert_K, row_ids_K]
    row_ids_M, weights_M = torch.empty_like(row_ids_K), torch.empty_like(weights_K)
    row_ids_M[by_row_M], weights_M[by_row_M] = row_ids_K, weights_K
    return row_ids_M, weights_M, RowOrder(by_row_M, _upto(mask_NL.sum(dim=1)))


def torch_combine_rows(
    remote: Tensor, local: Tensor, row_tokens_N: Tensor, rows_P: list[int], num_tokens: int
) -> Tensor:
    """The plain-torch twin."""
    dtype = torch.promote_types(local.dtype, torch.float32)
    total_TD = torch.zeros(num_tokens, local.shape[1], dtype=dtype, device=local.device)
    *tokens_P, local_tokens = row_tokens_N.split(rows_P)
    total_TD.index_copy_(0, local_tokens, local.to(dtype))
    # Peer by peer, as a token occurs once in each: no two sums meet, so the order is fixed on any device.
    for rows, tokens in zip(remote.split(rows_P[:-1]), tokens_P, strict=True):
        total_TD.index_add_(0, tokens, rows.to(dtype))
    return total_TD.to(local.dtype)


def _upto(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _places(peers: PeerPrefix, num_rows: int, num_pairs: int, row_words: int) -> tuple[Tensor, Tensor]:
    """Index of each pair's weight [K] and of each row's mask [N, words a row] among the words."""
    pairs, rows = (torch.arange(n, device=peers.rows.device, dtype=torch.int32) for n in (num_pairs, num_rows))
    peer_K = torch.searchsorted(peers.pairs[1:], pairs, right=True)
    peer_N = torch.searchsorted(peers.rows[1:], rows, right=True)
    weight_places_K = pairs + row_words * peers.rows[peer_K]
    mask_places_N = row_words * rows + peers.pairs[peer_N + 1]
    columns = torch.arange(row_words, device=rows.device, dtype=torch.int32)
    return weight_places_K, mask_places_N.unsqueeze(1) + columns


def _read_words(
    words: Tensor, arrived: PeerPrefix, num_experts: int, num_rows: int, num_pairs: int, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """weights_K in the order of arrival, and mask_NL."""
    row_words = mask_words(num_experts, words.dtype)
    weight_places_K, mask_places = _places(arrived, num_rows, num_pairs, row_words)
    bits = torch.arange(8 * words.element_size(), device=words.device, dtype=words.dtype)
    mask = ((words[mask_places].unsqueeze(-1) >> bits) & 1).flatten(1)
    return words[weight_places_K].view(weight_dtype), mask[:, :num_experts].bool()


def _to_bits(mask_NL: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool [N, L] → [N, words a row]; bit b of word w is expert w * bits + b."""
    bits = 8 * dtype.itemsize
    row_words = mask_words(mask_NL.shape[1], dtype)
    padded = F.pad(mask_NL, (0, row_words * bits - mask_NL.shape[1])).view(-1, row_words, bits).to(dtype)
    return (padded << torch.arange(bits, device=mask_NL.device, dtype=dtype)).sum(dim=-1, dtype=dtype)


@functools.cache
def _triton() -> ModuleType:
    from ds_remoe.kernels import exchange_triton

    return exchange_triton
