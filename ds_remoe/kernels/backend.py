"""Which of a kernel and its torch twin runs."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """True for tensors that the Triton kernels serve: on a CUDA device, or anywhere under TRITON_INTERPRET=1.

    fp64 goes to the twin, which is exact; DS_REMOE_KERNELS=torch takes the twins everywhere.
    """
    if tensor.dtype == torch.float64 or tensor.numel() == 0 or not kernels_wanted():
        return False
    return (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _has_triton()


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
