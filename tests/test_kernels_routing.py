"""ReLU routing's kernels: the twin against autograd and a plain list, each Triton kernel against the twin."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_remoe.kernels import relu_routing
from ds_remoe.kernels.pair_groups import RowOrder
from ds_remoe.moe.routers import ReLURouter, TopKRouter
from ds_remoe.moe.routing import RoutedPairs, Routing

E, T = 5, 37


def make_logits(experts: int, tokens: int, density: float, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[E, T] with about this share positive, and zeros of both signs among the rest."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(experts, tokens, dtype=dtype, generator=generator) - (1 - density)
    logits[torch.rand(experts, tokens, generator=generator) < 0.1] = -0.0
    return logits


def experts_of(pairs: RoutedPairs) -> Tensor:
    return torch.repeat_interleave(torch.tensor(pairs.counts_E, device=pairs.token_ids_N.device))


cases = {
    "experts": st.integers(1, 9),
    "tokens": st.one_of(st.integers(0, 3), st.integers(4, 70)),
    "density": st.sampled_from([0.0, 0.125, 0.5, 1.0]),
    "seed": st.integers(0, 1000),
    "padded": st.booleans(),
}


@settings(deadline=None)
@given(**cases)
def test_pairs_are_the_positive_entries_expert_by_expert(
    experts: int, tokens: int, density: float, seed: int, padded: bool
) -> None:
    logits = make_logits(experts, tokens, density, seed)
    used = torch.arange(tokens) % 3 != 0 if padded else torch.ones(tokens, dtype=torch.bool)
    expected = [
        (t, e, float(logits[e, t])) for e in range(experts) for t in range(tokens) if used[t] and logits[e, t] > 0
    ]
    routing, weight_sums = Routing.from_relu_(logits.clone(), used.int() if padded else None)
    pairs = routing.pairs()
    got = zip(pairs.token_ids_N.tolist(), experts_of(pairs).tolist(), pairs.weights_N.tolist(), strict=True)
    assert list(got) == expected
    assert routing.counts_E.tolist() == [sum(e == expert for _, e, _ in expected) for expert in range(experts)]
    for expert, total in enumerate(weight_sums.tolist()):
        assert math.isclose(total, sum(weight for _, e, weight in expected if e == expert), abs_tol=1e-12)


@settings(deadline=None)
@given(**cases, through=st.sampled_from(["pairs", "sums", "both", "weights", "all", "nothing"]))
def test_gradient_of_the_logits_is_autograds(
    experts: int, tokens: int, density: float, seed: int, padded: bool, through: str
) -> None:
    """Pairs' weights, weight sums (the L1 term) and dense weights, alone and together, in fp64."""
    logits = make_logits(experts, tokens, density, seed).requires_grad_()
    used = torch.arange(tokens) % 3 != 0 if padded else torch.ones(tokens, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    by_pair, by_expert, by_entry = (
        torch.randn(*size, dtype=torch.float64, generator=generator)
        for size in ((experts, tokens), (experts,), (tokens, experts))
    )

    def loss(weights_N: Tensor, upstream_N: Tensor, sums_E: Tensor, weights_TE: Tensor, mask_TE: Tensor) -> Tensor:
        total = 0.0 * logits.sum()
        if through in ("pairs", "both", "all"):
            total = total + (upstream_N * weights_N).sum()
        if through in ("sums", "both", "all"):
            total = total + (by_expert * sums_E).sum()
        if through in ("weights", "all"):
            total = total + (by_entry * weights_TE * mask_TE).sum()
        return total

    weights = torch.relu(logits) * used
    mask = weights > 0
    plain = loss(weights[mask], by_pair[mask], weights.sum(dim=1), weights.t(), mask.t())
    (expected,) = torch.autograd.grad(plain, logits)

    routing, sums = Routing.from_relu_(logits.clone(), used if padded else None)
    pairs = routing.pairs()
    ours = loss(
        pairs.weights_N, by_pair[experts_of(pairs), pairs.token_ids_N], sums, routing.weights_TE, routing.mask_TE
    )
    (got,) = torch.autograd.grad(ours, logits)
    assert float(ours.detach()) == pytest.approx(float(plain.detach()), abs=1e-11)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_a_gradient_outside_the_mask_goes_nowhere() -> None:
    logits = make_logits(E, T, 0.3, 0).requires_grad_()
    routing, _ = Routing.from_relu_(logits.clone())
    routing.weights_TE.sum().backward()
    assert torch.equal(logits.grad, routing.mask_TE.t().double())


def test_pairs_can_be_listed_twice() -> None:
    logits = make_logits(E, T, 0.3, 0).requires_grad_()
    routing, _ = Routing.from_relu_(logits.clone())
    (routing.pairs().weights_N.sum() + 2 * routing.pairs().weights_N.sum()).backward()
    assert torch.equal(logits.grad, 3 * routing.mask_TE.t().double())


def test_backward_keeps_no_dense_weights() -> None:
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    logits = make_logits(E, T, 0.3, 0).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        routing, sums = Routing.from_relu_(logits * 1.0)
        (routing.pairs().weights_N.sum() + sums.sum()).backward()
    assert sorted(tensor.nbytes for tensor in kept.values()) == sorted([E * T, 8 * int(routing.counts_E.sum())])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_logit_that_is_not_finite_is_a_pair_that_shows_it(bad: float) -> None:
    logits = make_logits(E, T, 0.3, 0)
    logits[2, 5] = bad
    routing, sums = Routing.from_relu_(logits.clone())
    assert sums.isnan().tolist() == [e == 2 for e in range(E)]
    assert routing.mask_TE[5, 2]
    assert routing.pairs().weights_N.isnan().sum() == 1
    unused = torch.arange(T) != 5
    assert not Routing.from_relu_(logits, unused)[1].isnan().any()


def test_logits_by_token_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits_ET has the strides \(1, 5\)"):
        relu_routing.activate_(torch.zeros(T, E).t())


def test_topk_pairs_and_their_gradient() -> None:
    torch.manual_seed(0)
    router = TopKRouter(6, E, 2).double()
    x = torch.randn(T, 6, dtype=torch.float64)
    routing, _ = router(x)
    pairs = routing.pairs()
    token_ids, expert_ids, weights_N = pairs.token_ids_N, experts_of(pairs), pairs.weights_N
    assert expert_ids.tolist() == sorted(expert_ids.tolist())
    upstream = torch.randn(2 * T, dtype=torch.float64)
    (got,) = torch.autograd.grad((upstream * weights_N).sum(), router.wg.weight)
    probs = torch.softmax(x @ router.wg.weight.t(), dim=-1)
    best = probs.topk(2, dim=-1).indices
    assert sorted(zip(token_ids.tolist(), expert_ids.tolist(), strict=True)) == sorted(
        (t, e) for t, row in enumerate(best.tolist()) for e in row
    )
    (expected,) = torch.autograd.grad((upstream * probs[token_ids, expert_ids]).sum(), router.wg.weight)
    torch.testing.assert_close(got, expected)


TRITON_CASES = [
    (1, 1, 1.0, False),
    (3, 2, 0.5, False),
    (8, 40, 0.0, False),
    (8, 40, 1.0, True),
    (2, 1024, 0.125, False),
    (3, 1500, 0.5, True),
    (33, 20, 0.3, False),
]
"""Experts, tokens, density, whether some tokens are not used."""


def compare_with_twin(device: str) -> None:
    """The public functions, which take the Triton kernels here, against the twins: all but the sums bit for bit."""
    from ds_remoe.kernels import relu_routing_triton
    from ds_remoe.kernels.backend import use_triton

    def exactly(got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

    def compare(experts: int, tokens: int, density: float, padded: bool) -> None:
        logits = make_logits(experts, tokens, density, experts + tokens, torch.float32).to(device)
        assert use_triton(logits), "the kernel would not run"
        used = torch.arange(tokens, device=device) % 3 != 0 if padded else None
        weights, expected_weights = logits.clone(), logits.clone()
        found = relu_routing.activate_(weights, used)
        expected = relu_routing.torch_activate_(expected_weights, used)
        assert found.block_starts is not None
        exactly(weights, expected_weights)
        exactly(found.mask_ET, expected.mask_ET)
        exactly(found.counts_E, expected.counts_E)
        torch.testing.assert_close(found.weight_sums_E, expected.weight_sums_E, rtol=1e-5, atol=1e-5)

        count = int(expected.counts_E.sum())
        places = relu_routing.token_places(found.mask_ET, found.block_starts)
        pairs = relu_routing.compact(weights, found.mask_ET, found.counts_E, found.block_starts, places, count)
        twin = relu_routing.torch_compact(weights, expected.mask_ET, expected.counts_E, count)
        for name in ("token_ids_N", "weights_N"):
            exactly(getattr(pairs, name), getattr(twin, name))
        order = RowOrder.of(twin.token_ids_N, tokens)
        exactly(pairs.by_token_N, order.pairs_M.int())
        exactly(places.starts, order.starts)

        upstream = torch.arange(1.0, count + 1, device=device)
        dense = relu_routing.compact_backward(upstream, found.mask_ET, pairs.positions)
        exactly(dense, relu_routing.torch_compact_backward(upstream, expected.mask_ET, twin.positions))
        by_expert = torch.rand(1, device=device).expand(experts)
        for grads in ((dense, by_expert), (dense, None), (None, by_expert)):
            exactly(
                relu_routing.activate_backward(*grads, found.mask_ET),
                relu_routing.torch_activate_backward(*grads, expected.mask_ET),
            )

    for case in TRITON_CASES:
        compare(*case)
    relu_routing_triton.CHUNK = 4  # so that the counts before an expert come in several parts
    relu_routing_triton.WANTED_BLOCK = 32
    compare(5, 150, 0.4, True)

    logits = torch.tensor([[math.nan, 1.0], [2.0, -1.0], [-1.0, -math.inf], [math.inf, -1.0]], device=device)
    for activate_ in (relu_routing.activate_, relu_routing.torch_activate_):
        found = activate_(logits.clone())
        assert found.weight_sums_E.isnan().tolist() == [True, False, True, False]
        assert found.weight_sums_E[3] == math.inf
        assert found.mask_ET.tolist() == [[True, True], [True, False], [False, True], [True, False]]

    torch.manual_seed(0)
    router = ReLURouter(6, 4, 1).to(device).eval()
    x = torch.randn(50, 6, device=device)
    routing, loss = router(x)
    pairs = routing.pairs()
    token_ids, expert_ids, weights_N = pairs.token_ids_N, experts_of(pairs), pairs.weights_N
    (got,) = torch.autograd.grad(weights_N.square().sum() + 1e8 * loss, router.wg.weight)
    weights = torch.relu(x @ router.wg.weight.t())
    exactly(torch.stack([expert_ids, token_ids]), weights.t().nonzero().t())
    l1 = ((weights > 0).sum(0) * 4 / 50 * weights.sum(0)).sum() / 50
    (expected_grad,) = torch.autograd.grad(weights.square().sum() + l1, router.wg.weight)
    torch.testing.assert_close(got, expected_grad, rtol=1e-4, atol=1e-4)


def test_triton_kernels_under_the_interpreter() -> None:
    """In a process of its own, as Triton reads TRITON_INTERPRET when its kernels are defined."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    program = "from test_kernels_routing import compare_with_twin; compare_with_twin('cpu')"
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the interpreter covers the logic")
def test_triton_kernels_on_the_gpu() -> None:
    compare_with_twin("cuda")
