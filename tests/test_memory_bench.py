"""`ds-remoe bench memory`: peaks of known allocations, and the curve of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ds_remoe.bench.memory_peak import MIB, Outputs, measure_peak
from ds_remoe.cli import main

QUICKSTART = "ds_configs/quickstart.json"


def test_a_peak_counts_activations_and_leaves_out_gradients_of_parameters() -> None:
    parameter = torch.nn.Parameter(torch.ones(2 * MIB))
    x = torch.ones(MIB // 4, requires_grad=True)

    def forward() -> Outputs:
        kept = x.exp()
        scratch = torch.ones(MIB)
        del scratch
        return [kept.sum() + parameter.sum()], [None]

    peak = measure_peak(forward, [parameter], [x], torch.device("cpu"))
    assert 1 * MIB <= peak.kept < 1.1 * MIB
    assert 5 * MIB <= peak.activations < 5.1 * MIB
    assert peak.whole is None or peak.whole >= 8 * MIB, "the parameter's gradient belongs to the whole"


def test_the_curve_of_a_layer_and_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    output, picture = tmp_path / "memory.json", tmp_path / "memory.png"
    command = ["bench", "memory", QUICKSTART, "--set=remoe.model.num_layers=2", "--densities", "0.5", "1.0"]
    command += ["--output", str(output), "--picture", str(picture)]
    assert main(command) == 0
    content = json.loads(output.read_text())
    assert content["command"].startswith("ds-remoe bench memory ds_configs/quickstart.json --set=")
    points = content["figures"]["points"]
    peaks = {(p["kind"], p["rival"], round(p["density"], 3)): p["peak_mib"] for p in points}
    for kind in ("layer", "model"):
        settled, dense = peaks[kind, "with budget", 0.125], peaks[kind, "without budget", 1.0]
        assert peaks[kind, "with budget", 1.0] <= 1.25 * settled < dense
        assert peaks[kind, "without budget", 0.125] == settled, "the budget cost memory where there is room"
    assert peaks["layer", "DeepSpeed MOELayer, ReLUGate", 1.0] > peaks["layer", "without budget", 1.0]
    bars = content["figures"]["bars"]
    assert [bar["reached"] for bar in bars] == [max(bar["ratios"].values()) <= 1.25 for bar in bars] == [True, True]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(command) == 2, "a results file was overwritten"


def test_files_that_cannot_be_measured_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    topk = ["remoe.moe.router=topk", "remoe.sparsity=null", "train_micro_batch_size_per_gpu=null", "train_batch_size=8"]
    command = ["bench", "memory", QUICKSTART, *(f"--set={text}" for text in topk)]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert 'remoe.moe.router = "topk"' in message
    assert "train_micro_batch_size_per_gpu: missing" in message


def test_experts_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage I brings nearly every token to every rank; the rows beyond the budget are not kept."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "memory.json"
    command = [
        "bench",
        "memory",
        QUICKSTART,
        "--set=remoe.model.num_layers=6",
        "--kinds",
        "model",
        "--micro-batch",
        "1",
    ]
    assert main([*command, "--ep-size", "3"]) == 2, "3 ranks for 8 experts"
    assert main([*command, "--ep-size", "2", "--densities", "0.5", "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert content["command"].endswith("--densities 0.5 --micro-batch 1 --ep-size 2")
    kept = {(p["rival"], round(p["density"], 3)): p["kept_mib"] for p in content["figures"]["points"]}
    assert kept["with budget", 0.5] <= 1.25 * kept["with budget", 0.125] < kept["without budget", 0.5]
    assert content["figures"]["bars"][0]["reached"]
