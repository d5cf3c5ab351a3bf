"""fp16's loss scale: where DeepSpeed's engines and checkpoints keep it, and the loss that stage 0 forgets to scale.

Checked against DeepSpeed 0.19.8.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LossScale:
    """A dynamic loss scale in the middle of a run.

    Attributes:
        scale: factor of the loss.
        iteration: steps judged, the skipped ones included.
        last_overflow: the iteration that was skipped last; -1 for none.
        hysteresis: 1 where the next overflow lowers the scale, one more for each that does not; None where the
            optimizer keeps none (stage 0).
    """

    scale: float
    iteration: int
    last_overflow: int
    hysteresis: int | None


def saved_loss_scale(content: Mapping[str, Any]) -> LossScale | None:
    """That of a file with optimizer states; None where its loss scale is not dynamic.

    Args:
        content: of any of a checkpoint's files; the scale is the same on every rank.
    """
    if "optimizer_state_dict" in content:
        scaler = content["optimizer_state_dict"].get("loss_scaler")
        if not getattr(scaler, "dynamic", False):
            return None
        return LossScale(scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis)
    state = content["optimizer"]
    if not state.get("dynamic_loss_scale", False):
        return None
    return LossScale(state["cur_scale"], state["cur_iter"], state["last_overflow_iter"], None)


def restore_loss_scale(engine: Any, saved: LossScale | None) -> str | None:
    """Let the dynamic loss scale of an fp16 engine go on where it was saved; window, bounds and factor stay its own.

    Args:
        engine: with another number of ranks or another stage than the one that saved; nothing is done where its
            loss scale is not dynamic.
        saved: None where the checkpoint has none.

    Returns:
        What of it starts anew, for the user; None if nothing does.
    """
    if not engine.fp16_enabled():
        return None
    optimizer = engine.optimizer
    by_zero = hasattr(optimizer, "loss_scaler")
    scaler = optimizer.loss_scaler if by_zero else optimizer.loss_scale_config
    if not (scaler.dynamic if by_zero else scaler.dynamic_loss_scale):
        return None
    if saved is None:
        return f"the checkpoint has no dynamic loss scale; fp16's starts anew at {scaler.cur_scale:g}"
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = saved.scale, saved.iteration, saved.last_overflow
    if not by_zero:
        return None
    if saved.hysteresis is None:
        return (
            f"a checkpoint of ZeRO stage 0 has no hysteresis of fp16's loss scale; it starts at {scaler.delayed_shift}"
        )
    scaler.cur_hysteresis = min(saved.hysteresis, scaler.delayed_shift)
    return None


def scale_loss_at_stage_0(engine: Any) -> None:
    """Have an fp16 engine of ZeRO stage 0 scale the loss that it steps with.

    There DeepSpeed divides the gradients by the loss scale without having multiplied the loss: nothing is kept from
    underflow, Adam's moments are too small by that factor, and as no step overflows, the factor grows without end.
    """
    if not engine.fp16_enabled() or not hasattr(engine.optimizer, "loss_scale_config"):
        return
    backward, config = engine.backward, engine.optimizer.loss_scale_config

    @functools.wraps(backward)
    def scaled_backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        factor = config.cur_scale
        return backward(loss.float() * factor, *args, **kwargs) / factor

    engine.backward = scaled_backward
