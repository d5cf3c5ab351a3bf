"""A budget for the dense stage: how many pre-activations are kept for backward, the rest being recomputed.

Early in training each expert takes more than half of the tokens (stage I), so a layer has up to E/k times the pairs
that it settles at. With a budget the pairs beyond it go through in chunks whose pre-activation [n, 2H] lives for the
chunk alone, in forward, and again in backward, where it is computed anew: one GEMM of the forward's two, two thirds of
its FLOPs, hence 2/9 of the layer's forward and backward for such a pair. Within the budget everything is kept.

With expert parallelism the dense stage also brings nearly every token to every rank. The rows of a layer for which the
budget has no room are not kept either but sent again in backward, which takes one exchange more. All ranks must agree
on that, so it is decided by the group's mean number of rows a token, which each rank knows.

The layers of a model may share one budget in a forward pass, since what they keep is alive together when backward
begins: a layer that stays denser than the others then recomputes only what the others leave no room for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# With fewer rows a GEMM mostly waits for its weights.
MIN_CHUNK_PAIRS = 128
# Beyond the budget no more than this share of the expected pairs goes through at once, so a budget holds that at least.
LEAST_BUDGET = 0.25
_ROUNDING = 1e-9  # a budget of exactly what comes has room for it


@dataclass
class ActivationBudget:
    """What one micro-batch may keep on one rank; a forward pass takes from it, so each needs a new one.

    Attributes:
        pairs: pre-activations that may still exist at a time: those to keep for backward and those of one chunk.
        call: pairs that go through at once where all of a layer's are kept.
        chunk: pairs that go through at once where they are not.
        layers: that have still to take their part, this many `plan`s.
        rows_per_token: rows received from the ranks of the group that may still be kept, for each token of a rank.
    """

    pairs: int
    call: int
    chunk: int
    layers: int = 1
    rows_per_token: float = math.inf

    @classmethod
    def of(
        cls, activation_budget: float, expected_pairs: int, layers: int = 1, expected_rows: float = math.inf
    ) -> ActivationBudget:
        """The budget of some layers, with chunks large enough to keep the kernels busy.

        Args:
            activation_budget: multiple of the expected pairs, and of the expected rows.
            expected_pairs: k·T, the pairs of a layer and rank once the sparsity has settled.
            layers: that share it.
            expected_rows: rows that a token then becomes in a layer, see `settled_rows`; without expert parallelism
                there are none to keep.
        """
        chunk = max(int(LEAST_BUDGET * expected_pairs), MIN_CHUNK_PAIRS)
        call = max(int(activation_budget * expected_pairs), chunk)
        return cls(layers * call, call, chunk, layers, layers * activation_budget * expected_rows)

    def keep_rows(self, rows_per_token: float) -> bool:
        """Keep a layer's rows, all or none: True where there is room. The same on all ranks of a group."""
        fits = rows_per_token <= self.rows_per_token * (1 + _ROUNDING)
        self.rows_per_token -= rows_per_token if fits else 0.0
        return fits

    def plan(self, counts_L: Sequence[int]) -> list[Chunk]:
        """Cut the next layer's pairs into chunks, in order, and take those that it keeps.

        Every expert is in a chunk at least, with or without pairs. Experts that fit share a chunk, and an expert with
        more pairs has even chunks of its own. Where not all pairs can be kept, a chunk is if that leaves room for one
        that is not; so does a layer that keeps all, unless it is the last.
        """
        total = sum(counts_L)
        self.layers -= 1
        keep_all = total <= self.pairs - (self.chunk if self.layers > 0 else 0)
        chunks: list[Chunk] = []
        start = 0
        for experts, counts, continues in _cut(counts_L, self.call if keep_all else self.chunk):
            size = sum(counts)
            keep = keep_all or size <= self.pairs - self.chunk
            chunks.append(Chunk(experts, slice(start, start + size), counts, continues, keep))
            start += size
            self.pairs -= size if keep else 0
        return chunks

    def take(self, pairs: int) -> bool:
        """Keep these pairs' activations, all or none: True where there is room."""
        fits = pairs <= self.pairs
        self.pairs -= pairs if fits else 0
        return fits


@dataclass(frozen=True)
class Chunk:
    """Pairs that go through the experts in one call: those of whole experts, or some of one expert's.

    Attributes:
        experts: the experts [start, stop).
        pairs: their place among all pairs.
        counts: pairs of each of the experts.
        continues: an earlier chunk holds the first pairs of this expert.
        keep: keep the pre-activation for backward.
    """

    experts: slice
    pairs: slice
    counts: list[int]
    continues: bool
    keep: bool


def expected_rows(density: float, num_experts: int, ep_size: int) -> float:
    """Rows that a token becomes in a layer: the ranks that it needs, its experts taken as independent.

    Args:
        density: share of all (token, expert) pairs that are active.
        num_experts: E, in equal shares on the ranks.
        ep_size: ranks.
    """
    return ep_size * (1.0 - (1.0 - density) ** (num_experts // ep_size))


def settled_rows(k: int, num_experts: int, ep_size: int) -> float:
    """Rows that a token becomes once the sparsity has settled, with k active experts a token.

    Where each token has exactly k it needs more ranks than where k is the mean, so that is what is counted on.
    """
    elsewhere = math.comb(num_experts - num_experts // ep_size, k) / math.comb(num_experts, k)
    return ep_size * (1.0 - elsewhere)


def plan_chunks(counts_L: Sequence[int], budget: ActivationBudget | None) -> list[Chunk]:
    """`budget.plan`; without a budget all pairs in one chunk, kept."""
    if budget is not None:
        return budget.plan(counts_L)
    return [Chunk(slice(0, len(counts_L)), slice(0, sum(counts_L)), list(counts_L), continues=False, keep=True)]


def _cut(counts_L: Sequence[int], limit: int) -> Iterator[tuple[slice, list[int], bool]]:
    """Experts, their counts, and whether this goes on with an expert that was begun; at most `limit` pairs each."""
    first, waiting = 0, 0
    for expert, count in enumerate(counts_L):
        if waiting + count > limit and first < expert:
            yield slice(first, expert), list(counts_L[first:expert]), False
            first, waiting = expert, 0
        if count > limit:
            parts = -(-count // limit)
            for part in range(parts):
                size = count * (part + 1) // parts - count * part // parts
                yield slice(expert, expert + 1), [size], part > 0
            first = expert + 1
        else:
            waiting += count
    if first < len(counts_L):
        yield slice(first, len(counts_L)), list(counts_L[first:]), False
