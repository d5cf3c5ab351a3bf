"""Everything that touches DeepSpeed's internals, checked against DeepSpeed 0.19.8.

Other rooms import from here, so that a new DeepSpeed release is one file to check.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import deepspeed
import hjson
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.pipe import PipelineModule
from deepspeed.utils import groups
from torch import Tensor, nn

__all__ = [
    "DeepSpeedMoE",
    "PipelineModule",
    "clip_gradients",
    "gradients_are_whole",
    "import_muon_uncompiled",
    "launched_rank",
    "loss_scale",
    "loss_scale_is_dynamic",
    "mark_expert_parameters",
    "read_config",
    "refresh_learning_rate",
    "replace_stage0_clipping",
    "require_ranks",
    "schedule_may_be_new",
    "set_subgroup_timeout",
    "use_gloo_only",
    "with_group_names",
    "without_update",
    "zero_norm_veto",
]


def read_config(text: str) -> dict[str, Any]:
    """A DeepSpeed config as `deepspeed.initialize` takes it: the path of an (h)json file, or base64 of its content."""
    if os.path.exists(text):
        with open(text, encoding="utf-8") as file:
            return dict(hjson.load(file))
    try:
        return dict(hjson.loads(base64.urlsafe_b64decode(text).decode()))
    except ValueError as error:
        raise ValueError(f"config = {text[:80]!r}: neither an existing file nor base64 of a config") from error


def mark_expert_parameters(module: nn.Module, group_name: str) -> None:
    """Make the engine reduce these parameters over the expert-data-parallel group of `group_name`."""
    for parameter in module.parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = group_name  # type: ignore[attr-defined]


def with_group_names(model_parameters: Any) -> Any:
    """Parameter groups as DeepSpeed's split for experts takes them: each with a list and a name of its own.

    It goes through a group's parameters twice, and by the group's name keeps the experts' settings: those of two groups
    of one name would be the second's. What is no list of groups, or is split already, is left as it is.

    Raises:
        ValueError: two groups have the same name.
    """
    groups = list(model_parameters) if isinstance(model_parameters, list | tuple) else []
    if not groups or not all(isinstance(group, dict) and "moe" not in group for group in groups):
        return model_parameters
    names = [group.get("name", f"parameters {index}") for index, group in enumerate(groups)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"model_parameters: two groups have the name {twice!r}, and DeepSpeed would give the experts of both the "
            "second's settings; give each a name of its own"
        )
    return [
        {**group, "name": name, "params": [given] if isinstance(given := group["params"], Tensor) else list(given)}
        for group, name in zip(groups, names, strict=True)
    ]


def require_ranks(ep_size: int) -> None:
    """See that expert-parallel groups of `ep_size` ranks can be made.

    Raises:
        RuntimeError: there is no process group.
        ValueError: ep_size does not divide the number of ranks.
    """
    if not deepspeed.comm.is_initialized():
        raise RuntimeError(
            f"MoE with ep_size = {ep_size}: there is no process group yet; call ds_remoe.initialize, or "
            "deepspeed.init_distributed() before"
        )
    ranks = dist.get_world_size()
    if ranks % ep_size:
        raise ValueError(
            f"ep_size = {ep_size}: must divide the number of ranks, which is {ranks}; lower it, or start more ranks "
            f"(deepspeed --num_gpus {ep_size} script.py)"
        )


def launched_rank() -> int:
    """This process's global rank, also before a process group exists (the launcher sets RANK)."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", "0"))


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without having its kernels compiled; for runs with another optimizer.

    ZeRO imports it to ask whether the optimizer is one, and the compiler that its decorators load takes seconds of
    every rank's start. Where it was imported before, nothing changes.
    """
    from deepspeed.runtime import compiler

    compile_function = compiler.compile
    compiler.compile = lambda *args, **kwargs: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_function


def use_gloo_only() -> None:
    """Switch off DeepSpeed's shared-memory all-reduce.

    It crashes across hosts, and two jobs of one machine with the same address and port corrupt each other's results.
    Call before the process group is made.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_subgroup_timeout(timeout: timedelta) -> None:
    """Timeout of the groups that DeepSpeed makes later; they ignore the one of `init_distributed`."""
    torch.distributed.distributed_c10d.default_pg_timeout = timeout


def gradients_are_whole(engine: Any) -> bool:
    """True where every rank holds whole reduced gradients in `.grad` before the optimizer step.

    That is ZeRO stage 0 without model parallelism (with an mpu DeepSpeed's own clipping stays in charge).
    """
    return int(engine.zero_optimization_stage()) == 0 and engine.mpu is None


def replace_stage0_clipping(engine: Any) -> None:
    """Switch off DeepSpeed's own clipping at stage 0, whose norm is wrong for experts with ep_size > 1.

    In fp32 it averages the ranks' norms, in bf16 it leaves the experts out. `clip_gradients` takes its place.
    """
    engine.clip_fp32_gradients = lambda: None
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = 0.0


