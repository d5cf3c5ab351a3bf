"""Which implementation of the grouped SwiGLU serves a GPU: Triton's kernels, or torch's grouped_mm by wish.

DS_REMOE_GROUPED=triton (default) or grouped_mm decides, not a measurement while training: the two sum in different
orders, so a choice by timing could differ between ranks, or after a resume, and with it the losses. `ds-remoe bench
kernels` measures both on a device.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from ds_remoe.kernels.pair_groups import PairGroups

CHOICES = ("triton", "grouped_mm")


def forward(
    rows: Tensor, groups: PairGroups, gate_up: Tensor, down: Tensor, out: Tensor, accumulate: bool = False
) -> Tensor:
    """See ds_remoe.kernels.grouped_swiglu.forward.

    Raises:
        ValueError: DS_REMOE_GROUPED is none of the choices, or asks for grouped_mm where that cannot run.
    """
    pre_activation: Tensor = _chosen(rows, gate_up).forward(rows, groups, gate_up, down, out, accumulate)
    return pre_activation


def up_projection(rows: Tensor, groups: PairGroups, gate_up: Tensor) -> Tensor:
    """See ds_remoe.kernels.grouped_swiglu.up_projection.

    Raises:
        ValueError: as in `forward`.
    """
    pre_activation: Tensor = _chosen(rows, gate_up).up_projection(rows, groups, gate_up)
    return pre_activation


def backward(
    grad_out: Tensor,
    rows: Tensor,
    groups: PairGroups,
    gate_up: Tensor,
    down: Tensor,
    pre_activation: Tensor,
    grad_rows: Tensor,
    grad_gate_up: Tensor,
    grad_down: Tensor,
    accumulate_rows: bool = False,
    accumulate_weights: bool = False,
) -> Tensor:
    """See ds_remoe.kernels.grouped_swiglu.backward.

    Raises:
        ValueError: as in `forward`.
    """
    grad_weights_M: Tensor = _chosen(rows, gate_up).backward(
        grad_out,
        rows,
        groups,
        gate_up,
        down,
        pre_activation,
        grad_rows,
        grad_gate_up,
        grad_down,
        accumulate_rows,
        accumulate_weights,
    )
    return grad_weights_M


def _chosen(rows: Tensor, gate_up: Tensor) -> ModuleType:
    module = _module(os.environ.get("DS_REMOE_GROUPED", "triton"))
    reason = module.why_not(rows, gate_up) if hasattr(module, "why_not") else None
    if reason:
        raise ValueError(f"DS_REMOE_GROUPED = 'grouped_mm': {reason}; unset it for the Triton kernels")
    return module


@functools.cache
def _module(choice: str) -> ModuleType:
    if choice not in CHOICES:
        raise ValueError(f"DS_REMOE_GROUPED = {choice!r}: must be 'triton' or 'grouped_mm'")
    if choice == "grouped_mm":
        from ds_remoe.kernels import grouped_swiglu_grouped_mm

        return grouped_swiglu_grouped_mm
    from ds_remoe.kernels import grouped_swiglu_triton

    return grouped_swiglu_triton
