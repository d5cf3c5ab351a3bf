"""Record the routing of a training run: start its ranks, gather what they recorded (see record_rank.py)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ds_remoe.bench.ranks import run_module
from ds_remoe.bench.trace import TraceMetadata, read_trace, write_trace
from ds_remoe.config import ConfigError, ConfigProblem, RunConfig, load_run


def record(config: Path, overrides: Sequence[str], steps: Sequence[int], world_size: int | None, output: Path) -> int:
    """Train up to the last wanted step, on ranks of this machine, and write the trace.

    The run keeps its schedule; its folder is a temporary one.

    Args:
        config, overrides: the run; its `train.output_dir` is not touched.
        steps: optimizer steps, counted from 1.
        world_size: ranks; None: as many as the run's ep_size.
        output: the trace; it must not exist.

    Returns:
        Number of recorded routings.

    Raises:
        ConfigError: the run has no routers or not that many steps.
        RankError: the training failed.
    """
    run = load_run(config, overrides, world_size=None)
    ranks = world_size if world_size is not None else run.remoe.moe.ep_size
    run = load_run(config, overrides, world_size=ranks)
    _check(run, steps)
    with tempfile.TemporaryDirectory(prefix="ds-remoe-record-") as folder:
        quiet = [f"remoe.train.output_dir={json.dumps(f'{folder}/run')}", 'remoe.logging.wandb.mode="disabled"']
        arguments = ["--config", str(config), "--folder", folder, "--steps", *map(str, steps)]
        for setting in [*overrides, *quiet]:
            arguments += ["--set", setting]
        run_module("ds_remoe.bench.record_rank", arguments, ranks)
        records = [r for rank in range(ranks) for r in read_trace(part(folder, rank))]
    write_trace(output, metadata(run, steps, ranks), records)
    return len(records)


def _check(run: RunConfig, steps: Sequence[int]) -> None:
    problems: list[ConfigProblem] = []
    if run.remoe.moe.router == "dense":
        problems.append(ConfigProblem("remoe.moe.router", "dense", "routes nothing; record a run with routed experts"))
    if max(steps) > run.remoe.train.steps:
        remedy = f"the run ends before the wanted step {max(steps)}; lower that, or train longer"
        problems.append(ConfigProblem("remoe.train.steps", run.remoe.train.steps, remedy))
    if problems:
        raise ConfigError(str(run.path), problems)


def metadata(run: RunConfig, steps: Sequence[int], world_size: int) -> TraceMetadata:
    """What a trace says of the run that it was recorded from."""
    model, moe = run.remoe.model, run.remoe.moe
    return TraceMetadata(
        config=run.path.name,
        overrides=tuple(run.overrides),
        steps=tuple(sorted(steps)),
        world_size=world_size,
        ep_size=moe.ep_size,
        hidden_size=model.hidden_size,
        expert_hidden_size=model.d_ffn // moe.granularity,
        k=moe.active_experts,
    )


def part(folder: str, rank: int) -> Path:
    """Where a rank leaves its records."""
    return Path(folder) / f"rank{rank}.npz"
