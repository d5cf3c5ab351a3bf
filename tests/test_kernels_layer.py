"""A whole layer on its Triton kernels, under the interpreter, against the same layer on the twins."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from ds_remoe.kernels import exchange

TOKENS, D, H, EXPERTS, SILENT, BUSY = 40, 20, 12, 8, 0, 1
BUDGETS = (None, 0.5)
CUT = exchange.Packed.cut
Case = tuple[str, int, float | None, bool, int]
"""Router, ep_size, activation budget, hierarchical_all_to_all, and tokens with experts in a forward pass before."""


def compare_layers() -> list[str]:
    """What differs, for every router, ep_size and budget, on this rank."""
    return [line for case in cases() for line in compare(*case)]


def compare_layers_by_nodes() -> list[str]:
    """What differs on this rank, one of two nodes of two."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return [line for before in (5, TOKENS) for line in compare("relu", 4, None, True, before)]


def cases() -> Iterator[Case]:
    for router, ep_size, budget in itertools.product(("relu", "topk"), (1, 2), BUDGETS):
        yield router, ep_size, budget, False, 0
    for before in (5, TOKENS):  # room for too little, and for enough
        yield "relu", 2, None, False, before


def compare(*case: *Case) -> list[str]:
    on_kernels, on_twins = (run_layer(*case, kernels=kernels) for kernels in ("auto", "torch"))
    wrong = []
    for name, expected in on_twins.items():
        error = float((on_kernels[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
        if not error < 2e-5:
            wrong.append(f"{name}: {error:.1e} with {case}")
    return wrong


def run_layer(
    router: str, ep_size: int, budget: float | None, by_nodes: bool, before: int, kernels: str
) -> dict[str, Tensor]:
    """Output, counts and all gradients; one expert has no token, one all of them."""
    from ds_remoe import MoE
    from ds_remoe.kernels.backend import kernels_wanted, use_triton
    from ds_remoe.kernels.grouped_swiglu_triton_kernels import INTERPRETED
    from ds_remoe.moe import budget as budgets
    from ds_remoe.moe.experts import SwiGLU

    budgets.MIN_CHUNK_PAIRS = 16  # so that the budget cuts the busy expert
    exchange.SPARE = 0
    os.environ["DS_REMOE_KERNELS"] = kernels
    kernels_wanted.cache_clear()
    torch.manual_seed(0)
    layer = MoE(
        D,
        SwiGLU(D, H),
        num_experts=EXPERTS,
        ep_size=ep_size,
        k=2,
        router=router,
        activation_budget=budget,
        hierarchical_all_to_all=by_nodes,
    )
    layer.set_deepspeed_parallelism()
    generator = torch.Generator().manual_seed(1 + int(os.environ["RANK"]))
    x = torch.randn(TOKENS, D, generator=generator)
    x[:, 0] = 4.0
    x.requires_grad_()
    assert use_triton(x) == (kernels == "auto"), "the kernels would not run"
    assert INTERPRETED, "the kernels were not made for the interpreter"
    with torch.no_grad():
        weight = layer.deepspeed_moe.gate.wg.weight.normal_(generator=torch.Generator().manual_seed(2))
        weight[SILENT, 0], weight[BUSY, 0] = -50.0, 50.0
    assert (layer.deepspeed_moe.nodes is not None) == by_nodes
    if before:
        layer(x.detach(), used_token=torch.arange(TOKENS) < before)
    taken = []
    exchange.Packed.cut = lambda packed, *to: taken.append(to) or CUT(packed, *to)
    output, l_aux, counts = layer(x)
    fits = kernels == "auto" and before == TOKENS
    assert len(taken) == (0 if not fits else 2 if by_nodes else 1), "packed ahead or not"
    assert counts[SILENT] == 0
    assert counts[BUSY] == TOKENS
    upstream = torch.randn(output.shape, generator=generator)
    ((output * upstream).sum() + 1e8 * l_aux).backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "counts": counts.double(), "x": x.grad, **gradients}


def test_layers_on_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one rank's experts and two's, with and without a budget that cuts experts and sends rows again."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [line for lines in run_ranks(compare_layers, 2) for line in lines] == []


def test_layers_on_triton_kernels_over_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [line for lines in run_ranks(compare_layers_by_nodes, 4) for line in lines] == []
