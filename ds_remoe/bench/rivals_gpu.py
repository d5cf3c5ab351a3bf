"""MoE layers of other packages, on a GPU where they are installed: scattermoe and megablocks.

`bash launch/setup.sh rivals` installs them. Both take the same number of experts for every token.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_remoe.bench.rivals import Case, ExpertGradients, LeftOut, Rival, RivalFactory

SCATTERMOE = "scattermoe"
MEGABLOCKS = "megablocks"


class ScatterMoE(Rival):
    """`scattermoe.mlp.GLUMLP` (release 0.2 and later), which holds up above gate."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        k = _fixed_k("scattermoe", case)
        module = importlib.import_module("scattermoe.mlp")
        with torch.device("meta"):
            self.mlp = module.GLUMLP(case.workload.hidden_size, case.width, case.workload.num_experts, k)
        gate, up = case.gate_up.split(case.width, dim=1)
        self.mlp.experts.weight = nn.Parameter(torch.cat([up, gate], dim=1))
        self.mlp.output_experts.weight = nn.Parameter(case.down)
        self.k = k

    def forward(self) -> Tensor:
        weights_Tk, expert_ids_Tk = _as_topk(self.case, self.k)
        output_TD: Tensor = self.mlp(self.case.x_TD, weights_Tk, expert_ids_Tk)
        return output_TD

    def expert_gradients(self) -> list[ExpertGradients]:
        up, gate = self.mlp.experts.weight.grad.split(self.case.width, dim=1)
        return list(zip(gate, up, self.mlp.output_experts.weight.grad, strict=True))


class MegaBlocks(Rival):
    """megablocks' dropless MLP (release 0.7 and later) with grouped GEMMs, down stored transposed."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        k = _fixed_k("megablocks", case)
        if importlib.util.find_spec("grouped_gemm") is None:
            raise LeftOut("its grouped_gemm is not installed (bash launch/setup.sh rivals)")
        settings = importlib.import_module("megablocks.layers.arguments").Arguments(
            hidden_size=case.workload.hidden_size,
            ffn_hidden_size=case.width,
            bias=False,
            return_bias=False,
            activation_fn=F.silu,
            moe_num_experts=case.workload.num_experts,
            moe_top_k=k,
            memory_optimized_mlp=True,
            mlp_type="glu",
            mlp_impl="grouped",
            fp16=case.x_TD.dtype == torch.float16,
            bf16=case.x_TD.dtype == torch.bfloat16,
        )
        self.layer = importlib.import_module("megablocks.layers.dmoe").ParallelDroplessMLP(settings)
        gate, up = case.gate_up.split(case.width, dim=1)
        self.layer.mlp.w1 = nn.Parameter(gate.flatten(0, 1))
        self.layer.mlp.v1 = nn.Parameter(up.flatten(0, 1))
        self.layer.mlp.w2 = nn.Parameter(case.down.transpose(1, 2).flatten(0, 1))
        self.k = k

    def forward(self) -> Tensor:
        weights_Tk, expert_ids_Tk = _as_topk(self.case, self.k)
        output_TD: Tensor = self.layer.forward_once(self.case.x_TD, weights_Tk, expert_ids_Tk)[0]
        return output_TD

    def expert_gradients(self) -> list[ExpertGradients]:
        mlp, width = self.layer.mlp, self.case.width
        gate, up, down = (parameter.grad.unflatten(0, (-1, width)) for parameter in (mlp.w1, mlp.v1, mlp.w2))
        return list(zip(gate, up, down.transpose(1, 2), strict=True))


def _fixed_k(package: str, case: Case) -> int:
    if not case.x_TD.is_cuda:
        raise LeftOut("it runs on a GPU only")
    if importlib.util.find_spec(package) is None:
        raise LeftOut("it is not installed (bash launch/setup.sh rivals)")
    if case.workload.fixed_k is None:
        raise LeftOut("it needs the same number of experts for every token")
    return case.workload.fixed_k


def _as_topk(case: Case, k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, k] in the tokens' dtype with gradient, and expert ids [T, k]."""
    weights_Tk, expert_ids_Tk = case.scores_TE.topk(k, dim=1)
    return weights_Tk.to(case.x_TD.dtype), expert_ids_Tk


RIVALS: Mapping[str, RivalFactory] = {SCATTERMOE: ScatterMoE, MEGABLOCKS: MegaBlocks}
