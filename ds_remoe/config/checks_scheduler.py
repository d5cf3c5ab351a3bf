"""Checks of the learning-rate schedule. The facts are those of DeepSpeed 0.19.8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ds_remoe.config.problems import MISSING, ConfigProblem

_PREFIX = "scheduler.params"
_WARMUP_NUM_STEPS_DEFAULT = 1000


def check_scheduler(clean: Mapping[str, Any], steps: int) -> Iterator[ConfigProblem]:
    """The schedule has the run's length and does not overrule the optimizer's settings unseen."""
    scheduler = clean.get("scheduler", {})
    kind, params = scheduler.get("type"), scheduler.get("params", {})
    lr = clean.get("optimizer", {}).get("params", {}).get("lr")
    total = params.get("total_num_steps")
    if total is not None and total != steps:
        remedy = f"must equal remoe.train.steps = {steps}; set it so (--set {_PREFIX}.total_num_steps={steps})"
        yield ConfigProblem(f"{_PREFIX}.total_num_steps", total, remedy)
    match kind:
        case "WarmupLR" | "WarmupDecayLR" | "WarmupCosineLR":
            yield from _check_warmup(params, steps, lr)
            if kind == "WarmupDecayLR" and lr is not None and "warmup_max_lr" not in params:
                remedy = f"DeepSpeed would peak at 0.001 and ignore optimizer.params.lr; set it to {lr}"
                yield ConfigProblem(f"{_PREFIX}.warmup_max_lr", MISSING, remedy)
            else:
                yield from _check_same_lr(params, "warmup_max_lr", lr)
        case "OneCycle":
            yield from _check_cycle(params)
            yield from _check_same_lr(params, "cycle_max_lr", lr)
        case "LRRangeTest":
            for name, least in (("lr_range_test_step_size", 1), ("lr_range_test_step_rate", 0)):
                yield from _check_least(params, name, least)
            if lr is not None and "lr_range_test_min_lr" not in params:
                remedy = f"DeepSpeed would begin at 0.001 and ignore optimizer.params.lr; set it to {lr}"
                yield ConfigProblem(f"{_PREFIX}.lr_range_test_min_lr", MISSING, remedy)
            else:
                yield from _check_same_lr(params, "lr_range_test_min_lr", lr)


def _check_same_lr(params: Mapping[str, Any], name: str, lr: float | None) -> Iterator[ConfigProblem]:
    if lr is not None and name in params and params[name] != lr:
        yield ConfigProblem(
            f"{_PREFIX}.{name}", params[name], f"would overrule optimizer.params.lr = {lr}; make them equal"
        )


def _check_least(params: Mapping[str, Any], name: str, least: int) -> Iterator[ConfigProblem]:
    if params.get(name, least) < least:
        yield ConfigProblem(f"{_PREFIX}.{name}", params[name], f"must be at least {least}")


def _check_warmup(params: Mapping[str, Any], steps: int, lr: float | None) -> Iterator[ConfigProblem]:
    """A warm-up that ends within the run, below the learning rate."""
    warmup = params.get("warmup_num_steps", _WARMUP_NUM_STEPS_DEFAULT)
    if warmup <= 0:
        yield ConfigProblem(f"{_PREFIX}.warmup_num_steps", warmup, "must be positive")
    elif warmup >= steps:
        field, value = f"{_PREFIX}.warmup_num_steps", params.get("warmup_num_steps", MISSING)
        fewer = f"set fewer (--set {field}={max(1, steps // 10)})"
        remedy = f"{warmup} steps of warm-up do not fit into remoe.train.steps = {steps}; {fewer}"
        yield ConfigProblem(field, value, remedy)
    if params.get("warmup_type", "log") not in ("log", "linear"):
        remedy = 'DeepSpeed would take "log" instead; must be "log" or "linear"'
        yield ConfigProblem(f"{_PREFIX}.warmup_type", params["warmup_type"], remedy)
    for name in ("warmup_min_ratio", "cos_min_ratio"):
        if name in params and not 0 <= params[name] <= 1:
            yield ConfigProblem(f"{_PREFIX}.{name}", params[name], "must be in [0, 1], a share of the learning rate")
    lowest = params.get("warmup_min_lr", 0.0)
    if lr is not None and not 0 <= lowest <= lr:
        remedy = f"the warm-up begins there: must be between 0 and optimizer.params.lr = {lr}"
        yield ConfigProblem(f"{_PREFIX}.warmup_min_lr", lowest, remedy)


def _check_cycle(params: Mapping[str, Any]) -> Iterator[ConfigProblem]:
    """Sizes that DeepSpeed takes, and momentum that is cycled by intention alone."""
    sizes = {"cycle_first_step_size": 1, "cycle_second_step_size": 0, "decay_step_size": 0, "decay_lr_rate": 0}
    stairs = {"cycle_first_stair_count": 0, "cycle_second_stair_count": 0}
    for name, least in {**sizes, **stairs}.items():
        yield from _check_least(params, name, least)
    lowest, highest = params.get("cycle_min_lr"), params.get("cycle_max_lr")
    if lowest is not None and highest is not None and not 0 <= lowest <= highest:
        remedy = f"must be between 0 and {_PREFIX}.cycle_max_lr = {highest}"
        yield ConfigProblem(f"{_PREFIX}.cycle_min_lr", lowest, remedy)
    if "cycle_momentum" not in params:
        remedy = "DeepSpeed would cycle the momentum over optimizer.params.betas; set false, or true to have that"
        yield ConfigProblem(f"{_PREFIX}.cycle_momentum", MISSING, remedy)
    elif params["cycle_momentum"] and params.get("decay_mom_rate", 0) > 0 and params.get("decay_step_size", 0) > 0:
        remedy = "DeepSpeed would raise the momentum past 1 after the cycle; remove it"
        yield ConfigProblem(f"{_PREFIX}.decay_mom_rate", params["decay_mom_rate"], remedy)
    for name in ("cycle_min_mom", "cycle_max_mom"):
        if not 0 <= params.get(name, 0) < 1:
            yield ConfigProblem(f"{_PREFIX}.{name}", params[name], "must be in [0, 1)")
