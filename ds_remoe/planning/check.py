"""A plan against training steps that really run here, on one rank with random tokens."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ds_remoe.model.decoder import Decoder
from ds_remoe.planning.hardware import GIB
from ds_remoe.planning.plan import Plan, Stage
from ds_remoe.training.engine import initialize

MIB = GIB / 1024
WHAT = "Planned memory and step time against those of training steps on one rank, at the density that the steps had."


@dataclass(frozen=True)
class Measured:
    """What the steps took.

    Attributes:
        density: share of active pairs, mean over the timed steps.
        step_seconds: of each timed step.
        parameters, gradients, optimizer: bytes held; gradients after the last backward pass of a step.
        activations: bytes that autograd kept for backward, the most of any micro-batch.
        peak: most bytes that were allocated on a GPU; 0 on the CPU, where nobody counts.
    """

    density: float
    step_seconds: tuple[float, ...]
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.step_seconds)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def optimizer_tensors(engine: Any) -> list[Tensor]:
    """Master weights and moments of a DeepSpeed engine."""
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    held = [t for state in base.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    if base is not engine.optimizer:
        held += [p for group in base.param_groups for p in group["params"]]
    return held


def gradient_tensors(engine: Any) -> list[Tensor]:
    """Gradients of the parameters, and those of a step that ZeRO keeps of its partition."""
    held = [p.grad for p in engine.module.parameters() if p.grad is not None]
    for name in ("averaged_gradients", "all_grad_tensors"):
        held += [t for group in getattr(engine.optimizer, name, {}).values() if group for t in group]
    return held


@contextlib.contextmanager
def one_rank(seed: int) -> Iterator[torch.device]:
    """A process group of this process alone, as the launcher would make it; yields the device."""
    from ds_remoe.training.runtime import quiet_output, start

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in alone.items()}
    quiet_output()
    device = start(seed)
    try:
        yield device
    finally:
        torch.distributed.destroy_process_group()


class SavedTensors:
    """Context that counts the storages which autograd keeps, those of `model`'s parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._seen: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._own:
            self._seen[place] = tensor  # held, so that no later storage can have its address
        return tensor

    def take(self) -> int:
        """Bytes kept so far; forgets them."""
        size = storage_bytes(self._seen.values())
        self._seen.clear()
        return size


def measure(plan: Plan, device: torch.device, steps: int) -> Measured:
    """Train `steps` steps after one that is not timed; a process group of one rank exists.

    Args:
        plan: of one rank.
    """
    run, settings = plan.run, plan.settings
    model = Decoder(run.remoe.model, run.remoe.moe, plan.vocab_size, run.remoe.train.seed)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints of each group that it makes
        engine, *_ = initialize(model=model, model_parameters=list(model.parameters()), config=run.deepspeed)
    kept = gradients = 0
    seconds: list[float] = []
    densities: list[float] = []
    generator = torch.Generator().manual_seed(0)
    for step in range(steps + 1):
        began = time.perf_counter()
        for _ in range(settings.accumulation):
            shape = (settings.micro_batch, run.remoe.model.seq_length + 1)
            tokens = torch.randint(plan.vocab_size, shape, generator=generator).to(device)
            inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            if step:
                loss = engine(inputs, labels).loss
            else:
                with SavedTensors(model) as saved:
                    loss = engine(inputs, labels).loss
                kept = max(kept, saved.take())
            engine.backward(loss)
            gradients = max(gradients, storage_bytes(gradient_tensors(engine)))
            engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step:
            seconds.append(time.perf_counter() - began)
        else:
            densities.clear()
        report = engine.remoe.report
        densities.append(report.active_experts_per_token / run.remoe.moe.total_experts if report else 0.0)
    return Measured(
        density=statistics.mean(densities),
        step_seconds=tuple(seconds),
        parameters=storage_bytes(p.data for p in model.parameters()),
        gradients=gradients,
        optimizer=storage_bytes(optimizer_tensors(engine)),
        activations=kept,
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )


def compare(stage: Stage, measured: Measured) -> dict[str, tuple[float, float]]:
    """name → (planned, measured), bytes but for the step's seconds; `stage` is planned at the measured density."""
    states, kept = stage.memory.states, stage.memory.activations
    rows: dict[str, tuple[float, float]] = {
        "parameters": (states.parameters, measured.parameters),
        "gradients": (states.gradients, measured.gradients),
        "optimizer states": (states.optimizer, measured.optimizer),
        "activations kept": (kept.saved, measured.activations),
        "step": (stage.time.total, measured.median_seconds),
    }
    if measured.peak:
        rows["peak"] = (stage.memory.peak, measured.peak)
    return rows


def table(rows: dict[str, tuple[float, float]], density: float) -> Table:
    """The comparison for a terminal."""
    result = Table(title=f"Planned against measured, {density:.3g} active", title_justify="left", box=None)
    for name in ("", "planned", "measured", "planned / measured"):
        result.add_column(name, justify="left" if not name else "right")
    for name, (planned, measured) in rows.items():
        unit, scale = ("s", 1.0) if name == "step" else ("MiB", MIB)
        result.add_row(
            name, f"{planned / scale:,.3f} {unit}", f"{measured / scale:,.3f} {unit}", f"{planned / measured:.3f}"
        )
    return result
