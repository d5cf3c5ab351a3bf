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
