"""Checks of the optimizer and the learning-rate schedule. The facts are those of DeepSpeed 0.19.8."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_remoe.config.problems import MISSING, ConfigProblem

_WARMUP_NUM_STEPS_DEFAULT = 1000
_CUDA_HOME_DEFAULT = "/usr/local/cuda"


def check_optimizer(
    clean: Mapping[str, Any], given: Mapping[str, Any], accelerator: str | None
) -> Iterator[ConfigProblem]:
    """There is an optimizer, its numbers make sense, and its kernel can be built."""
    if "optimizer" not in given:
        remedy = 'required, for example {"type": "AdamW", "params": {"lr": 5e-4}}'
        yield ConfigProblem("optimizer", MISSING, remedy)
        return
    optimizer = clean.get("optimizer", {})
    if "type" not in optimizer:
        return
    params = optimizer.get("params", {})
    prefix = "optimizer.params"
    if "lr" not in params:
        stated = given["optimizer"].get("params", {})
        # What is there, but of the wrong kind, was reported with the keys.
        if isinstance(stated, dict) and "lr" not in stated:
            yield ConfigProblem(f"{prefix}.lr", MISSING, "required: the learning rate, for example 5e-4")
    elif params["lr"] <= 0:
        yield ConfigProblem(f"{prefix}.lr", params["lr"], "must be positive")
    betas = params.get("betas", [0.9, 0.999])
    if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        yield ConfigProblem(f"{prefix}.betas", betas, "must be two numbers in [0, 1), for example [0.9, 0.999]")
    if params.get("eps", 1e-8) <= 0:
        yield ConfigProblem(f"{prefix}.eps", params["eps"], "must be positive")
    if params.get("weight_decay", 0) < 0:
        yield ConfigProblem(f"{prefix}.weight_decay", params["weight_decay"], "must be at least 0")
    if params.get("foreach") and params.get("fused"):
        yield ConfigProblem(f"{prefix}.foreach", True, "torch has either foreach or fused; keep one of them")
    if optimizer["type"].lower() == "adamw" and params.get("adam_w_mode") is False:
        remedy = 'DeepSpeed ignores it for type "AdamW"; set type "Adam", or remove it'
        yield ConfigProblem(f"{prefix}.adam_w_mode", False, remedy)
    yield from _check_kernel(clean, params, accelerator)


def _check_kernel(
    clean: Mapping[str, Any], params: Mapping[str, Any], accelerator: str | None
) -> Iterator[ConfigProblem]:
    """DeepSpeed's own Adam kernels are compiled when the engine starts; a compiler must be there."""
    field = "optimizer.params.torch_adam"
    if params.get("torch_adam") or accelerator is None:
        return
    value = params.get("torch_adam", MISSING)
    offload = clean.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") == "cpu"
    kernel = "cpu_adam" if offload else "fused_adam"
    if _is_prebuilt(kernel):
        return
    if accelerator == "cuda" and not offload and not _has_cuda_toolkit():
        remedy = f"DeepSpeed would compile {kernel}, but there is no nvcc here; set it to true to use torch's AdamW"
        yield ConfigProblem(field, value, remedy)
    elif accelerator in ("cpu", "cuda") and shutil.which(os.environ.get("CXX", "c++")) is None:
        remedy = f"DeepSpeed would compile {kernel}, but there is no C++ compiler; set it to true to use torch's AdamW"
        yield ConfigProblem(field, value, remedy)


def _is_prebuilt(kernel: str) -> bool:
    spec = importlib.util.find_spec("deepspeed")
    folders = spec.submodule_search_locations if spec else None
    return any(list(Path(folder).glob(f"ops/adam/{kernel}_op*.so")) for folder in folders or [])


def _has_cuda_toolkit() -> bool:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _CUDA_HOME_DEFAULT]
    return shutil.which("nvcc") is not None or any(home and (Path(home) / "bin" / "nvcc").exists() for home in homes)


def check_scheduler(clean: Mapping[str, Any], steps: int) -> Iterator[ConfigProblem]:
    """The schedule has the run's length and does not overrule the optimizer's learning rate unseen."""
    scheduler = clean.get("scheduler", {})
    kind, params = scheduler.get("type"), scheduler.get("params", {})
    prefix = "scheduler.params"
    total = params.get("total_num_steps")
    if total is not None and total != steps:
        remedy = f"must equal remoe.train.steps = {steps}; set it so (--set {prefix}.total_num_steps={steps})"
        yield ConfigProblem(f"{prefix}.total_num_steps", total, remedy)
    if kind not in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        return
    warmup = params.get("warmup_num_steps", _WARMUP_NUM_STEPS_DEFAULT)
    if warmup <= 0:
        yield ConfigProblem(f"{prefix}.warmup_num_steps", warmup, "must be positive")
    elif warmup >= steps:
        field, value = f"{prefix}.warmup_num_steps", params.get("warmup_num_steps", MISSING)
        remedy = f"{warmup} steps of warm-up do not fit into remoe.train.steps = {steps}; set fewer"
        yield ConfigProblem(field, value, remedy)
    if params.get("warmup_type", "log") not in ("log", "linear"):
        remedy = 'DeepSpeed would take "log" instead; must be "log" or "linear"'
        yield ConfigProblem(f"{prefix}.warmup_type", params["warmup_type"], remedy)
    for name in ("warmup_min_ratio", "cos_min_ratio"):
        if name in params and not 0 <= params[name] <= 1:
            yield ConfigProblem(f"{prefix}.{name}", params[name], "must be in [0, 1], a share of the learning rate")
    lr = clean.get("optimizer", {}).get("params", {}).get("lr")
    lowest = params.get("warmup_min_lr", 0.0)
    if lr is not None and not 0 <= lowest <= lr:
        remedy = f"the warm-up begins there: must be between 0 and optimizer.params.lr = {lr}"
        yield ConfigProblem(f"{prefix}.warmup_min_lr", lowest, remedy)
    if kind == "WarmupDecayLR" and "warmup_max_lr" not in params:
        remedy = f"DeepSpeed would peak at 0.001 and ignore optimizer.params.lr; set it to {lr}"
        yield ConfigProblem(f"{prefix}.warmup_max_lr", MISSING, remedy)
    elif "warmup_max_lr" in params and params["warmup_max_lr"] != lr:
        remedy = f"would overrule optimizer.params.lr = {lr}; make them equal"
        yield ConfigProblem(f"{prefix}.warmup_max_lr", params["warmup_max_lr"], remedy)
