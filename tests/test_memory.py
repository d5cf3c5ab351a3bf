"""The activation budget: exact gradients however the pairs are cut, and no more kept than it says."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_remoe.config import load_run
from ds_remoe.config.problems import ConfigError
from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.kernels import grouped_swiglu
from ds_remoe.kernels.backend import kernels_wanted
from ds_remoe.kernels.pair_groups import PairGroups
from ds_remoe.model.decoder import Decoder
from ds_remoe.moe import MoE, SwiGLU
from ds_remoe.moe.budget import MIN_CHUNK_PAIRS, ActivationBudget, expected_rows, plan_chunks, settled_rows
from ds_remoe.moe.budgeted_swiglu import budgeted_swiglu
from ds_remoe.moe.dispatch import Dispatched
from ds_remoe.moe.experts import ModuleExperts

QUICKSTART = "ds_configs/quickstart.json"
D, H, ROWS = 6, 5, 23
COUNTS = {
    "odd": [7, 3, 11, 1],
    "one above the budget": [1, 20, 0, 2],
    "empty experts": [0, 9, 0, 0],
    "only the last": [0, 0, 0, 23],
    "no pair": [0, 0, 0, 0],
}
BUDGETS = {"tiny": (1, 1), "chunk only": (4, 4), "medium": (12, 5), "one short": (21, 20), "none": None}


def new_budget(sizes: tuple[int, int] | None) -> ActivationBudget | None:
    """Of one layer: how many pairs, and how many in a chunk."""
    return None if sizes is None else ActivationBudget(sizes[0], *sizes)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.integers(1, 30).flatmap(lambda chunk: st.tuples(st.integers(chunk, 90), st.just(chunk))),
)
@settings(deadline=None)
def test_chunks_cover_every_pair_once_and_keep_to_the_budget(counts: list[int], sizes: tuple[int, int]) -> None:
    pairs, chunk_pairs = sizes
    chunks = plan_chunks(counts, new_budget(sizes))
    assert [chunk.pairs.start for chunk in chunks] == [0, *(chunk.pairs.stop for chunk in chunks[:-1])]
    assert chunks[-1].pairs.stop == sum(counts)
    seen = [0] * len(counts)
    begun: set[int] = set()
    for chunk in chunks:
        experts = range(chunk.experts.start, chunk.experts.stop)
        assert sum(chunk.counts) == chunk.pairs.stop - chunk.pairs.start
        assert chunk.continues == bool(begun & set(experts))
        assert not chunk.continues or len(experts) == 1
        begun |= set(experts)
        for expert, count in zip(experts, chunk.counts, strict=True):
            seen[expert] += count
    assert seen == counts
    assert begun == set(range(len(counts))), "an expert's gradients would stay unwritten"
    if sum(counts) <= pairs:
        assert len(chunks) == 1
        assert chunks[0].keep
    else:
        assert max(sum(chunk.counts) for chunk in chunks) <= chunk_pairs
        assert sum(sum(chunk.counts) for chunk in chunks if chunk.keep) + chunk_pairs <= pairs


@given(
    st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=5),
    st.integers(1, 30).flatmap(lambda chunk: st.tuples(st.integers(chunk, 60), st.just(chunk))),
)
@settings(deadline=None)
def test_layers_share_a_budget_and_recompute_no_more_than_apart(
    layers: list[list[int]], sizes: tuple[int, int]
) -> None:
    call, chunk_pairs = sizes
    shared = ActivationBudget(len(layers) * call, call, chunk_pairs, len(layers))
    kept = 0
    for counts in layers:
        chunks = shared.plan(counts)
        for chunk in chunks:
            size = sum(chunk.counts)
            kept += size if chunk.keep else 0
            assert size <= call
            assert kept + (0 if chunk.keep else size) <= len(layers) * call, "more exists at a time than the budget"
    assert shared.pairs == len(layers) * call - kept
    total = sum(map(sum, layers))
    if total <= len(layers) * call - chunk_pairs:
        assert kept == total


def test_sizes_of_a_budget() -> None:
    assert ActivationBudget.of(1.25, 4096) == ActivationBudget(5120, 5120, 1024)
    assert ActivationBudget.of(0.25, 4096) == ActivationBudget(1024, 1024, 1024)
    assert ActivationBudget.of(1.25, 1) == ActivationBudget(MIN_CHUNK_PAIRS, MIN_CHUNK_PAIRS, MIN_CHUNK_PAIRS)
    assert ActivationBudget.of(1.25, 4096, layers=3) == ActivationBudget(15360, 5120, 1024, 3)


@given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
def test_a_settled_router_and_a_full_budget_keep_their_rows(ep: int, local: int, k: int, layers: int) -> None:
    """At the default budget with exactly k experts a token on the ranks that most need; at E/k also the dense stage."""
    experts, k = ep * local, min(k, ep * local)
    settled = settled_rows(k, experts, ep)
    assert expected_rows(k / experts, experts, ep) <= settled * (1 + 1e-9)
    assert settled <= min(k, ep) * (1 + 1e-9)
    budget = ActivationBudget.of(1.25, k * 64, layers, settled)
    assert all(budget.keep_rows(settled) for _ in range(layers))
    full = ActivationBudget.of(experts / k, k * 64, layers, settled)
    assert all(full.keep_rows(ep) for _ in range(layers))


def make_case(counts: list[int]) -> tuple[dict[str, Tensor], PairGroups]:
    """Leaves in fp64 and the pairs; a row may meet one expert once."""
    generator = torch.Generator().manual_seed(sum(counts))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    ids = [torch.randperm(ROWS, generator=generator)[:count] for count in counts]
    leaves = {
        "rows": draw(ROWS, D),
        "weights": draw(sum(counts)),
        "gate_up": draw(len(counts), 2 * H, D),
        "down": draw(len(counts), D, H),
    }
    return leaves, PairGroups(torch.cat(ids), leaves["weights"], counts)


def gradients_of(output: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    found = torch.autograd.grad(output, list(leaves.values()), upstream)
    return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}


def run(counts: list[int], sizes: tuple[int, int] | None) -> dict[str, Tensor]:
    leaves, groups = make_case(counts)
    budget = new_budget(sizes)
    output = budgeted_swiglu(leaves["rows"], groups, leaves["gate_up"], leaves["down"], budget)
    return gradients_of(output, leaves)


def dense_sum(counts: list[int]) -> dict[str, Tensor]:
    leaves, groups = make_case(counts)
    output = torch.zeros(ROWS, D, dtype=torch.float64) + 0 * sum(leaf.sum() for leaf in leaves.values())
    for expert, span in groups.spans():
        gate, up = (leaves["rows"][groups.row_ids_M[span]] @ leaves["gate_up"][expert].t()).chunk(2, dim=-1)
        result = (nn.functional.silu(gate) * up) @ leaves["down"][expert].t() * leaves["weights"][span].unsqueeze(-1)
        output = output.index_add(0, groups.row_ids_M[span], result)
    return gradients_of(output, leaves)


@pytest.mark.parametrize("name", COUNTS)
def test_any_budget_gives_the_dense_sum_and_its_gradients(name: str) -> None:
    expected = dense_sum(COUNTS[name])
    for sizes in BUDGETS.values():
        again = run(COUNTS[name], sizes)
        for what, got in run(COUNTS[name], sizes).items():
            assert (got - expected[what]).abs().sum() < 1e-10, (sizes, what)
            assert torch.equal(got, again[what]), f"{what} differs from one run to the next with {sizes}"


@pytest.fixture
def torch_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DS_REMOE_KERNELS", "torch")
    kernels_wanted.cache_clear()
    yield
    kernels_wanted.cache_clear()


@pytest.mark.usefixtures("torch_path")
def test_whole_experts_give_the_same_bits_as_no_budget() -> None:
    counts, sizes = COUNTS["odd"], (12, 11)
    chunks = plan_chunks(counts, new_budget(sizes))
    assert len(chunks) > 1
    assert not any(chunk.continues for chunk in chunks)
    for (what, got), expected in zip(run(counts, sizes).items(), run(counts, None).values(), strict=True):
        assert torch.equal(got, expected), what


def test_only_the_budget_is_kept() -> None:
    counts, medium = COUNTS["odd"], BUDGETS["medium"]
    assert medium is not None

    def saved_pre_activation(sizes_of_budget: tuple[int, int] | None) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() == 2 and tensor.shape[1] == 2 * H:
                sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        leaves, groups = make_case(counts)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            budgeted_swiglu(leaves["rows"], groups, leaves["gate_up"], leaves["down"], new_budget(sizes_of_budget))
        return sum(sizes)

    pair_bytes = 2 * H * 8
    assert saved_pre_activation(None) == sum(counts) * pair_bytes
    kept = sum(sum(chunk.counts) for chunk in plan_chunks(counts, new_budget(medium)) if chunk.keep)
    assert 0 < kept <= medium[0] - medium[1]
    assert saved_pre_activation(medium) == kept * pair_bytes


class Bowl(nn.Module):
    """An expert that looks at all its tokens together, and counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D, dtype=torch.float64)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return torch.tanh(self.inner(x)) - (x.mean(dim=0) if len(x) else 0.0)


