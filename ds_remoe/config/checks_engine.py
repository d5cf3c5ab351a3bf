"""Checks of what the DeepSpeed engine would get wrong, ignore, or refuse only after a process group was made.

The facts are those of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ds_remoe.config.batch import ACCUMULATION, MICRO, TRAIN, derive_batch_sizes
from ds_remoe.config.folders import why_unusable
from ds_remoe.config.problems import MISSING, ConfigProblem
from ds_remoe.config.schema import LoggingConfig, MoEConfig

_GRADIENT_CLIPPING_DEFAULT = 1.0


def zero_stage(clean: Mapping[str, Any]) -> int:
    """The ZeRO stage in use."""
    return int(clean.get("zero_optimization", {}).get("stage", 0))


def check_batch(clean: Mapping[str, Any], given: Mapping[str, Any], world_size: int | None) -> Iterator[ConfigProblem]:
    """The batch sizes are there, positive, and agree with each other and the world size."""
    if TRAIN not in given and MICRO not in given:
        remedy = f"required, or {TRAIN}: the sequences of one forward on one rank, or of one optimizer step on all"
        yield ConfigProblem(MICRO, MISSING, remedy)
        return
    sizes = {key: clean[key] for key in (TRAIN, MICRO, ACCUMULATION) if key in clean}
    wrong = {key: value for key, value in sizes.items() if value <= 0}
    for key, value in wrong.items():
        yield ConfigProblem(key, value, "must be positive")
    if wrong or len(sizes) < sum(key in given for key in (TRAIN, MICRO, ACCUMULATION)) or TRAIN not in sizes:
        return
    derived = derive_batch_sizes(sizes, world_size or 1)
    unit = sizes.get(MICRO, 1) * sizes.get(ACCUMULATION, 1) * (world_size or 1)
    exact = len(sizes) == 3 and world_size is not None
    if sizes[TRAIN] % unit == 0 and not (exact and derived is not None and not derived.fits(world_size or 1)):
        return
    factors = [f"{key} ({sizes[key]})" for key in (MICRO, ACCUMULATION) if key in sizes]
    factors += [f"{world_size} ranks"] if world_size is not None else []
    if exact:
        remedy = f"is not {' * '.join(factors)} = {unit}; set it to {unit}, or leave it or another of the three out"
    elif len(sizes) == 3:
        remedy = f"is not a multiple of {' * '.join(factors)} = {unit}; set it to {unit} for each rank, or leave it out"
    else:
        nearest = max(1, round(sizes[TRAIN] / unit)) * unit
        remedy = f"is not a multiple of {' * '.join(factors)} = {unit}; the nearest is {nearest}"
    yield ConfigProblem(TRAIN, sizes[TRAIN], remedy)


def check_zero(clean: Mapping[str, Any]) -> Iterator[ConfigProblem]:
    """The ZeRO stage is one that native MoE layers have, and offloading fits it."""
    zero, stage = clean.get("zero_optimization", {}), zero_stage(clean)
    if stage == 3:
        remedy = (
            "DeepSpeed refuses native MoE layers at stage 3, and checkpoints here are made for stages 0 to 2; set 2, "
            'with "offload_optimizer": {"device": "cpu"} if memory is short'
        )
        yield ConfigProblem("zero_optimization.stage", stage, remedy)
    elif stage not in (0, 1, 2):
        yield ConfigProblem("zero_optimization.stage", stage, "must be 0, 1 or 2")
    if zero.get("compute_grad_norm") is False:
        remedy = "clipping and the log of each step need the gradient norm; remove it"
        yield ConfigProblem("zero_optimization.compute_grad_norm", False, remedy)
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(name, 1) <= 0:
            yield ConfigProblem(f"zero_optimization.{name}", zero[name], "must be positive")
    offload = zero.get("offload_optimizer", {})
    device = offload.get("device", "none")
    if device not in ("none", "cpu"):
        remedy = 'must be "cpu" or "none"; NVMe needs stage 3, which has no native MoE layers'
        yield ConfigProblem("zero_optimization.offload_optimizer.device", device, remedy)
    elif device == "cpu" and stage == 0:
        remedy = "stage 0 offloads nothing; set zero_optimization.stage to 1 or 2"
        yield ConfigProblem("zero_optimization.offload_optimizer.device", device, remedy)
    if offload.get("ratio", 1.0) != 1.0:
        remedy = "partial offload needs stage 3, which has no native MoE layers; remove it"
        yield ConfigProblem("zero_optimization.offload_optimizer.ratio", offload["ratio"], remedy)


def check_expert_gradients(clean: Mapping[str, Any], moe: MoEConfig) -> Iterator[ConfigProblem]:
    """Gradients are reduced in the ways that DeepSpeed has for experts."""
    zero, stage = clean.get("zero_optimization", {}), zero_stage(clean)
    if moe.router == "dense":
        return
    offloads = zero.get("offload_optimizer", {}).get("device") == "cpu"
    if stage == 2 and zero.get("contiguous_gradients") is False and not offloads:
        remedy = "DeepSpeed needs contiguous gradients for experts at stage 2; remove it"
        yield ConfigProblem("zero_optimization.contiguous_gradients", False, remedy)
    if stage in (1, 2) and zero.get("reduce_scatter") is False:
        remedy = "DeepSpeed needs it for experts at stages 1 and 2; remove it"
        yield ConfigProblem("zero_optimization.reduce_scatter", False, remedy)


def check_precision(clean: Mapping[str, Any], accelerator: str | None) -> Iterator[ConfigProblem]:
    """One training dtype, that the device has, with master weights that the ZeRO stage has."""
    fp16, bf16, stage = clean.get("fp16", {}), clean.get("bf16", {}), zero_stage(clean)
    for name, section in (("fp16", fp16), ("bf16", bf16)):
        if section and "enabled" not in section:
            yield ConfigProblem(f"{name}.enabled", MISSING, "the section has no effect without it; set true or false")
    if fp16.get("enabled") and bf16.get("enabled"):
        yield ConfigProblem("fp16.enabled", True, "bf16.enabled is true as well; keep one of them")
    if fp16.get("enabled") and accelerator == "cpu":
        remedy = 'DeepSpeed refuses fp16 on the CPU; use "bf16": {"enabled": true}, or leave both out for fp32'
        yield ConfigProblem("fp16.enabled", True, remedy)
    offloads = clean.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") == "cpu"
    cpu_adam = offloads and not clean.get("optimizer", {}).get("params", {}).get("torch_adam")
    for field, section in (("bf16.bf16_master_weights_and_grads", bf16), ("fp16.fp16_master_weights_and_grads", fp16)):
        if not section.get(field.split(".")[1]):
            continue
        on_device = section is bf16 and bf16.get("bf16_optimizer_states") and not offloads
        if stage == 0:
            yield ConfigProblem(field, True, "needs ZeRO; set zero_optimization.stage to 1 or 2, or remove it")
        elif not cpu_adam and not on_device:
            other = " or (without offloading) bf16.bf16_optimizer_states to true," if section is bf16 else ""
            remedy = (
                'needs DeepSpeed\'s CPU Adam: set zero_optimization.offload_optimizer to {"device": "cpu"} and '
                f"optimizer.params.torch_adam to false,{other} or remove it"
            )
            yield ConfigProblem(field, True, remedy)
    if bf16.get("bf16_optimizer_states") and not bf16.get("bf16_master_weights_and_grads"):
        yield ConfigProblem("bf16.bf16_optimizer_states", True, "needs bf16.bf16_master_weights_and_grads: true")
    if fp16.get("loss_scale", 0) < 0:
        yield ConfigProblem("fp16.loss_scale", fp16["loss_scale"], "must be at least 0; 0 scales dynamically")
    for name in ("loss_scale_window", "min_loss_scale"):
        if fp16.get(name, 1) <= 0:
            yield ConfigProblem(f"fp16.{name}", fp16[name], "must be positive")


def check_monitors(clean: Mapping[str, Any], accelerator: str | None) -> Iterator[ConfigProblem]:
    """What DeepSpeed's monitors import is installed where rank 0 runs, and what they write has a place there."""
    if accelerator is None or os.environ.get("RANK", "0") != "0":
        return
    for name, package in (("tensorboard", "tensorboard"), ("comet", "comet_ml")):
        if clean.get(name, {}).get("enabled") and importlib.util.find_spec(package) is None:
            yield ConfigProblem(f"{name}.enabled", True, f"there is no package {package} here; pip install {package}")
    for name in ("tensorboard", "csv_monitor"):
        monitor = clean.get(name, {})
        path = os.path.join(monitor.get("output_path", ""), monitor.get("job_name", ""))
        remedy = why_unusable(path) if monitor.get("enabled") else None
        if remedy is not None:
            yield ConfigProblem(f"{name}.output_path", monitor.get("output_path", ""), remedy)