def loss_scale(engine: Any) -> float:
    """Factor that the engine's gradients carry: that of fp16 or of autocast's scaler, else 1."""
    scaler = engine.torch_autocast_z0_gradscaler
    if scaler is not None:
        return float(scaler.get_scale())
    return float(engine._get_optimizer_loss_scale() or 1.0) if engine.fp16_enabled() else 1.0


def loss_scale_is_dynamic(engine: Any) -> bool:
    """True where overflowing steps are how the engine finds its loss scale."""
    if engine.torch_autocast_z0_gradscaler is not None:
        return True
    return bool(engine.fp16_enabled() and engine.dynamic_loss_scale())


@contextlib.contextmanager
def without_update(engine: Any) -> Iterator[None]:
    """Let the engine's model step run as after an overflow, its optimizer untouched; for ZeRO stage 0.

    The engine drops the gradients, counts a skipped step and leaves the learning-rate schedule where it is.
    """
    optimizer = engine.optimizer
    kept = {name: vars(optimizer)[name] for name in ("step", "overflow") if name in vars(optimizer)}
    optimizer.step, optimizer.overflow = lambda *args, **kwargs: None, True
    try:
        yield
    finally:
        del optimizer.step, optimizer.overflow
        vars(optimizer).update(kept)


@contextlib.contextmanager
def zero_norm_veto(engine: Any, refuses: Callable[[Tensor], bool]) -> Iterator[None]:
    """Let `refuses(norm)` turn the model step into an overflow step; for ZeRO stages 1 and 2, whose step measures it.

    Args:
        engine: whose model step runs inside; its loss scale is not dynamic.
        refuses: takes the global gradient norm, times the loss scale, as the engine measured it.
    """
    optimizer = engine.optimizer
    measure, checks = optimizer.scaled_global_norm, optimizer.check_grad_overflow

    def scaled_global_norm(*args: Any, **kwargs: Any) -> Tensor:
        norm: Tensor = measure(*args, **kwargs)
        if not refuses(norm):
            return norm
        # Read next; where it is false a bf16 step takes any norm.
        optimizer.check_grad_overflow = True
        return torch.full_like(norm, math.inf)

    optimizer.scaled_global_norm = scaled_global_norm
    # The step's own check before the norm, an all-reduce and a read from the device, would find nothing more.
    optimizer.check_grad_overflow = False
    # A fixed scale is not updated; it would only be logged, whatever was refused, that gradients are not finite.
    optimizer._update_scale = lambda overflow: None
    try:
        yield
    finally:
        del optimizer.scaled_global_norm, optimizer._update_scale
        optimizer.check_grad_overflow = checks


@contextlib.contextmanager
def schedule_may_be_new(engine: Any) -> Iterator[None]:
    """Within it, `engine.load_checkpoint` takes a checkpoint without a schedule, which DeepSpeed stumbles over.

    The engine's schedule is then where the checkpoint's steps would have brought it.
    """
    scheduler = engine.lr_scheduler
    if scheduler is None:
        yield
        return
    load, is_new = scheduler.load_state_dict, False

    def load_state_dict(state: dict[str, Any] | None) -> None:
        nonlocal is_new
        is_new = state is None
        if state is not None:
            load(state)

    scheduler.load_state_dict = load_state_dict
    try:
        yield
    finally:
        del scheduler.load_state_dict
    if is_new:
        scheduler.last_batch_iteration = engine.global_steps - engine.skipped_steps - 1


def refresh_learning_rate(engine: Any) -> None:
    """Recompute the learning rate from the schedule as it is configured now.

    A checkpoint brings back the rate of the schedule that it was saved under, which would hold for one step more.
    """
    scheduler = engine.lr_scheduler
    if scheduler is not None and getattr(scheduler, "last_batch_iteration", -1) >= 0:
        scheduler.step(scheduler.last_batch_iteration)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, loss_scale: float = 1.0) -> Tensor:
    """Clip whole, reduced gradients by their global L2 norm, experts on every rank of their EP group counted once.

    Args:
        parameters: of one rank; the others call with theirs.
        max_norm: clip above this; 0 measures only.
        loss_scale: factor that the gradients carry.

    Returns:
        The norm before clipping, without the loss scale: fp64 scalar, the same on every rank.
    """
    gradients: dict[str | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            group = parameter.group_name if is_moe_param(parameter) else None  # type: ignore[attr-defined]
            gradients.setdefault(group, []).append(parameter.grad)
    if not gradients:
        return torch.zeros(())
    device = next(iter(gradients.values()))[0].device
    square = torch.zeros((), dtype=torch.float64, device=device)
    for group, tensors in gradients.items():
        norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors])
        partial = norms.square().sum()
        if group is not None:
            dist.all_reduce(partial, group=groups._get_expert_parallel_group(group))
        square += partial
    norm = square.sqrt() / loss_scale
    if max_norm > 0:
        # Where the norm is not finite the gradients stay, for the engine's own check to see.
        factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
        for tensor in (t for tensors in gradients.values() for t in tensors):
            tensor.mul_(factor.to(tensor.dtype))
    return norm
