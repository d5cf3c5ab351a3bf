"""ReMoE against dropless TopK at equal measured training FLOPs: valid loss for each of several seeds.

ReMoE trains first. What it spent is summed from the measured active experts of every step, its dense stage included;
TopK then gets as many steps as that pays for, rounded up in TopK's favour, with its schedule stretched to match.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from ds_remoe.bench.router_settings import with_router
from ds_remoe.config import RunConfig, load_run
from ds_remoe.data.prepare import prepare
from ds_remoe.model.flops import flops_per_token
from ds_remoe.training import metrics
from ds_remoe.training.record import StepRecord

WHAT = "valid loss of ReMoE and of dropless TopK at equal measured training FLOPs, ReMoE's dense stage counted"


class QualityError(Exception):
    """A run did not give what is compared; the message says in a line which, why, and where its output is."""


@dataclass(frozen=True)
class Trained:
    """One run: its router, seed, steps, training FLOPs by measured active experts, and final valid loss."""

    router: str
    seed: int
    steps: int
    pflops: float
    valid_loss: float
    mean_sparsity_last_quarter: float


@dataclass(frozen=True)
class Comparison:
    """Both routers of one seed."""

    remoe: Trained
    topk: Trained

    @property
    def gain(self) -> float:
        """How much lower ReMoE's valid loss is, in nats per token."""
        return self.topk.valid_loss - self.remoe.valid_loss


def compare(config: Path, overrides: Sequence[str], seeds: Sequence[int], folder: Path, jobs: int) -> list[Comparison]:
    """Train both routers for each seed, each run a process of one rank, `jobs` seeds at a time.

    Args:
        config: run configuration of the ReMoE model; router, seed, steps and folder are set here.
        overrides: further `path=value` settings of both routers.
        seeds: one comparison each.
        folder: where the runs go; a run that is complete there is not trained again.
        jobs: processes at a time.

    Raises:
        QualityError: a run failed; those that had not begun are left out.
    """
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda seed: _compare_seed(config, overrides, seed, folder), seeds))


def table(comparisons: Sequence[Comparison]) -> Table:
    """The comparison for a terminal."""
    result = Table(title="valid loss at equal measured training FLOPs", title_justify="left")
    for name in ("seed", "ReMoE steps", "TFLOP", "valid loss", "TopK steps", "TFLOP", "valid loss", "gain"):
        result.add_column(name, justify="right")
    for row in comparisons:
        cells = [str(row.remoe.seed)]
        for run in (row.remoe, row.topk):
            cells += [str(run.steps), f"{1000 * run.pflops:.2f}", f"{run.valid_loss:.4f}"]
        result.add_row(*cells, f"{row.gain:+.4f}")
    return result


def figures(comparisons: Sequence[Comparison]) -> dict[str, object]:
    """The comparison for a results file."""
    rows = [{"remoe": asdict(row.remoe), "topk": asdict(row.topk), "gain": row.gain} for row in comparisons]
    return {"comparisons": rows, "remoe_better": sum(row.gain > 0 for row in comparisons)}


def _compare_seed(config: Path, overrides: Sequence[str], seed: int, folder: Path) -> Comparison:
    remoe = _train("relu", config, overrides, seed, None, folder)
    return Comparison(remoe, _train("topk", config, overrides, seed, remoe.pflops, folder))


def _train(
    router: str, config: Path, overrides: Sequence[str], seed: int, pflops: float | None, folder: Path
) -> Trained:
    output = folder / _digest(config, overrides) / f"{router}_seed{seed}"
    settings = with_router(config, overrides, router)
    settings += [f"remoe.train.seed={seed}", f"remoe.train.output_dir={json.dumps(str(output))}"]
    if router == "topk" and pflops is not None:
        settings += _steps_worth(pflops, config, settings)
    command = [sys.executable, "-m", "ds_remoe.train", "--config", str(config)]
    for setting in settings:
        command += ["--set", setting]
    output.parent.mkdir(parents=True, exist_ok=True)
    log_path = output.with_suffix(".log")
    with log_path.open("ab") as log:
        began = log.tell()
        result = subprocess.run(command, env=_environment(), stdout=log, stderr=subprocess.STDOUT)
    if result.returncode:
        said = log_path.read_bytes()[began:].decode(errors="replace").split("\n")
        cause = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        raise QualityError(
            f"{router} with seed {seed} failed with exit code {result.returncode}: {cause}\n"
            f"All that it said is in {log_path}"
        )
    records = metrics.read(output / "metrics.jsonl")
    last = records[-1]
    if last.valid_loss is None:
        raise QualityError(f"{router} with seed {seed}: its last step has no valid loss; see {output}/metrics.jsonl")
    quarter = records[-max(len(records) // 4, 1) :]
    sparsity = sum(r.sparsity or 0.0 for r in quarter) / len(quarter)
    return Trained(router, seed, last.step, _pflops(records, config, settings), last.valid_loss, sparsity)


def _digest(config: Path, overrides: Sequence[str]) -> str:
    """A folder name for runs of this file with these overrides, so that other settings never find them."""
    text = "\n".join([config.read_text(encoding="utf-8"), *overrides])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _load(config: Path, settings: tuple[str, ...]) -> RunConfig:
    return load_run(config, settings, world_size=1)


@functools.cache
def _vocab_size(config: Path, settings: tuple[str, ...]) -> int:
    remoe = _load(config, settings).remoe
    return prepare(remoe.data, remoe.model.seq_length, progress=False).tokenizer.vocab_size


def _steps_worth(pflops: float, config: Path, settings: Sequence[str]) -> list[str]:
    """Settings for the number of TopK steps that cost at least `pflops`."""
    run = _load(config, tuple(settings))
    per_step = _pflops_per_step(run.remoe.moe.active_experts, config, settings)
    steps = math.ceil(pflops / per_step)
    scheduled = "total_num_steps" in run.deepspeed.get("scheduler", {}).get("params", {})
    return [f"remoe.train.steps={steps}", *([f"scheduler.params.total_num_steps={steps}"] if scheduled else [])]


def _pflops(records: Sequence[StepRecord], config: Path, settings: Sequence[str]) -> float:
    """Training FLOPs of all steps in 1e15, by the active experts that each step measured."""
    return math.fsum(_pflops_per_step(r.active_experts_per_token or 0.0, config, settings) for r in records)


def _pflops_per_step(active_experts: float, config: Path, settings: Sequence[str]) -> float:
    run = _load(config, tuple(settings))
    remoe = run.remoe
    tokens = run.batch_sizes(1).global_batch * remoe.model.seq_length
    return flops_per_token(remoe.model, remoe.moe, _vocab_size(config, tuple(settings)), active_experts) * tokens / 1e15


def _environment() -> dict[str, str]:
    """A process group of one rank, on a port of its own; one thread, as the processes share the cores."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    return {**os.environ, **rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
