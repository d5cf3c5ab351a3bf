"""Which of a kernel and its torch twin runs."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def use_triton(tensor: Tensor) -> bool:
    """True for tensors that the Triton kernels serve: on a CUDA device, or anywhere under TRITON_INTERPRET=1.

    fp64 goes to the twin, which is exact; DS_REMOE_KERNELS=torch takes the twins everywhere.
    """
    if tensor.dtype == torch.float64 or tensor.numel() == 0 or not kernels_wanted():
        return False
    return (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _has_triton()


def on_its_device(launch: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: run with the device of the first tensor argument as the current one, where Triton launches."""

    @functools.wraps(launch)
    def launched(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.cuda.device_of(next(argument for argument in args if isinstance(argument, Tensor))):
            return launch(*args, **kwargs)

    return launched


@functools.cache
def kernels_wanted() -> bool:
    """False where DS_REMOE_KERNELS=torch asks for the plain-torch twins.

    Raises:
        ValueError: DS_REMOE_KERNELS is something else than "auto" or "torch".
    """
    choice = os.environ.get("DS_REMOE_KERNELS", "auto")
    if choice not in ("auto", "torch"):
        raise ValueError(f"DS_REMOE_KERNELS = {choice!r}: must be 'auto' or 'torch'")
    return choice == "auto"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
