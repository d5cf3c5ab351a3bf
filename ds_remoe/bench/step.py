"""Whole optimizer steps of ReMoE, dropless TopK and the dense model of equal FLOPs, and where ReMoE's time goes.

Each rival is a `Trainer` of the same run file with another router, trained on real data for some steps first, so that
the sparsity is what training makes it; then their steps are timed in turns. At ZeRO 1 and 2 ReMoE runs once more, its
gradients taken through DeepSpeed's own passes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from ds_remoe.bench.profile import Share, engine_ranges, time_by_kind
from ds_remoe.bench.router_settings import with_router
from ds_remoe.bench.timing import Timing, interleave, ratio
from ds_remoe.config import load_run
from ds_remoe.deepspeed_gradients import restore_deepspeed_gradients
from ds_remoe.model.flops import flops_per_token
from ds_remoe.training import runtime
from ds_remoe.training.record import StepRecord
from ds_remoe.training.trainer import Trainer

WHAT = "whole optimizer steps on one device: ReMoE, dropless TopK and the dense model of equal FLOPs, timed in turns"
STOCK = "ReMoE, DeepSpeed's gradient passes"
ROUTERS = {"ReMoE": "relu", STOCK: "relu", "TopK": "topk", "dense": "dense"}
WARMUP, PROFILED_STEPS = 2, 3


@dataclass(frozen=True)
class StepTime:
    """One rival.

    Attributes:
        timing: of its optimizer steps.
        tokens: of one step.
        active_experts: measured mean of a token in an MoE layer over the timed steps; None for the dense model.
        tflops: TFLOP/s by measured active experts, at the median.
    """

    timing: Timing
    tokens: int
    active_experts: float | None
    tflops: float


@dataclass(frozen=True)
class StepBenchmark:
    """The rivals, the device's measured GEMM rate in TFLOP/s, and the profile of ReMoE's step."""

    rivals: dict[str, StepTime]
    gemm_tflops: float
    profile: list[Share]


def measure(config: Path, overrides: Sequence[str], settle: int, repeats: int, folder: Path) -> StepBenchmark:
    """Time optimizer steps on this process's device.

    Args:
        config: run file of the ReMoE model; router, ep_size and folder are set here.
        overrides: further `path=value` settings of every rival.
        settle: steps that every rival trains before the first timed one.
        repeats: timed steps of each.
        folder: for the runs' output.

    Raises:
        ValueError: the run has fewer steps than that; the last one is not timed, as it evaluates.
    """
    train = load_run(config, [*overrides, "remoe.moe.ep_size=1"], world_size=1).remoe.train
    needed = settle + WARMUP + repeats + PROFILED_STEPS + 1
    if train.steps < needed:
        raise ValueError(
            f"remoe.train.steps = {train.steps}: --settle {settle} --repeats {repeats} needs at least {needed}; "
            "lower them, or raise it (and scheduler.params.total_num_steps)"
        )
    with _one_rank():
        runtime.quiet_output()
        device = runtime.start(train.seed)
        try:
            runners = {
                name: _Runner(config, _settings(config, overrides, router, folder / name), device)
                for name, router in ROUTERS.items()
            }
            if not restore_deepspeed_gradients(runners[STOCK].trainer.engine):
                del runners[STOCK]
            for runner in runners.values():
                for _ in range(settle):
                    runner.step()
                runner.records.clear()
            timings = interleave({name: runner.step for name, runner in runners.items()}, repeats, device, WARMUP)
            rivals = {name: runner.result(timings[name]) for name, runner in runners.items()}
            return StepBenchmark(rivals, gemm_tflops(device), _profile(runners["ReMoE"], device))
        finally:
            runtime.stop()


def gemm_tflops(device: torch.device, size: int = 1024, repeats: int = 15) -> float:
    """Measured rate of a square GEMM in TFLOP/s: bf16 on a GPU, fp32 on the CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 8 * size if device.type == "cuda" else size
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = interleave({"gemm": lambda: torch.mm(a, b)}, repeats, device, warmup=3)["gemm"]
    return 2 * size**3 / timing.median / 1e12