def test_other_modules_run_again_beyond_the_budget() -> None:
    counts = [7, 3, 11, 0]
    torch.manual_seed(0)
    results = []
    for budget in (None, new_budget((11, 1))):
        experts = ModuleExperts(Bowl(), 4)
        leaves, groups = make_case(counts)
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.fill_(0.3)
        dispatched = Dispatched(leaves["rows"], groups.row_ids_M, leaves["weights"], counts, None, None)
        parameters = dict(experts.named_parameters())
        leaves = {"rows": leaves["rows"], "weights": leaves["weights"], **parameters}
        results.append(gradients_of(experts(dispatched, budget), leaves))
        assert [expert.passes for expert in experts] == ([1, 1, 2, 1] if budget else [1, 1, 1, 1])
    for what, expected in results[0].items():
        assert torch.equal(results[1][what], expected), what


def test_the_layer_takes_its_budget_from_its_tokens() -> None:
    """Tokens of one layer that all pass all experts: saved bytes with the default budget, and without."""
    tokens, experts, k = 600, 8, 2

    def saved_bytes(budget: float | None) -> int:
        torch.manual_seed(0)
        layer = MoE(D, SwiGLU(D, H), num_experts=experts, k=k, activation_budget=budget).eval()
        with torch.no_grad():
            layer.deepspeed_moe.gate.wg.weight.fill_(1.0)
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() == 2 and tensor.shape[1] == 2 * H:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.rand(tokens, D) + 0.1)
        return sum(storages.values())

    pair_bytes = 2 * H * 4
    assert saved_bytes(None) == experts * tokens * pair_bytes
    kept = saved_bytes(1.25)
    assert 0.8 * k * tokens * pair_bytes < kept <= 1.25 * k * tokens * pair_bytes
    assert saved_bytes(float(experts)) == experts * tokens * pair_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_recomputes_only_what_its_layers_together_have_no_room_for(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """The first layer has four times its share of pairs, the others none: there is room, and the gradients agree."""
    sizes = ModelConfig(
        hidden_size=8,
        num_layers=4,
        num_heads=2,
        ffn_hidden_size=12,
        seq_length=512,
        activation_checkpointing=checkpointing,
    )
    tokens = torch.randint(32, (1, 512), generator=torch.Generator().manual_seed(0))
    again: list[int] = []
    up_projection = grouped_swiglu.up_projection

    def counted(rows: Tensor, groups: PairGroups, gate_up: Tensor) -> Tensor:
        again.append(sum(groups.counts_L))
        return up_projection(rows, groups, gate_up)

    monkeypatch.setattr(grouped_swiglu, "up_projection", counted)

    def gradients(budget: float | None, quiet_layers: int) -> list[Tensor]:
        decoder = Decoder(sizes, MoEConfig(num_experts=8, activation_budget=budget), 32, seed=0).double()
        with torch.no_grad():
            for layer in decoder.layers[4 - quiet_layers :]:
                layer.mlp.deepspeed_moe.gate.wg.weight.zero_()
        decoder(tokens, tokens.clone()).loss.backward()
        return [parameter.grad for parameter in decoder.parameters()]

    for quiet_layers in (3, 0):
        again.clear()
        for got, expected in zip(gradients(1.25, quiet_layers), gradients(None, quiet_layers), strict=True):
            assert (got - expected).abs().max() < 1e-12
        assert bool(again) == (checkpointing or quiet_layers == 0)


@pytest.mark.parametrize("value", [0.2, -1.0, math.nan, math.inf])
def test_a_layer_refuses_a_budget_that_is_none(value: float) -> None:
    with pytest.raises(ValueError, match=r"activation_budget = .*must be at least 0\.25.*None keeps"):
        MoE(D, SwiGLU(D, H), num_experts=4, activation_budget=value)


def test_the_field_in_a_run_file() -> None:
    assert load_run(QUICKSTART, world_size=2).remoe.moe.activation_budget == 1.25
    for text, wanted in (("2", 2.0), ("0.25", 0.25)):
        run_config = load_run(QUICKSTART, [f"remoe.moe.activation_budget={text}"], world_size=2)
        assert run_config.remoe.moe.activation_budget == wanted
    off = load_run(QUICKSTART, ['remoe.moe={"ep_size": 2, "activation_budget": null}'], world_size=2)
    assert off.remoe.moe.activation_budget is None
    for value in ("0.1", '"much"', "true"):
        with pytest.raises(ConfigError, match=r"remoe\.moe\.activation_budget = "):
            load_run(QUICKSTART, [f"remoe.moe.activation_budget={value}"], world_size=2)
