"""The layer equals the dense sum Σ_e R_e · FFN_e(x) in fp64: output and every gradient, at any ep_size."""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn

from ds_remoe.moe import MoE, SwiGLU

D, H, E = 10, 7, 8
ROUTINGS = ("random", "empty", "full", "one_expert", "one_rank_silent", "last_rank_only")
EXPERTS = "deepspeed_moe.experts.deepspeed_experts."


class TanhExpert(nn.Module):
    """An expert that is not SwiGLU: biases, and a tuple as DeepSpeed's experts may return."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, H)
        self.outer = nn.Linear(H, D)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.outer(torch.tanh(self.inner(x))), None


def expert_of(kind: str) -> nn.Module:
    return (SwiGLU(D, H) if kind == "swiglu" else TanhExpert()).double()


def make_layer(kind: str, router: str, ep_size: int, **options: Any) -> MoE:
    torch.manual_seed(0)
    layer = MoE(D, expert_of(kind), num_experts=E, ep_size=ep_size, k=3, router=router, **options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(torch.randn(E, D, generator=generator, dtype=torch.float64))
    return layer


def make_case(routing: str, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Tokens and the router weight that produce a routing; the token count divides by nothing."""
    generator = torch.Generator().manual_seed(100 + rank)
    tokens = 0 if routing == "random" and rank == 3 else 13 + 4 * rank
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(E, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if routing != "random":
        x[:, 0] = 1.0
        weight[:, 0] = {"empty": -50.0, "full": 50.0}.get(routing, -50.0)
        if routing == "one_expert":
            weight[2, 0] = 50.0
        elif routing == "last_rank_only":
            weight[E - E // world_size :, 0] = 50.0
        elif routing == "one_rank_silent":
            weight[:, 0] = 0.0
            x[:, 0] = 1.0
            if rank == world_size - 1:
                weight[:, 0] = -50.0
    return x, weight


def dense_sum(x: Tensor, state: dict[str, Tensor], kind: str, router: str) -> tuple[Tensor, Tensor]:
    """The layer by its definition, from a full state dict: (output, mask)."""
    logits = x @ state["deepspeed_moe.gate.wg.weight"].t()
    if router == "relu":
        weights = F.relu(logits)
    else:
        probs = logits.softmax(-1)
        weights = probs * torch.zeros_like(probs).scatter(1, probs.topk(3, dim=-1).indices, 1.0)
    out = torch.zeros_like(x)
    for e in range(E):
        p = {name.removeprefix(f"{EXPERTS}{e}."): t for name, t in state.items() if name.startswith(f"{EXPERTS}{e}.")}
        if kind == "swiglu":
            y = (F.silu(x @ p["gate_proj.weight"].t()) * (x @ p["up_proj.weight"].t())) @ p["down_proj.weight"].t()
        else:
            y = torch.tanh(x @ p["inner.weight"].t() + p["inner.bias"]) @ p["outer.weight"].t() + p["outer.bias"]
        out = out + weights[:, e : e + 1] * y
    return out, weights.detach() > 0


def gradients(layer: MoE, first_expert: int) -> dict[str, Tensor]:
    """Gradients under state-dict names with global expert numbers, through the layer's own hooks."""
    twin = {name: p.grad for name, p in layer.named_parameters()}
    assert all(g is not None for g in twin.values()), "a parameter has no gradient"
    saved = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(twin[name])
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        for name, p in layer.named_parameters():
            p.copy_(saved[name])
    return {globalise(name, first_expert): t for name, t in state.items()}


def globalise(name: str, first_expert: int) -> str:
    if not name.startswith(EXPERTS):
        return name
    index, rest = name.removeprefix(EXPERTS).split(".", 1)
    return f"{EXPERTS}{int(index) + first_expert}.{rest}"


def check_cases(ep_size: int, **options: Any) -> list[str]:
    """All experts, routers and routings on this rank; returns the cases that differ, with the error."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    wrong = []
    for kind, router in itertools.product(("swiglu", "tanh"), ("relu", "topk")):
        layer = make_layer(kind, router, ep_size, **options)
        layer.set_deepspeed_parallelism()
        first = (rank % ep_size) * layer.num_local_experts
        full = make_layer_state(layer, first, ep_size)
        for routing in ROUTINGS if router == "relu" else ("random",):
            x, weight = make_case(routing, rank, world_size)
            with torch.no_grad():
                layer.deepspeed_moe.gate.wg.weight.copy_(weight)
            layer.zero_grad()
            x.requires_grad_()
            output, _, counts = layer(x)
            upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
            output.backward(upstream)

            state = {n: t.clone().requires_grad_() for n, t in full.items()}
            state["deepspeed_moe.gate.wg.weight"] = weight.clone().requires_grad_()
            x_ref = x.detach().clone().requires_grad_()
            expected, mask = dense_sum(x_ref, state, kind, router)
            expected.backward(upstream)

            errors = {"output": output - expected, "x": x.grad - x_ref.grad, "counts": (counts - mask.sum(0)).double()}
            reference = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in state.items()}
            if ep_size > 1:  # an expert gathers the tokens of every rank of its EP group
                for name in sorted(n for n in reference if n.startswith(EXPERTS)):
                    dist.all_reduce(reference[name], group=layer.deepspeed_moe.ep_group)
            errors |= {n: gradient - reference[n] for n, gradient in gradients(layer, first).items()}
            for name, e in errors.items():
                size = float(e.abs().max()) if e.numel() else 0.0
                if not size < 1e-10:
                    wrong.append(f"rank {rank} ep {ep_size} {options} {kind} {router} {routing} {name}: {size}")
    return wrong


def make_layer_state(layer: MoE, first: int, ep_size: int) -> dict[str, Tensor]:
    """The layer's weights with every expert of the EP group."""
    local = {globalise(n, first): t.clone() for n, t in layer.state_dict().items()}
    if ep_size == 1:
        return local
    gathered: list[dict[str, Tensor]] = [{} for _ in range(ep_size)]
    dist.all_gather_object(gathered, local, group=layer.deepspeed_moe.ep_group)
    return {n: t for part in gathered for n, t in part.items()}


def check_ep_sizes() -> list[str]:
    wrong = [line for ep_size in (1, 2, 4) for line in check_cases(ep_size)]
    wrong += check_cases(4, activation_budget=0.25)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    for options in ({"hierarchical_all_to_all": True}, {"hierarchical_all_to_all": True, "activation_budget": 0.25}):
        wrong += check_cases(4, **options)
    return wrong


def test_layer_equals_the_dense_sum() -> None:
    """On four ranks: all experts on each, two EP groups of two, one of four, and that one as two nodes of two ranks."""
    wrong = [line for lines in run_ranks(check_ep_sizes, 4) for line in lines]
    assert not wrong, "\n".join(wrong)
