"""Whole runs through the `deepspeed` launcher: killed and stopped ones continue the undisturbed run bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import free_port

STEPS, SAVE_EVERY = 40, 6
TIMING = {"tokens_per_second", "tflops_per_device", "mfu", "step_seconds"}


def run_config(folder: Path, data: Path) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": STEPS, "warmup_num_steps": 5}},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 1_000_000_000,
        "remoe": {
            "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 48, "seq_length": 64},
            "moe": {"num_experts": 4, "ep_size": 2},
            "sparsity": {"lambda_init": 1e-6},
            "data": {
                "source": {"type": "stdlib", "max_bytes_per_domain": 200_000},
                "tokenizer": {"type": "train", "vocab_size": 600},
                "cache_dir": str(data),
            },
            "train": {
                "steps": STEPS,
                "eval_interval": 10,
                "eval_batches": 1,
                "save_interval": SAVE_EVERY,
                "output_dir": str(folder),
            },
            "logging": {"wandb": {"mode": "offline"}},
        },
    }


class Run:
    """One run folder and the commands on it."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.config = folder.with_suffix(".json")
        self.config.write_text(json.dumps(run_config(folder, data)))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
        command += ["--module", "ds_remoe.train", "--config", self.config, *arguments]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_ERROR_REPORTING": "false"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        return subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == code, output[-5000:]
        return output

    def signal_a_rank(self, rank: int, signum: int, after_step: int) -> str:
        """Start, wait until a step is done, send a signal to one rank, and wait for the launcher's end."""
        process = self.start()
        try:
            deadline = time.monotonic() + 120
            while len(self.lines()) < after_step:
                assert process.poll() is None, process.communicate()[0][-5000:]
                assert time.monotonic() < deadline, f"step {after_step} did not come in time"
                time.sleep(0.01)
            ranks = [
                p for p in psutil.Process(process.pid).children(recursive=True) if f"--local_rank={rank}" in p.cmdline()
            ]
            ranks[0].send_signal(signum)
            output, _ = process.communicate(timeout=120)
            return output + f"\nlauncher's code {process.returncode}"
        finally:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                child.kill()
            process.kill()

    def lines(self) -> list[str]:
        path = self.folder / "metrics.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def records(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in self.lines()]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir() if path.is_dir())

    def manifest(self, tag: str) -> dict[str, Any]:
        return json.loads((self.folder / "checkpoints" / tag / "ds_remoe_manifest.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("runs")
    run = Run(root / "undisturbed", root / "data")
    run.finish()
    return run


def test_a_whole_run_leaves_what_it_promises(undisturbed: Run) -> None:
    records = undisturbed.records()
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records if record["valid_loss"] is not None] == [10, 20, 30, 40]
    assert records[-1]["samples"] == STEPS * 8
    assert records[-1]["lm_loss"] < records[0]["lm_loss"] - 0.5
    assert records[-1]["l1_coefficient"] > records[0]["l1_coefficient"] == 1e-6
    assert undisturbed.checkpoints() == ["step00000036", "step00000040"]
    manifest = undisturbed.manifest("step00000040")
    assert (manifest["identity"]["world_size"], manifest["identity"]["ep_size"], manifest["samples"]) == (2, 2, 320)
    names = {path.name for path in undisturbed.folder.iterdir()}
    assert {"metrics.jsonl", "summary.json", "stages.png", "expert_load.png", "checkpoints", "wandb"} <= names
    (wandb_folder,) = (undisturbed.folder / "wandb").glob("offline-run-*")
    assert wandb_folder.name.endswith(manifest["wandb_run_id"])


def test_a_finished_run_says_that_it_is_done(undisturbed: Run) -> None:
    before = undisturbed.lines()
    output = undisturbed.finish()
    assert "Nothing to do" in output
    assert "remoe.train.steps=80" in output
    assert undisturbed.lines() == before


def test_a_run_stopped_twice_and_killed_continues_the_same_line(undisturbed: Run) -> None:
    """SIGTERM to one rank, SIGKILL between saves, SIGUSR1; each time on by itself, the last time from an older save."""
    run = Run(undisturbed.folder.with_name("disturbed"), undisturbed.folder.with_name("data"))
    for rank, signum in ((0, signal.SIGTERM), (1, signal.SIGKILL), (1, signal.SIGUSR1)):
        output = run.signal_a_rank(rank, signum, after_step=len(run.lines()) + 5)
        done = len(run.lines())
        assert done < STEPS, "the signal came too late to prove anything"
        if signum == signal.SIGKILL:
            assert "launcher's code 0" not in output
            (run.folder / "checkpoints" / "step00000039").mkdir()  # as a save that was killed leaves it
            continue
        assert "launcher's code 0" in output, output[-4000:]
        assert f"after step {done}" in output
        assert run.checkpoints()[-1] == f"step{done:08d}"
    run.finish("--resume", run.checkpoints()[-2])
    got, expected = run.records(), undisturbed.records()
    assert [record["step"] for record in got] == list(range(1, STEPS + 1))
    assert got == expected


def test_a_resume_that_does_not_match_is_refused_once(undisturbed: Run) -> None:
    before = undisturbed.lines()
    output = undisturbed.finish("--set", "remoe.train.seed=1", code=2)
    assert output.count("seed: the checkpoint has 0, this run 1") == 1, output[-4000:]
    assert undisturbed.lines() == before


def test_a_file_of_another_step_is_named_and_the_run_falls_back_to_the_same_line(undisturbed: Run) -> None:
    before, folder = undisturbed.records(), undisturbed.folder / "checkpoints"
    state = folder / "step00000040" / "mp_rank_00_model_states.pt"
    state.write_bytes((folder / "step00000036" / state.name).read_bytes())
    refused = undisturbed.finish("--resume", "step00000040", code=2)
    assert "step00000040 is damaged" in refused, refused[-4000:]
    output = undisturbed.finish()
    assert "it is step00000036/mp_rank_00_model_states.pt" in output, output[-4000:]
    assert "step00000036, the newest good checkpoint, is used instead" in output
    assert undisturbed.records() == before
    assert undisturbed.checkpoints() == ["step00000036", "step00000040"]


def test_training_on_follows_the_longer_schedule_from_its_first_step(undisturbed: Run) -> None:
    longer = STEPS + 4
    undisturbed.finish("--set", f"remoe.train.steps={longer}", "--set", f"scheduler.params.total_num_steps={longer}")
    rates = [record["learning_rate"] for record in undisturbed.records()[STEPS:]]
    progress = [(STEPS - 1 + index - 5 + 1) / (longer - 5) for index in range(4)]
    expected = [3e-3 * (1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * p)) / 2) for p in progress]
    assert rates == pytest.approx(expected)
