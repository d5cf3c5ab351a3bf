"""What plain torch offers in place of the MoE layer: the dense FFN, a loop over experts, grouped_mm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_remoe.bench.rivals import (
    Case,
    ExpertGradients,
    LeftOut,
    Rival,
    RivalFactory,
    add_weighted,
    list_pairs,
    separate_experts,
    separate_gradients,
    stacked_gradients,
)
from ds_remoe.moe.experts import SwiGLU

DENSE = "dense, equal FLOPs"
DENSE_ALL = "dense, all experts"
LOOP = "expert loop"
GROUPED_MM = "grouped_mm"

DENSE_ALL_LIMIT = 8
"""Largest multiple of the active FLOPs for which all experts are computed densely."""


class Dense(Rival):
    """A dense SwiGLU FFN: `active` experts' width, rounded to a multiple of 8."""

    computes_the_layer = False

    def __init__(self, case: Case, active: float) -> None:
        super().__init__(case)
        self.width = max(8 * round(active * case.width / 8), 8)
        with torch.device("meta"):
            self.ffn = SwiGLU(case.workload.hidden_size, self.width)
        self.ffn.to_empty(device=case.x_TD.device).to(case.x_TD.dtype)
        for parameter in self.ffn.parameters():
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self) -> Tensor:
        output_TD: Tensor = self.ffn(self.case.x_TD)
        return output_TD

    def flops(self, passes: int) -> int:
        return passes * 6 * self.case.workload.tokens * self.case.workload.hidden_size * self.width


def dense_of_equal_flops(case: Case) -> Rival:
    """A dense FFN as wide as a token's active experts on average: the limit."""
    if case.workload.pairs == 0:
        raise LeftOut("no pair is active")
    return Dense(case, case.workload.mean_active)


def dense_of_all_experts(case: Case) -> Rival:
    """A dense FFN as wide as all experts."""
    multiple = case.workload.num_experts * case.workload.tokens / max(case.workload.pairs, 1)
    if multiple > DENSE_ALL_LIMIT:
        raise LeftOut(f"it takes {multiple:.0f} times the active FLOPs, more than {DENSE_ALL_LIMIT}")
    return Dense(case, case.workload.num_experts)


class Loop(Rival):
    """A plain loop: each expert takes its tokens' rows, three nn.Linear, and adds its weighted rows to the output."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.experts = separate_experts(case)

    def forward(self) -> Tensor:
        case = self.case
        out_TD = torch.zeros_like(case.x_TD)
        columns = zip(case.mask_TE.unbind(1), case.scores_ET.unbind(0), self.experts, strict=True)
        for mask_T, weights_T, expert in columns:
            ids = mask_T.nonzero().squeeze(1)
            if len(ids):
                weights = weights_T.index_select(0, ids).unsqueeze(1).to(out_TD.dtype)
                out_TD.index_add_(0, ids, expert(case.x_TD.index_select(0, ids)) * weights)
        return out_TD

    def expert_gradients(self) -> list[ExpertGradients]:
        return separate_gradients(self.experts)


class GroupedMM(Rival):
    """torch's grouped_mm, gate and up in one, with copied rows and nothing fused."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if not hasattr(F, "grouped_mm"):
            raise LeftOut(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
        self.gate_up = nn.Parameter(case.gate_up)
        self.down = nn.Parameter(case.down)

    def forward(self) -> Tensor:
        token_ids_N, weights_N, counts_E = list_pairs(self.case)
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        rows = self.case.x_TD.index_select(0, token_ids_N)
        gate, up = F.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        results = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends_E)
        return add_weighted(self.case, results, token_ids_N, weights_N)

    def expert_gradients(self) -> list[ExpertGradients]:
        return stacked_gradients(self.gate_up.grad, self.down.grad, self.case.width)


RIVALS: Mapping[str, RivalFactory] = {
    DENSE: dense_of_equal_flops,
    DENSE_ALL: dense_of_all_experts,
    LOOP: Loop,
    GROUPED_MM: GroupedMM,
}
