"""Plans: index arithmetic against brute force, figures that can be worked out by hand, warnings, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_remoe.cli import main
from ds_remoe.config import load_run
from ds_remoe.config.schema import MoEConfig
from ds_remoe.model.flops import num_params
from ds_remoe.planning.activations import Load
from ds_remoe.planning.advice import advice
from ds_remoe.planning.hardware import ACCELERATORS, GB, MEMORY_USABLE, Cluster, Group, published, with_options
from ds_remoe.planning.memory import EXPERTS
from ds_remoe.planning.plan import Plan, make_plan, stage_densities
from ds_remoe.planning.sizes import ParamGroup
from ds_remoe.planning.traffic import Flow

CONFIGS = Path(__file__).parent.parent / "ds_configs"
MICRO = "train_micro_batch_size_per_gpu=1"
H100 = published(ACCELERATORS["h100"], "bf16", 8)


def plan(name: str, nodes: int, *overrides: str, gpus: int = 8, **options: float) -> Plan:
    run = load_run(CONFIGS / name, overrides, world_size=nodes * gpus)
    cluster = Cluster(nodes, gpus, with_options(published(ACCELERATORS["h100"], "bf16", gpus), **options))
    return make_plan(run, 51200, cluster, stage_densities(run.remoe.moe))


def without_budget(planned: Plan) -> Plan:
    """The plan of the same run where every pre-activation is kept (null in the file; an override cannot say it)."""
    moe = planned.run.remoe.moe.model_copy(update={"activation_budget": None})
    run = replace(planned.run, remoe=planned.run.remoe.model_copy(update={"moe": moe}))
    return make_plan(run, planned.vocab_size, planned.cluster, stage_densities(moe))


def with_memory(planned: Plan, size: float) -> Plan:
    """The plan on accelerators of which a run can use `size` bytes."""
    hardware = replace(planned.cluster.hardware, memory_bytes=size / MEMORY_USABLE)
    return replace(planned, cluster=replace(planned.cluster, hardware=hardware))


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_groups_lie_where_enumeration_puts_them(nodes: int, per_node: int, data: st.DataObject) -> None:
    world = nodes * per_node
    ep_size = data.draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    cluster = Cluster(nodes, per_node, H100)
    expert_groups = [list(range(start, start + ep_size)) for start in range(0, world, ep_size)]
    replica_groups = [list(range(first, world, ep_size)) for first in range(ep_size)]
    for group, members in (
        (Group.of(cluster, ep_size), expert_groups),
        (Group.of(cluster, world // ep_size, ep_size), replica_groups),
    ):
        pairs = [(a, b) for ranks in members for a in ranks for b in ranks if a != b]
        near = [(a, b) for a, b in pairs if a // per_node == b // per_node]
        far = [sum(a // per_node == node != b // per_node for a, b in pairs) for node in range(nodes)]
        in_node = [sum(any(r // per_node == node for r in ranks) for ranks in members) for node in range(nodes)]
        assert group.near == pytest.approx(len(near) / world)
        assert group.node_far == max(far)
        assert group.nodes == max(len({rank // per_node for rank in ranks}) for ranks in members)
        assert group.groups_in_node == max(in_node)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 6))
def test_partitions_touch_the_parameters_that_overlap_them(sizes: list[int], replicas: int) -> None:
    group = ParamGroup(tuple(sizes), replicas, False)
    owners = [parameter for parameter, size in enumerate(sizes) for _ in range(size)]
    parts = [set(owners[r * group.partition : (r + 1) * group.partition]) for r in range(replicas)]
    assert group.touched == max(sum(sizes[parameter] for parameter in part) for part in parts)
    assert group.partition * replicas == group.padded >= group.elements


def test_rings_and_exchanges_by_hand() -> None:
    two_nodes = Cluster(2, 4, H100)
    ring = Flow("gradients", "all-reduce", Group.of(two_nodes, 8), 800.0, 1)
    assert ring.rank_near == 2 * 800 * 7 / 8
    assert ring.node_far == 2 * 800 * 7 / 8
    replicas = Flow("gradients", "all-gather", Group.of(two_nodes, 2, stride=4), 800.0, 1)
    assert replicas.rank_near == 0
    assert replicas.node_far == 4 * 800 / 2  # each of a node's four ranks has a ring of its own
    inside = Flow("tokens", "all-to-all", Group.of(two_nodes, 4), 100.0, 1)
    assert (inside.rank_near, inside.node_far) == (300, 0)
    across = Flow("tokens", "all-to-all", Group.of(two_nodes, 8), 100.0, 1)
    assert (across.rank_near, across.node_far) == (300, 4 * 400)
    once = replace(across, far_share=0.25)
    assert (once.rank_near, once.node_far) == (700, 400)
    slow = with_options(H100, network_gbs=1e-6)
    assert across.seconds(slow) == pytest.approx(1.6, rel=0.01)


def test_hierarchical_exchange_sends_each_token_across_once() -> None:
    batch = ("train_batch_size=null", "gradient_accumulation_steps=1", "remoe.moe.k=4")
    direct, once = (
        plan("remoe_182m.json", 2, *batch, *extra, gpus=4).settled.flows[0]
        for extra in ((), ("remoe.moe.hierarchical_all_to_all=true",))
    )
    # Half of the tokens need each rank; 15 of 16 need at least one of the four of a node.
    assert once.node_far / direct.node_far == pytest.approx((15 / 16) / (4 / 2))


def test_load_at_the_ends_of_the_scale() -> None:
    moe = MoEConfig(num_experts=8, k=1, granularity=2, ep_size=4, activation_budget=None)
    every = Load.of(moe, 100, 1.0)
    assert (every.rows_to_rank, every.pairs, every.kept_pairs) == (100, 1600, 1600)
    none = Load.of(moe, 100, 0.0)
    assert (none.rows_to_rank, none.pairs, none.kept_pairs) == (0, 0, 0)
    capped = Load.of(MoEConfig(num_experts=8, k=1), 4096, 0.5)
    assert capped.pairs == 4 * 4096
    assert 0.75 * 4096 <= capped.kept_pairs <= 1.25 * 4096
    settled = Load.of(MoEConfig(num_experts=8, k=1), 4096, 0.125)
    assert settled.kept_pairs == settled.pairs == 4096


def test_states_of_the_papers_large_model_by_hand() -> None:
    planned = plan("remoe_978m.json", 1)
    memory = planned.settled.memory.states
    experts, total = 24 * 3 * 1536 * 6144, num_params(planned.run.remoe.model, planned.run.remoe.moe, 51200)
    held = total - 7 * experts  # one of the eight experts of each layer
    dense = held - experts
    assert memory.gradients == 2 * held
    assert memory.parameters == pytest.approx(2 * held, rel=1e-6)  # padded to whole partitions
    assert memory.optimizer == pytest.approx(12 * (dense / 8 + experts), rel=1e-6)
    at_zero = plan("remoe_978m.json", 1, "zero_optimization.stage=0").settled.memory.states
    assert at_zero.optimizer == 12 * held


def test_a_faster_machine_is_faster_and_mfu_stays_below_its_bound() -> None:
    slow, fast = plan("remoe_182m.json", 1), plan("remoe_182m.json", 1, link_gbs=10_000, memory_gbs=100_000)
    assert fast.settled.time.total < slow.settled.time.total
    for stage in (*slow.stages, *fast.stages):
        assert stage.time.total == pytest.approx(sum(stage.time.parts().values()))
        assert 0 < stage.time.mfu < 0.6
        assert stage.time.tokens_per_second == pytest.approx(512 * 1024 / stage.time.total)
    assert slow.stages[1].time.total > slow.stages[0].time.total


def test_dense_stage_stays_small_with_a_budget_and_not_without() -> None:
    budget = plan("remoe_182m.json", 1)
    without = without_budget(budget)
    (settled, dense, _), (settled_without, dense_without, _) = (
        [stage.memory.activations.peak for stage in planned.stages] for planned in (budget, without)
    )
    assert settled == settled_without
    assert dense <= 1.25 * settled
    assert dense < dense_without


@pytest.mark.parametrize(
    ("overrides", "stage", "words"),
    [
        ((), 0, f"largest kind is {EXPERTS}, 5.1 GiB: set remoe.model.activation_checkpointing to true, or lower"),
        (("remoe.model.seq_length=16384", MICRO), 0, "the micro-batch is 1 already"),
        (("zero_optimization.stage=0", "remoe.moe.ep_size=1", MICRO), 0, "set zero_optimization.stage to 1"),
        (("remoe.moe.ep_size=1", MICRO), 0, "raise remoe.moe.ep_size from 1 to 2"),
        (("remoe.model.num_layers=96", "remoe.moe.ep_size=8"), 0, "set remoe.model.activation_checkpointing to true"),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(overrides: tuple[str, ...], stage: int, words: str) -> None:
    planned = plan("remoe_182m.json", 1, "train_batch_size=null", *overrides)
    peak = planned.stages[stage].memory.peak
    assert not any("does not fit" in line for line in advice(with_memory(planned, 2 * peak)))
    first = advice(with_memory(planned, 0.99 * peak))[0]
    assert "does not fit in stage III" in first
    assert words in first


def test_a_dense_stage_that_alone_does_not_fit_calls_for_the_budget() -> None:
    planned = without_budget(plan("remoe_182m.json", 1, "remoe.model.num_layers=96"))
    settled, dense = (stage.memory.peak for stage in planned.stages[:2])
    tight = with_memory(planned, (settled + dense) / 2)
    assert not tight.fits
    assert "does not fit in stage I:" in advice(tight)[0]
    assert "set remoe.moe.activation_budget" in advice(tight)[0]


@pytest.mark.parametrize(
    ("nodes", "gpus", "overrides", "options", "words"),
    [
        (4, 4, (), {}, ["expert groups cross nodes", "remoe.moe.ep_size = 4 would stay inside"]),
        (1, 8, ("zero_optimization.stage=2",), {}, ["reduces gradients in each of the 4 micro-batches"]),
        (2, 8, (), {"network_gbs": 0.1}, ["reducing gradients takes", "zero_optimization.overlap_comm = true"]),
        (1, 8, (), {}, ["each expert is on one rank alone", "reduce_bucket_size = 500,000,000 reserves more"]),
        (1, 8, (), {"link_gbs": 1.0}, ["bringing tokens to experts takes"]),
        (1, 8, (MICRO, "remoe.model.seq_length=512", "remoe.moe.ep_size=1"), {}, ["an expert gets 64 tokens"]),
        (2, 8, ("zero_optimization.reduce_bucket_size=5e7",), {}, []),
    ],
)
def test_warnings_name_what_to_change(
    nodes: int, gpus: int, overrides: tuple[str, ...], options: dict[str, float], words: list[str]
) -> None:
    batch = ("train_batch_size=null", "gradient_accumulation_steps=4")
    warnings = advice(plan("remoe_182m.json", nodes, *batch, *overrides, gpus=gpus, **options))
    for word in words:
        assert any(word in line for line in warnings), (word, warnings)
    assert bool(words) == bool(warnings)


def test_activation_checkpointing_is_advised_against_where_memory_is_plenty() -> None:
    sizes = ("train_batch_size=null", "zero_optimization.reduce_bucket_size=5e7")
    kept = max(stage.memory.peak for stage in plan("remoe_182m.json", 2, *sizes).stages)
    recomputed = plan("remoe_182m.json", 2, *sizes, "remoe.model.activation_checkpointing=true")
    assert "activation checkpointing takes" in advice(with_memory(recomputed, 2 * kept))[0]
    assert advice(with_memory(recomputed, kept)) == []


def test_overlapped_reduction_hides_behind_backward() -> None:
    batch = ("train_batch_size=null", "remoe.moe.ep_size=4")
    shown = plan("remoe_182m.json", 8, *batch)
    hidden = plan("remoe_182m.json", 8, *batch, "zero_optimization.overlap_comm=true")
    assert 0 <= hidden.settled.time.gradients < shown.settled.time.gradients
    assert hidden.settled.memory.states.buckets == 2 * shown.settled.memory.states.buckets


def test_command_writes_plan_and_picture_for_several_clusters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    output, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    command = [
        "plan",
        str(CONFIGS / "remoe_182m.json"),
        "--nodes",
        "1",
        "3",
        "2",
        "--gpu",
        "h200",
        "--bandwidth",
        "100",
    ]
    command += ["--set", "gradient_accumulation_steps=null", "--output", str(output), "--picture", str(picture)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "777M parameters" in shown
    assert "! 3 nodes: train_batch_size = 512" in shown
    figures = json.loads(output.read_text())["figures"]
    assert [one["nodes"] for one in figures["plans"]] == [1, 2]
    assert figures["plans"][1]["hardware"]["network_bytes"] == 100 * GB
    assert [one["engine"]["accumulation"] for one in figures["plans"]] == [2, 1]
    assert set(figures["refused"]) == {"3"}
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err


def test_command_says_where_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["plan", str(CONFIGS / "remoe_182m.json"), "--output", str(tmp_path / "file" / "plan.json")]) == 2
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--gpu", "h300"], "--gpu h300: unknown; known are a100-40gb"),
        (["--check", "1"], "--check: trains on one rank"),
        (["--gemm-efficiency", "1.2"], "--gemm-efficiency 1.2: must be a share"),
        (
            ["--check", "1", "--gpus-per-node", "1", "--gemm-efficiency", "0.5"],
            "--gemm-efficiency 0.5: --check measures",
        ),
        pytest.param(
            ["--calibrate", "--gpu", "h200"],
            "--gpu h200: --calibrate plans with this machine's processor",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its links and network are taken"),
        ),
        (["--density", "0.01"], "--density 0.01: less than the settled k/E = 0.125"),
        (["--picture", "plan.txt"], "--picture plan.txt: must be the name of a .png file"),
        (["--nodes", "3"], "train_batch_size = 512"),
        (["--set", "remoe.moe.ep_size=3"], "remoe.moe.ep_size = 3"),
    ],
)
def test_command_refuses_by_name(extra: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "remoe_182m.json"), *extra]) == 2
    assert words in capsys.readouterr().err
