"""`initialize`: deepspeed.initialize with the sparsity controller tied to the engine's step, save and load."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ds_remoe.config.schema import ReMoEConfig, SparsityConfig
from ds_remoe.deepspeed_compat import clip_gradients, gradients_are_whole, replace_stage0_clipping
from ds_remoe.moe.routers import Router
from ds_remoe.moe.sparsity import SparsityController, relu_routers
from ds_remoe.moe.statistics import RoutingReport, RoutingStatistics, connect_all

CLIENT_STATE_KEY = "ds_remoe_sparsity"


class RoutingState:
    """What ds_remoe keeps for one engine; found at `engine.remoe`.

    Attributes:
        controller: steers the ReLU routers; None for a model without any.
        report: routing of the last optimizer step; None before the first, and where nothing was routed.
        grad_norm: global L2 norm of the last step's gradients before clipping, experts included once; None before
            the first step.
    """

    def __init__(self, model: nn.Module, config: SparsityConfig) -> None:
        self.controller = SparsityController(model, config) if relu_routers(model) else None
        self._statistics: RoutingStatistics | None = self.controller.statistics if self.controller else None
        if self.controller is None:
            routers = [m for m in model.modules() if isinstance(m, Router)]
            self._statistics = connect_all((r.statistics, r.num_experts) for r in routers) if routers else None
        self.report: RoutingReport | None = None
        self.grad_norm: float | None = None

    def close_step(self, *, applied: bool) -> None:
        """Sum the statistics of an optimizer step over all ranks, and move λ where the step was applied."""
        if self.controller is not None:
            self.report = self.controller.step(applied=applied)
        elif self._statistics is not None:
            self.report = self._statistics.reduce()


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | dict[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` for a model with ReMoE layers: same arguments, same results.

    It makes a `SparsityController` for the model's ReLU routers, from `remoe.sparsity` of the DeepSpeed config where
    that stands, and ties it to the engine: `engine.step()` moves λ at each optimizer step, `save_checkpoint` and
    `load_checkpoint` carry λ and its history. At ZeRO stage 0 it also puts gradient clipping right for experts.

    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler) as DeepSpeed gives them; `engine.remoe` is a
        `RoutingState`.

    Raises:
        ValueError: `remoe` in the config has an unknown key or a wrong value.
    """
    if model is None:
        raise ValueError("initialize: model is missing; pass model=")
    given = config if config is not None else config_params
    if given is None:
        given = getattr(args, "deepspeed_config", None)
    state = RoutingState(model, _sparsity_config(given))
    results = deepspeed.initialize(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=config,
        mesh_param=mesh_param,
        config_params=config_params,
    )
    engine = results[0]
    engine.remoe = state
    _tie_step(engine, state)
    _tie_checkpoints(engine, state)
    return results


def _sparsity_config(given: str | dict[str, Any] | None) -> SparsityConfig:
    """`remoe.sparsity` of a DeepSpeed config, or the defaults."""
    if isinstance(given, str):
        with open(given, encoding="utf-8") as file:
            given = json.load(file)
    section = given.get("remoe", {}) if isinstance(given, dict) else {}
    unknown = set(section) - set(ReMoEConfig.model_fields)
    if unknown:
        raise ValueError(
            f"remoe: unknown key {sorted(unknown)[0]!r}; known are {', '.join(sorted(ReMoEConfig.model_fields))}"
        )
    try:
        return SparsityConfig.model_validate(section.get("sparsity", {}))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(["remoe", "sparsity", *map(str, first["loc"])])
        raise ValueError(f"{field} = {first['input']!r}: {first['msg']}") from error


def _tie_step(engine: Any, state: RoutingState) -> None:
    own_clipping = gradients_are_whole(engine)
    if own_clipping:
        replace_stage0_clipping(engine)
    original = engine.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        boundary = engine.is_gradient_accumulation_boundary()
        norm: Tensor | None = None
        if boundary and own_clipping:
            scale = engine._get_optimizer_loss_scale() if engine.fp16_enabled() else 1.0
            norm = clip_gradients(engine.module.parameters(), float(engine.gradient_clipping()), scale or 1.0)
        result = original(*args, **kwargs)
        if boundary:
            if norm is not None:
                engine._global_grad_norm = norm
            measured = engine.get_global_grad_norm()
            state.grad_norm = None if measured is None else float(measured)
            state.close_step(applied=bool(engine.was_step_applied()))
        return result

    engine.step = step


def _tie_checkpoints(engine: Any, state: RoutingState) -> None:
    controller = state.controller
    if controller is None:
        return
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @functools.wraps(save)
    def save_checkpoint(
        save_dir: str, tag: str | None = None, client_state: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        with_lambda = {**(client_state or {}), CLIENT_STATE_KEY: controller.state_dict()}
        return save(save_dir, tag, with_lambda, *args, **kwargs)

    @functools.wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, client_state = load(*args, **kwargs)
        if client_state is not None and not kwargs.get("load_module_only", False):
            if CLIENT_STATE_KEY not in client_state:
                raise KeyError(
                    f"{path}: holds no ReMoE sparsity state ({CLIENT_STATE_KEY!r}); it was not saved through "
                    "ds_remoe.initialize. Load its weights alone with load_module_only=True"
                )
            controller.load_state_dict(client_state.pop(CLIENT_STATE_KEY))
        return path, client_state

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def unwrap(model: nn.Module) -> nn.Module:
    """The module behind an engine (or the module itself)."""
    return model.module if isinstance(model, deepspeed.DeepSpeedEngine) else model


def device_of(engine: Any) -> torch.device:
    """The device that an engine trains on."""
    return torch.device(engine.device)
