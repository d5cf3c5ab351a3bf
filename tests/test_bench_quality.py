"""`ds-remoe bench quality` on a tiny run: both routers really train, TopK with as many FLOPs as ReMoE spent."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import pytest
from test_resume import run_config

from ds_remoe.cli import main
from ds_remoe.training import metrics


def test_topk_gets_the_flops_that_remoe_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = run_config(tmp_path / "unused", tmp_path / "data")
    config["remoe"]["logging"]["wandb"]["mode"] = "disabled"
    corpus = tmp_path / "corpus.jsonl"
    code = inspect.getsource(argparse)
    corpus.write_text("\n".join(json.dumps({"text": code[i : i + 1000]}) for i in range(0, len(code), 1000)))
    config["remoe"]["data"]["source"] = {"type": "jsonl", "paths": [str(corpus)]}
    config["remoe"]["data"]["tokenizer"]["vocab_size"] = 600
    file, output, runs = tmp_path / "tiny.json", tmp_path / "results.json", tmp_path / "runs"
    file.write_text(json.dumps(config))
    steps = ["--set=remoe.train.steps=20", "--set=scheduler.params.total_num_steps=20"]
    command = ["bench", "quality", str(file), *steps, "--seeds", "3", "--runs", str(runs), "--output", str(output)]
    assert main(command) == 0

    content = json.loads(output.read_text())
    assert content["command"].startswith("ds-remoe bench quality")
    (row,) = content["figures"]["comparisons"]
    per_step = row["topk"]["pflops"] / row["topk"]["steps"]
    assert 0 <= row["topk"]["pflops"] - row["remoe"]["pflops"] < per_step
    assert row["topk"]["steps"] > row["remoe"]["steps"] == 20, "ReMoE's dense stage was not counted"
    for router, name in (("relu", "remoe"), ("topk", "topk")):
        (log,) = runs.glob(f"*/{router}_seed3/metrics.jsonl")
        assert metrics.read(log)[-1].valid_loss == row[name]["valid_loss"]

    assert main(command) == 2, "a results file was overwritten"


def test_a_run_that_fails_is_named_with_its_cause_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = run_config(tmp_path / "unused", tmp_path / "data")
    corpus, file = tmp_path / "corpus.jsonl", tmp_path / "tiny.json"
    corpus.write_text('{"text": "too short"}\n')
    config["remoe"]["data"]["source"] = {"type": "jsonl", "paths": [str(corpus)]}
    file.write_text(json.dumps(config))
    assert main(["bench", "quality", str(file), "--seeds", "3", "--runs", str(tmp_path / "runs")]) == 1
    (log,) = tmp_path.glob("runs/*/relu_seed3.log")
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("relu with seed 3 failed with exit code 2: remoe.data.source: the text is too short")
    assert second == f"All that it said is in {log}"
