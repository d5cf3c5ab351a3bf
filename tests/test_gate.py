"""`ReLUGate` inside DeepSpeed's own `MOELayer`, in both gate protocols, against the dense sum."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.experts import Experts
from deepspeed.moe.sharded_moe import MOELayer
from ranks import run_ranks
from torch import Tensor, nn

from ds_remoe.moe import ReLUGate, SparsityController

D, E, S = 6, 4, 11


def stock_layer(ep_size: int, group: dist.ProcessGroup | None) -> MOELayer:
    torch.manual_seed(0)
    local = E // ep_size
    experts = Experts(nn.Linear(D, D), local, f"ep_size_{ep_size}")
    layer = MOELayer(ReLUGate(D, E, k=1), experts, f"ep_size_{ep_size}", ep_size, local).double()
    if group is not None:
        layer._set_ep_group(group)
    rank = dist.get_rank(group) if group is not None else 0
    with torch.no_grad():
        for i, expert in enumerate(layer.experts.deepspeed_experts):
            generator = torch.Generator().manual_seed(10 + rank * local + i)
            expert.weight.copy_(torch.randn(D, D, generator=generator, dtype=torch.float64))
            expert.bias.copy_(torch.randn(D, generator=generator, dtype=torch.float64))
    return layer


def dense(x: Tensor, wg: Tensor) -> Tensor:
    weights, out = torch.relu(x @ wg.t()), torch.zeros_like(x)
    for e in range(E):
        generator = torch.Generator().manual_seed(10 + e)
        weight = torch.randn(D, D, generator=generator, dtype=torch.float64)
        bias = torch.randn(D, generator=generator, dtype=torch.float64)
        out = out + weights[:, e : e + 1] * (x @ weight.t() + bias)
    return out


def tokens(rank: int, shift: float) -> Tensor:
    x = torch.randn(S + rank, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    x[:, 0] = shift
    return x


def check_stock_layer(ep_size: int) -> float:
    """Largest error over routings from no pair at all to every pair, ranks differing."""
    group = dist.new_group(list(range(ep_size)))
    layer = stock_layer(ep_size, group)
    controller = SparsityController(layer)
    rank, worst = dist.get_rank(), 0.0
    with torch.no_grad():
        layer.gate.wg.weight[:, 0] = 1.0
    for shift in (0.0, -9.0, 9.0, 9.0 if rank == 0 else -9.0):
        x = tokens(rank, shift).requires_grad_()
        layer.zero_grad()
        output = layer(x, None)
        output.square().sum().backward()
        x_ref = x.detach().clone().requires_grad_()
        wg = layer.gate.wg.weight.detach().clone().requires_grad_()
        expected = dense(x_ref, wg)
        expected.square().sum().backward()
        for got, reference in (
            (output, expected),
            (x.grad, x_ref.grad),
            (layer.gate.wg.weight.grad, wg.grad),
        ):
            worst = max(worst, float((got - reference).abs().max() / reference.abs().max().clamp(min=1.0)))
    report = controller.step()
    assert report is not None
    assert report.layers[0].tokens == 4 * sum(S + r for r in range(ep_size))
    return worst


def test_in_the_stock_layer_over_two_ranks() -> None:
    assert max(run_ranks(check_stock_layer, 2, 2)) < 1e-6  # the stock layer combines in fp32


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_a_layer_of_another_number_of_experts_is_refused(experts: int) -> None:
    layer = MOELayer(ReLUGate(D, E), Experts(nn.Linear(D, D), experts, "ep_size_1"), "ep_size_1", 1, experts)
    with pytest.raises(ValueError, match=rf"ReLUGate has num_experts = {E}, but the layer {experts} \(num_local"):
        SparsityController(nn.Sequential(layer))


@pytest.mark.parametrize("shift", [0.0, -50.0, 50.0], ids=["random", "empty", "full"])
def test_the_dense_protocol_of_older_releases(shift: float) -> None:
    torch.manual_seed(0)
    gate = ReLUGate(D, E).double().eval()
    with torch.no_grad():
        gate.wg.weight[:, 0] = 1.0
    x = tokens(0, shift)
    l_aux, combine, mask, counts = gate(x, None)
    weights = torch.relu(x @ gate.wg.weight.t())
    torch.testing.assert_close(combine.sum(dim=-1), weights)
    assert torch.equal(mask, combine > 0)
    assert mask.sum(dim=0).amax() <= 1, "two tokens in one slot of an expert"
    assert combine.shape == (S, E, max(int(counts.max()), 1))
    assert l_aux.dim() == 0


def test_routes_of_the_current_protocol() -> None:
    torch.manual_seed(0)
    gate = ReLUGate(D, E).eval()
    x = tokens(0, 0.3).float()
    _, capacity, experts, indices, locations, gates, counts = gate(x, None, True, False)
    weights = torch.relu(x @ gate.wg.weight.t())
    rebuilt = torch.zeros_like(weights)
    for indices_S, gates_S in zip(indices, gates, strict=True):
        for s in range(S):
            if indices_S[s] >= 0:
                rebuilt[s, indices_S[s]] += gates_S[s]
    torch.testing.assert_close(rebuilt, weights)
    assert experts == E
    assert int(capacity) == int(counts.max())
    slots = [(int(e), int(c)) for e, c in zip(indices.flatten(), locations.flatten(), strict=True) if e >= 0]
    assert len(slots) == len(set(slots)) == int(counts.sum())
