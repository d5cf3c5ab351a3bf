"""Workloads of the layer benchmark: sizes of one MoE layer and the routing of its tokens.

Shape suffixes as in moe/routing.py: T tokens, D hidden size, H width of one expert, E experts, N active pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

WORKLOADS_HELP = (
    "e<E>: E experts, k=1, balanced; g<G>: granularity G at E=8, so 8·G experts of width H/G, k=G, balanced; "
    "skew: E=8, k=1, one expert takes half of the tokens; "
    "stage1, stage3: E=8, each pair active with probability 0.5, 0.125"
)
PAPER_WIDTHS = {"182M": (768, 3072), "469M": (1024, 4096), "978M": (1536, 6144)}
"""Hidden size and FFN width of the paper's models, by their active parameters."""

BASE_EXPERTS = 8


class WorkloadError(ValueError):
    """A workload cannot be made; the message names it, what is wrong and the remedy."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that the workloads share.

    Attributes:
        tokens: T.
        hidden_size: D.
        ffn_hidden_size: width of an expert at granularity 1.
        label: name of this pair of widths where several are measured.
    """

    tokens: int
    hidden_size: int
    ffn_hidden_size: int
    label: str = ""


@dataclass(frozen=True)
class Workload:
    """One layer's sizes and routing.

    Attributes:
        name: as given on the command line.
        label: name of the widths; "" where only one pair is measured.
        hidden_size: D.
        expert_width: H.
        k: wanted mean number of active experts a token, for which the layer is built.
        mask_TE: bool, True where the pair is active.
        scores_TE: fp32; positive under the mask, where it is the routing weight, and negative elsewhere, so that it is
            also the logits of a ReLU router with this routing.
    """

    name: str
    label: str
    hidden_size: int
    expert_width: int
    k: int
    mask_TE: Tensor
    scores_TE: Tensor

    @property
    def title(self) -> str:
        return f"{self.label}/{self.name}" if self.label else self.name

    @property
    def tokens(self) -> int:
        return self.mask_TE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.mask_TE.shape[1]

    @cached_property
    def counts(self) -> list[int]:
        """Active tokens of each expert."""
        return [int(count) for count in self.mask_TE.sum(dim=0)]

    @property
    def pairs(self) -> int:
        """N."""
        return sum(self.counts)

    @property
    def mean_active(self) -> float:
        """Mean number of active experts of a token."""
        return self.pairs / self.tokens

    @cached_property
    def fixed_k(self) -> int | None:
        """Active experts of every token, None where tokens differ or have none."""
        per_token = self.mask_TE.sum(dim=1).unique()
        return int(per_token[0]) or None if len(per_token) == 1 else None

    def flops(self, passes: int) -> int:
        """FLOPs of the experts' matrix products: `passes` is 1 for forward, 3 for forward and backward."""
        return passes * 6 * self.pairs * self.hidden_size * self.expert_width

    def least_weight_bytes(self, element_size: int, backward: bool) -> int:
        """Bytes that weights must cost: read once a pass where an expert has tokens, each gradient written once."""
        expert = 3 * self.hidden_size * self.expert_width * element_size
        busy = sum(count > 0 for count in self.counts)
        return expert * (2 * busy + self.num_experts if backward else busy)


def build_workload(name: str, sizes: Sizes, seed: int) -> Workload:
    """The workload of this name (see WORKLOADS_HELP), the same for the same seed.

    Raises:
        WorkloadError: the name is unknown, or the sizes do not fit it.
    """
    generator = torch.Generator().manual_seed(seed)
    width, k = sizes.ffn_hidden_size, 1
    if match := re.fullmatch(r"e([1-9]\d*)", name):
        mask_TE = _balanced(sizes.tokens, int(match[1]), 1, generator)
    elif match := re.fullmatch(r"g([1-9]\d*)", name):
        k = int(match[1])
        if width % k:
            raise WorkloadError(f"workload {name}: {k} does not divide the FFN width {width}; choose another")
        width //= k
        mask_TE = _balanced(sizes.tokens, BASE_EXPERTS * k, k, generator)
    elif name in _NAMED:
        mask_TE = _NAMED[name](sizes.tokens, generator)
    else:
        raise WorkloadError(f"workload {name!r}: unknown; known are {WORKLOADS_HELP}")
    return Workload(name, sizes.label, sizes.hidden_size, width, k, mask_TE, _draw_scores(mask_TE, generator))


def replay(
    path: Path, records: int, hidden_size: int | None = None, ffn_hidden_size: int | None = None, label: str = ""
) -> list[Workload]:
    """Workloads with the recorded routings of a trace: `records` of those with an active pair, evenly over the file.

    Args:
        path: written by `ds-remoe bench record`.
        records: how many; all if there are fewer.
        hidden_size, ffn_hidden_size: in place of the recorded ones; tokens and experts are always those of the trace.
        label: see `Sizes`.

    Raises:
        ds_remoe.bench.trace.TraceError: the file is no trace.
        WorkloadError: it holds no active pair.
    """
    from ds_remoe.bench.trace import read_metadata, read_trace

    run = read_metadata(path)
    widths = hidden_size or run.hidden_size, ffn_hidden_size or run.expert_hidden_size
    traced = [record for record in read_trace(path) if bool(record.mask_TE.any())]
    if not traced:
        raise WorkloadError(f"--trace {path}: no pair is active in it; record it anew")
    last, count = len(traced) - 1, min(records, len(traced))
    workloads = []
    for record in (traced[i * last // max(count - 1, 1)] for i in range(count)):
        scores_TE = torch.where(record.mask_TE, record.weights_TE.float(), -0.5)
        name = f"trace: step {record.step}, layer {record.layer}, rank {record.rank}"
        workloads.append(Workload(name, label, *widths, run.k, record.mask_TE, scores_TE))
    return workloads


def _balanced(tokens: int, experts: int, k: int, generator: torch.Generator) -> Tensor:
    """k experts a token, every E/k consecutive tokens covering each expert once."""
    per_block = experts // k
    blocks = -(-tokens // per_block)
    chosen_Tk = torch.rand(blocks, experts, generator=generator).argsort(dim=1).view(blocks * per_block, k)[:tokens]
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen_Tk, True)


def _skewed(tokens: int, generator: torch.Generator) -> Tensor:
    first = torch.zeros(tokens // 2, BASE_EXPERTS, dtype=torch.bool)
    first[:, 0] = True
    others = torch.zeros(tokens - tokens // 2, BASE_EXPERTS, dtype=torch.bool)
    others[:, 1:] = _balanced(len(others), BASE_EXPERTS - 1, 1, generator)
    return torch.cat([first, others])[torch.randperm(tokens, generator=generator)]


def _independent(density: float) -> Callable[[int, torch.Generator], Tensor]:
    return lambda tokens, generator: torch.rand(tokens, BASE_EXPERTS, generator=generator) < density


_NAMED: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "skew": _skewed,
    "stage1": _independent(0.5),
    "stage3": _independent(0.125),
}


def _draw_scores(mask_TE: Tensor, generator: torch.Generator) -> Tensor:
    """Weights of a magnitude that bf16 does not turn negative; with one fixed k > 1 they add up to 1 as TopK's do."""
    scores_TE = torch.empty(mask_TE.shape).uniform_(0.55, 1.0, generator=generator)
    weights_TE = scores_TE * mask_TE
    active_T = mask_TE.sum(dim=1, keepdim=True)
    if len(active_T.unique()) == 1 and int(active_T[0]) > 1:
        weights_TE = weights_TE / weights_TE.sum(dim=1, keepdim=True)
    return torch.where(mask_TE, weights_TE, -scores_TE)
