"""A budget for the dense stage: how many pre-activations of a layer are kept for backward, the rest being recomputed.

Early in training each expert takes more than half of the tokens (stage I), so a layer has up to E/k times the pairs
that it settles at. With a budget the pairs beyond it go through in chunks whose pre-activation [n, 2H] lives for the
chunk alone, in forward, and again in backward, where it is computed anew: one GEMM of the forward's two, two thirds of
its FLOPs, hence 2/9 of the layer's forward and backward for such a pair. Within the budget nothing changes: all pairs
in one call, everything kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# With fewer rows a GEMM mostly waits for its weights.
MIN_CHUNK_PAIRS = 128
# Beyond the budget no more than this share of the expected pairs goes through at once, so a budget holds that at least.
LEAST_BUDGET = 0.25


@dataclass(frozen=True)
class PairBudget:
    """Sizes in active pairs, for one layer, micro-batch and rank.

    Attributes:
        pairs: pre-activations that may exist at a time: those kept for backward and those of one chunk.
        chunk: pairs that go through at once where there are more than `pairs`.
    """

    pairs: int
    chunk: int

    @classmethod
    def of(cls, activation_budget: float, expected_pairs: int) -> PairBudget:
        """The budget of a layer, with chunks large enough to keep the kernels busy.

        Args:
            activation_budget: multiple of the expected pairs.
            expected_pairs: k·T, the pairs of a rank once the sparsity has settled.
        """
        chunk = max(int(LEAST_BUDGET * expected_pairs), MIN_CHUNK_PAIRS)
        return cls(max(int(activation_budget * expected_pairs), chunk), chunk)


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


def plan_chunks(counts_L: Sequence[int], budget: PairBudget | None) -> list[Chunk]:
    """Cut a layer's pairs into chunks, in order; every expert is in one at least, with or without pairs.

    Without a budget, or within it, there is one chunk. Otherwise none is larger than budget.chunk: experts that fit
    share one, and an expert with more pairs has even chunks of its own. A chunk is kept where it leaves room in the
    budget for one that is not.
    """
    total = sum(counts_L)
    if budget is None or total <= budget.pairs:
        return [Chunk(slice(0, len(counts_L)), slice(0, total), list(counts_L), continues=False, keep=True)]
    chunks: list[Chunk] = []
    start = kept = 0
    for experts, counts, continues in _cut(counts_L, budget.chunk):
        size = sum(counts)
        keep = kept + size <= budget.pairs - budget.chunk
        chunks.append(Chunk(experts, slice(start, start + size), counts, continues, keep))
        start += size
        kept += size if keep else 0
    return chunks


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
