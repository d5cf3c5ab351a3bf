"""`ds-remoe bench kernels` on tiny sizes: what runs on a CPU is checked and timed, the rest named with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_remoe.bench.kernel_subjects import KERNELS
from ds_remoe.cli import main

SIZES = ["--tokens=64", "--hidden-size=16", "--ffn-hidden-size=32", "--device=cpu", "--repeats=2"]


def test_the_results_hold_every_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "kernels.json"
    command = ["bench", "kernels", "--workloads", "e8", "stage1", *SIZES, "--output", str(output)]
    assert main(command) == 0
    content = json.loads(output.read_text())
    assert content["command"].startswith("ds-remoe bench kernels")
    rows = content["figures"]["kernels"]
    assert [(row["workload"], row["kernel"]) for row in rows] == [(w, k) for w in ("e8", "stage1") for k in KERNELS]
    for row in rows:
        assert not row["failed"]
        assert set(row["largest_difference_from_torch"]) | {"torch"} == set(row["implementations"])
        assert row["left_out"]["Triton"] == "Triton needs a CUDA device"
        assert all(timing["median_ms"] > 0 for timing in row["implementations"].values())
    assert "grouped_mm" in rows[-1]["implementations"]
    assert "grouped_swiglu, Triton: left out, Triton needs a CUDA device" in capsys.readouterr().out
    assert main(command) == 2, "a results file was overwritten"


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--kernels", "softmax", *SIZES]) == 2
    assert "--kernels softmax: unknown; known are swiglu" in capsys.readouterr().err
    assert main(["bench", "kernels", "--workloads", "e0", *SIZES]) == 2
    assert "workload 'e0': unknown" in capsys.readouterr().err