def table(result: StepBenchmark) -> Table:
    """The rivals for a terminal."""
    table = Table(title="optimizer steps, in turns", title_justify="left")
    for name in ("", "ms a step", "quartiles", "tokens/s", "active experts", "GFLOP/s", "of GEMM rate", "× dense time"):
        table.add_column(name, justify="left" if not name else "right")
    for name, rival in result.rivals.items():
        low, high = rival.timing.quartiles
        table.add_row(
            name,
            f"{rival.timing.median * 1e3:.1f}",
            f"{low * 1e3:.1f} to {high * 1e3:.1f}",
            f"{rival.tokens / rival.timing.median:,.0f}",
            "-" if rival.active_experts is None else f"{rival.active_experts:.3f}",
            f"{rival.tflops * 1e3:,.1f}",
            f"{rival.tflops / result.gemm_tflops:.1%}",
            f"{ratio(rival.timing, result.rivals['dense'].timing):.3f}",
        )
    return table


def profile_table(result: StepBenchmark) -> Table:
    """Where ReMoE's step goes."""
    table = Table(title=f"ReMoE's step by kind of work ({PROFILED_STEPS} steps profiled)", title_justify="left")
    for name in ("kind", "share", "ms a step", "calls a step", "the largest"):
        table.add_column(name, justify="left" if name in ("kind", "the largest") else "right")
    for share in result.profile:
        largest = ", ".join(share.largest)
        table.add_row(share.kind, f"{share.share:.1%}", f"{share.ms:.2f}", f"{share.calls:.0f}", largest)
    return table


def figures(result: StepBenchmark) -> dict[str, object]:
    """For a results file."""
    dense = result.rivals["dense"]
    rivals = {
        name: {
            **rival.timing.as_figures(),
            "tokens_per_step": rival.tokens,
            "active_experts": rival.active_experts,
            "tflops": rival.tflops,
            "share_of_gemm_rate": rival.tflops / result.gemm_tflops,
            "time_against_dense": ratio(rival.timing, dense.timing),
            "tflops_against_dense": rival.tflops / dense.tflops,
        }
        for name, rival in result.rivals.items()
    }
    return {"gemm_tflops": result.gemm_tflops, "rivals": rivals, "profile": [asdict(share) for share in result.profile]}


class _Runner:
    """Trains one rival step by step."""

    def __init__(self, config: Path, settings: Sequence[str], device: torch.device) -> None:
        run = load_run(config, settings, world_size=1)
        with contextlib.redirect_stdout(io.StringIO()):
            self.trainer = Trainer(run, device)
        self.records: list[StepRecord] = []
        self._next = 0

    def step(self) -> None:
        _, record = self.trainer.step(self._next)
        self.records.append(record)
        self._next += 1

    def result(self, timing: Timing) -> StepTime:
        timed = self.records[-len(timing.seconds) :]
        active = [r.active_experts_per_token for r in timed if r.active_experts_per_token is not None]
        mean = statistics.fmean(active) if active else None
        config, tokens = self.trainer.config, self.trainer.batch.global_batch * self.trainer.config.model.seq_length
        flops = flops_per_token(config.model, config.moe, self.trainer.data.tokenizer.vocab_size, mean or 0.0) * tokens
        return StepTime(timing, tokens, mean, flops / timing.median / 1e12)


def _settings(config: Path, overrides: Sequence[str], router: str, output: Path) -> list[str]:
    """Settings of one rival; nothing is evaluated or saved while it is timed."""
    settings = with_router(config, overrides, router)
    return [*settings, f"remoe.train.output_dir={json.dumps(str(output))}", f"remoe.train.eval_interval={10**9}"]


def _profile(runner: _Runner, device: torch.device) -> list[Share]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with engine_ranges(runner.trainer.engine), profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            runner.step()
    return time_by_kind(profiler, device, PROFILED_STEPS)


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """The launcher's variables for a process group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    before = dict(os.environ)
    os.environ.update(rank, MASTER_PORT=port)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
