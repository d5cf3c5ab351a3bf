"""`ds-remoe bench layer` at a tiny size: all rivals take part and compute the same; one that does not is caught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ds_remoe.bench import layer
from ds_remoe.bench.layer import Settings, measure
from ds_remoe.bench.rivals import Case, Rival
from ds_remoe.bench.rivals_torch import Loop
from ds_remoe.bench.timing import ratio
from ds_remoe.bench.trace import TracedRouting, TraceMetadata, write_trace
from ds_remoe.bench.workloads import Sizes, WorkloadError, build_workload, replay
from ds_remoe.cli import main

SIZES = Sizes(tokens=64, hidden_size=32, ffn_hidden_size=32)
GPU_ONLY = {"scattermoe", "megablocks"}


def tiny_trace(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    records = []
    for step, density in ((1, 1.0), (2, 0.3), (3, 0.0), (4, 0.1)):
        mask_TE = torch.rand(24, 4, generator=generator) < density
        records.append(TracedRouting(step, 0, 0, 4, 24, mask_TE, torch.rand(24, 4, generator=generator) * mask_TE))
    write_trace(path, TraceMetadata("tiny.json", (), (1, 2, 3, 4), 1, 1, 16, 24, 1), records)


def test_the_command_times_all_rivals_on_equal_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(layer, "COPY_BYTES", 2**16)
    output, trace = tmp_path / "results.json", tmp_path / "trace.npz"
    tiny_trace(trace)
    workloads = ["e8", "g4", "stage1"]
    command = ["bench", "layer", "--device", "cpu", "--tokens", "64", "--hidden-size", "32", "--ffn-hidden-size", "32"]
    command += [
        "--repeats",
        "2",
        "--workloads",
        *workloads,
        "--trace",
        str(trace),
        "--trace-records",
        "1",
        "--output",
        str(output),
    ]
    assert main(command) == 0

    content = json.loads(output.read_text())
    assert content["command"].startswith("ds-remoe bench layer")
    measured = {one["name"]: one for one in content["figures"]["workloads"]}
    assert list(measured) == [*workloads, "trace: step 1, layer 0, rank 0"]
    for name, one in measured.items():
        timed = set(one["forward_backward"]["rivals"])
        assert not one["failed"]
        assert timed & set(layer.RIVALS) | set(one["left_out"]) == set(layer.RIVALS)
        left_out = set(one["left_out"]) - GPU_ONLY - {"dense, all experts", "ours, no budget"}
        assert left_out == (set() if name in ("e8", "g4") else {"DeepSpeed, TopKGate"})
        assert timed >= {layer.FLOOR, layer.FLOOR_GEMM, layer.GEMM, layer.COPY}
        assert max(one["largest_difference_from_ours"].values()) < 1e-5
        ours = one["forward_backward"]["rivals"]["ours"]
        assert ours["flops"] == 18 * one["pairs"] * one["hidden_size"] * one["expert_width"]
        assert ours["repeats"] == 2
    assert measured["stage1"]["forward_backward"]["rivals"]["ours, no budget"]["over_ours"] > 0
    assert [bar["measured_on"] for bar in content["figures"]["bars"]] == ["e8", "stage1"]
    assert not any(bar["as_specified"] for bar in content["figures"]["bars"])

    assert main(command) == 2, "a results file was overwritten"


class DropsAToken(Loop):
    def forward(self) -> Tensor:
        return super().forward() * (torch.arange(self.case.x_TD.shape[0]) > 0).unsqueeze(1)


class ForgetsTheRoutingGradient(Loop):
    def routing_gradient(self) -> Tensor:
        return super().routing_gradient() * float("nan")


def raises(case: Case) -> Rival:
    raise RuntimeError("no kernel image")


def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "COPY_BYTES", 2**16)
    factories = {
        **layer.RIVALS,
        "drops": DropsAToken,
        "forgets": ForgetsTheRoutingGradient,
        "raises": raises,
        "loop again": Loop,
    }
    settings = Settings(torch.device("cpu"), torch.float32, repeats=3, warmup=0, seed=1)
    measured = measure(build_workload("stage3", SIZES, seed=1), settings, factories)
    assert measured.failed.keys() == {"drops", "forgets", "raises"}
    assert "the output" in measured.failed["drops"]
    assert "the gradient of the routing by nan" in measured.failed["forgets"]
    assert measured.failed["raises"] == "RuntimeError: no kernel image"
    assert measured.differences["loop again"] < 1e-5
    assert not measured.failed.keys() & measured.forward_backward.timings.keys()

    timings, flops = measured.forward_backward.timings, measured.forward_backward.flops
    dense, floor = timings["dense, equal FLOPs"], timings[layer.FLOOR]
    assert ratio(floor, dense) > flops["ours"] / flops["dense, equal FLOPs"], "the floor lacks its bytes"


@pytest.mark.parametrize(("name", "experts", "k"), [("e16", 16, 1), ("g4", 32, 4), ("e1", 1, 1)])
def test_balanced_workloads(name: str, experts: int, k: int) -> None:
    workload = build_workload(name, SIZES, seed=0)
    assert workload.counts == [64 * k // experts] * experts
    assert workload.fixed_k == k
    assert workload.num_experts * workload.expert_width == (8 if k > 1 else experts) * 32
    assert torch.equal(workload.scores_TE > 0, workload.mask_TE)
    assert torch.equal(workload.mask_TE, build_workload(name, SIZES, seed=0).mask_TE)


def test_replay_takes_recorded_routings_evenly(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    tiny_trace(path)
    first, last = replay(path, 2)
    assert [first.name, last.name] == [f"trace: step {step}, layer 0, rank 0" for step in (1, 4)]
    assert (first.tokens, first.num_experts, first.hidden_size, first.expert_width, first.k) == (24, 4, 16, 24, 1)
    assert first.fixed_k == 4
    (wide,) = replay(path, 1, hidden_size=8)
    assert (wide.hidden_size, wide.expert_width) == (8, 24), "what is not given is as recorded"
    assert last.pairs < first.pairs == 24 * 4
    assert [w.name[12:13] for w in replay(path, 9)] == ["1", "2", "4"], "step 3 has no active pair"
    assert torch.equal(last.scores_TE > 0, last.mask_TE)


def test_unbalanced_workloads_and_wrong_names() -> None:
    skew = build_workload("skew", SIZES, seed=0)
    assert (skew.counts[0], sum(skew.counts), skew.fixed_k) == (32, 64, 1)
    many = Sizes(20_000, 16, 32)
    for name, density in (("stage1", 0.5), ("stage3", 0.125)):
        workload = build_workload(name, many, seed=0)
        assert workload.mean_active == pytest.approx(8 * density, rel=0.02)
        assert workload.fixed_k is None
    assert main(["bench", "layer", "--workloads", "e0"]) == 2
    with pytest.raises(WorkloadError, match="3 does not divide the FFN width 32"):
        build_workload("g3", SIZES, seed=0)
