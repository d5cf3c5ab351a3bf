"""Checks of the optimizer. The facts are those of DeepSpeed 0.19.8."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_remoe.config.problems import MISSING, ConfigProblem

_LARGEST_LR = 1
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
    elif not 0 < params["lr"] <= _LARGEST_LR:
        remedy = "must be above 0 and at most 1: Adam moves a weight by about the learning rate in a step"
        yield ConfigProblem(f"{prefix}.lr", params["lr"], remedy)
    betas = params.get("betas", [0.9, 0.999])
    if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        yield ConfigProblem(f"{prefix}.betas", betas, "must be two numbers in [0, 1), for example [0.9, 0.999]")
    if params.get("eps", 1e-8) <= 0:
        yield ConfigProblem(f"{prefix}.eps", params["eps"], "must be positive")
    if params.get("weight_decay", 0) < 0:
        yield ConfigProblem(f"{prefix}.weight_decay", params["weight_decay"], "must be at least 0")
    if params.get("maximize"):
        yield ConfigProblem(f"{prefix}.maximize", True, "would make the loss grow; remove it")
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
