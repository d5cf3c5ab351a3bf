"""Backward passes that have no derivative of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Ctx = TypeVar("_Ctx")


def first_order(backward: Callable[Concatenate[_Ctx, _P], _R]) -> Callable[Concatenate[_Ctx, _P], _R]:
    """Decorator of an autograd function's backward: refuses `create_graph=True`.

    Torch's `once_differentiable` lets it pass where the incoming gradient is a constant, as that of a plain sum is, and
    the gradients then silently lack their dependence on the input.

    Raises:
        RuntimeError: the backward pass was asked to be differentiable.
    """

    @functools.wraps(backward)
    def checked(ctx: _Ctx, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.is_grad_enabled():
            name = type(ctx).__name__.removesuffix("Backward").removeprefix("_")
            raise RuntimeError(
                f"create_graph=True: ds_remoe's {name} has first derivatives alone, so gradients of gradients would "
                "be wrong; call backward without it, or penalise gradients that do not pass through ds_remoe's layers"
            )
        return backward(ctx, *args, **kwargs)

    return checked