def check_double_logging(clean: Mapping[str, Any], logging: LoggingConfig) -> Iterator[ConfigProblem]:
    """W&B gets each measurement from one side."""
    if clean.get("wandb", {}).get("enabled") and logging.wandb.mode != "disabled":
        remedy = f'remoe.logging.wandb.mode is "{logging.wandb.mode}", so W&B would get a second run; remove "wandb"'
        yield ConfigProblem("wandb.enabled", True, remedy)


def check_values(clean: Mapping[str, Any]) -> Iterator[ConfigProblem]:
    """Single values that DeepSpeed takes and that would break or bend the run."""
    if clean.get("gradient_clipping", _GRADIENT_CLIPPING_DEFAULT) < 0:
        remedy = "must be at least 0; 0 turns clipping off"
        yield ConfigProblem("gradient_clipping", clean["gradient_clipping"], remedy)
    if clean.get("managed_gradient_accumulation") is False:
        remedy = "the training loop leaves accumulation to the engine; remove it"
        yield ConfigProblem("managed_gradient_accumulation", False, remedy)
    if clean.get("gradient_allreduce_op", "mean") != "mean":
        remedy = 'the loss and the controller count on a mean over ranks; set "mean" or remove it'
        yield ConfigProblem("gradient_allreduce_op", clean["gradient_allreduce_op"], remedy)
    checkpoint = clean.get("checkpoint", {})
    if checkpoint.get("load_universal"):
        remedy = "DeepSpeed cannot make universal checkpoints of native MoE layers; remove it, resuming needs none"
        yield ConfigProblem("checkpoint.load_universal", True, remedy)
    choices: list[tuple[str, Mapping[str, Any], str, tuple[str, ...]]] = [
        ("communication_data_type", clean, "communication_data_type", ("fp16", "bf16", "fp32")),
        ("log_level", clean, "log_level", ("debug", "info", "warning", "error", "critical")),
        ("checkpoint.tag_validation", checkpoint, "tag_validation", ("ignore", "warn", "fail")),
    ]
    for field, section, key, allowed in choices:
        if key in section and section[key].lower() not in allowed:
            yield ConfigProblem(field, section[key], f"must be one of {', '.join(allowed)}")
    if zero_stage(clean) == 2 and clean.get("zero_optimization", {}).get("reduce_scatter") is not False:
        remedy = "DeepSpeed has it at stages 0 and 1 alone; remove it, or set zero_optimization.stage to 1"
        for key, neutral in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
            if clean.get(key, neutral) != neutral:
                yield ConfigProblem(key, clean[key], remedy)
    for key in ("steps_per_print", "gradient_predivide_factor"):
        if clean.get(key, 1) <= 0:
            yield ConfigProblem(key, clean[key], "must be positive")
