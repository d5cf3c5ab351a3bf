"""`initialize`: deepspeed.initialize with the sparsity controller tied to the engine's step, save and load."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable
from typing import Any

import deepspeed
from torch import Tensor, nn

from ds_remoe.config.problems import ConfigError, ConfigProblem, unknown_key
from ds_remoe.config.schema import ReMoEConfig, SparsityConfig
from ds_remoe.config.typed import parse_remoe, parse_sparsity
from ds_remoe.deepspeed_compat import (
    PipelineModule,
    clip_gradients,
    gradients_are_whole,
    loss_scale,
    loss_scale_is_dynamic,
    read_config,
    replace_stage0_clipping,
    with_group_names,
    without_update,
    zero_norm_veto,
)
from ds_remoe.deepspeed_gradients import keep_gradients_flat
from ds_remoe.deepspeed_loss_scale import scale_loss_at_stage_0
from ds_remoe.moe.routers import ReLURouter
from ds_remoe.moe.sparsity import SparsityController, find_routers
from ds_remoe.moe.statistics import RoutingReport, RoutingStatistics, connect_all
from ds_remoe.training.engine_checkpoints import Carried, tie_checkpoints
from ds_remoe.training.guard import SkipReason, StepGuard

GUARD_KEY = "ds_remoe_step_guard"


class RoutingState:
    """What ds_remoe keeps for one engine; found at `engine.remoe`.

    Attributes:
        controller: steers the ReLU routers; None for a model without any.
        report: routing of the last optimizer step; None before the first, and where nothing was routed.
        grad_norm: global L2 norm of the last step's gradients before clipping, experts included once; None before
            the first step, and where the engine does not measure it.
        guard: judges each step before it is applied; None leaves that to DeepSpeed. Set it with `guard_steps`.
        skipped: why the last optimizer step was not applied; None where it was.
        carried: what checkpoints carry in their client state besides λ, by its key there. A full load restores each
            whose key the checkpoint has; an older checkpoint starts it anew.
    """

    def __init__(self, model: nn.Module, config: SparsityConfig) -> None:
        routers = find_routers(model)
        steered = any(isinstance(router, ReLURouter) for router in routers)
        self.controller = SparsityController(model, config) if steered else None
        self._statistics: RoutingStatistics | None = None
        if self.controller is None and routers:
            self._statistics = connect_all((r.statistics, r.num_experts) for r in routers)
        self.report: RoutingReport | None = None
        self.grad_norm: float | None = None
        self.guard: StepGuard | None = None
        self.skipped: SkipReason | None = None
        self.carried: dict[str, Carried] = {}

    def close_step(self, grad_norm: float | None, skipped: SkipReason | None) -> None:
        """Sum the statistics of an optimizer step over all ranks, and move λ where the step was applied."""
        self.grad_norm, self.skipped = grad_norm, skipped
        if self.guard is not None:
            self.guard.close(grad_norm, skipped)
        if self.controller is not None:
            self.report = self.controller.step(applied=skipped is None)
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
    *,
    trust_checkpoints: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` for a model with ReMoE layers: its arguments and one more, its results.

    It makes a `SparsityController` for the model's ReLU routers, from `remoe.sparsity` of the DeepSpeed config where
    that stands (also in the file of a whole run), and ties it to the engine: `engine.step()` moves λ at each optimizer
    step, `save_checkpoint` and `load_checkpoint` carry λ and its history (also with load_module_only, as the weights
    belong to that λ). At ZeRO stage 0 it also puts gradient clipping right for experts, and scales the loss of fp16,
    which DeepSpeed forgets.

    `engine.load_checkpoint`, which every rank calls, reads files as values (tensors, numbers, texts, lists, tuples,
    dicts, sets and what DeepSpeed itself saves), so that no code in them runs, at ZeRO stage 3 and from universal
    checkpoints, too. Files with anything else are refused on all ranks before the engine changes, with an
    `UnsafeFileError` that names it: objects of your own in `client_state`, DataStates' format, and NumPy arrays, whose
    pickles can hold addresses: put `torch.from_numpy` of them there.

    Args:
        trust_checkpoints: let `engine.load_checkpoint` run the code that files name, as DeepSpeed does; for
            checkpoints whose source you trust. Other arguments are those of `deepspeed.initialize`.

    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler) as DeepSpeed gives them; `engine.remoe` is a
        `RoutingState`.

    Raises:
        ValueError: `remoe` in the config has an unknown key, one that is not read here, or a wrong value; the model is
            a PipelineModule; or two parameter groups have one name.
    """
    if model is None:
        raise ValueError("initialize: model is missing; pass model=")
    if isinstance(model, PipelineModule):
        raise ValueError("initialize: model is a PipelineModule; pipeline parallelism is not supported, use ep_size")
    given = config if config is not None else config_params
    if given is None:
        given = getattr(args, "deepspeed_config", None)
    state = RoutingState(model, _sparsity_config(given))
    results = deepspeed.initialize(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=with_group_names(model_parameters),
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
    scale_loss_at_stage_0(engine)
    keep_gradients_flat(engine)
    _tie_step(engine, state)
    tie_checkpoints(engine, state.controller, state.carried, trust=trust_checkpoints)
    return results


def _sparsity_config(given: str | dict[str, Any] | None) -> SparsityConfig:
    """`remoe.sparsity` of a DeepSpeed config (a dict, or a text that DeepSpeed reads), or the defaults."""
    config = read_config(given) if isinstance(given, str) else given
    if not isinstance(config, dict):
        return SparsityConfig()  # DeepSpeed says what it takes
    section = config.get("remoe", {})
    sparsity: SparsityConfig | None = None
    problems = [] if "remoe" in config else [unknown_key("", key, config[key], ["remoe"]) for key in _misspelt(config)]
    if not isinstance(section, dict):
        problems.append(ConfigProblem("remoe", section, 'must be an object, for example {"sparsity": {"alpha": 1.2}}'))
    elif {"model", "train"} <= section.keys():  # the file of a run
        remoe, problems = parse_remoe(section)
        sparsity = remoe.sparsity if remoe is not None else None
    else:
        sparsity, found = parse_sparsity(section.get("sparsity", {}))
        problems += found
        for key in sorted(section.keys() - {"sparsity"}):
            if key in ReMoEConfig.model_fields:
                remedy = "initialize reads remoe.sparsity alone; say it to ds_remoe.MoE or in your loop, and remove it"
                problems.append(ConfigProblem(f"remoe.{key}", section[key], remedy))
            else:
                problems.append(unknown_key("remoe", key, section[key], ["sparsity"]))
    if problems or sparsity is None:
        raise ConfigError("initialize", problems)
    return sparsity


def _misspelt(config: dict[str, Any]) -> list[str]:
    return [key for key in config if difflib.get_close_matches(str(key).lower(), ["remoe"], cutoff=0.8)]


def guard_steps(engine: Any, guard: StepGuard) -> None:
    """Have `guard` judge every optimizer step of an engine that `initialize` made, and its checkpoints carry its state.

    With dynamic fp16 loss scaling DeepSpeed judges alone, as overflows are how it finds the scale.
    """
    engine.remoe.guard = guard
    engine.remoe.carried[GUARD_KEY] = guard


def _tie_step(engine: Any, state: RoutingState) -> None:
    """Act around the engine's model step, which runs once for each gradient accumulation boundary."""
    own_clipping = gradients_are_whole(engine)
    if own_clipping:
        replace_stage0_clipping(engine)
    original = engine._take_model_step

    @functools.wraps(original)
    def take_model_step(*args: Any, **kwargs: Any) -> Any:
        norm: Tensor | None = None
        judged: tuple[float | None, SkipReason | None] | None = None
        guard = state.guard if not loss_scale_is_dynamic(engine) else None

        def refuses(scaled_norm: Tensor) -> bool:
            nonlocal judged
            assert guard is not None
            judged = guard.judge(scaled_norm / engine.optimizer.loss_scale, engine.device)
            return judged[1] is not None

        step: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if own_clipping:
            norm = clip_gradients(engine.module.parameters(), float(engine.gradient_clipping()), loss_scale(engine))
            if guard is not None:
                judged = guard.judge(norm, engine.device)
                if judged[1] is not None:
                    step = without_update(engine)
        elif guard is not None:
            step = zero_norm_veto(engine, refuses)
        with step:
            result = original(*args, **kwargs)
        if norm is not None:
            engine._global_grad_norm = norm
        if judged is None:
            measured = engine.get_global_grad_norm()
            judged = (None if measured is None else float(measured)), None
        grad_norm, skipped = judged
        if skipped is None and not engine.was_step_applied():
            skipped = "overflow" if loss_scale_is_dynamic(engine) else "non_finite"
        state.close_step(grad_norm, skipped)
        return result

    engine._take_model_step = take_model_step
