"""Notices MoE layers and experts that no token reaches any more, and those that come back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds_remoe.analysis.layers import name_experts, next_idle_steps
from ds_remoe.moe.statistics import RoutingReport

WATCH_KEY = "ds_remoe_routing_watch"
"""The watch's place in a checkpoint's client state."""


class RoutingWatch:
    """Tells once that an expert or a whole layer is dead, and once that it is not any more.

    The L1 regulariser can close a layer wholly while the overall sparsity is on its target (thu-ml/ReMoE issue 6); the
    residual path carries the tokens then, and training goes on.

    Args:
        dead_after: applied steps in a row without a token from which an expert is dead; a layer is, if all of its are.
    """

    def __init__(self, dead_after: int) -> None:
        self.dead_after = dead_after
        self._idle_LE: NDArray[np.int64] = np.zeros((0, 0), dtype=np.int64)
        self._dead_LE: NDArray[np.bool_] = np.zeros((0, 0), dtype=np.bool_)

    def update(self, report: RoutingReport, step: int) -> list[str]:
        """Take in the routing of an applied step.

        Args:
            report: of all MoE layers, which have the same number of experts.
            step: optimizer steps done, for the messages.

        Returns:
            What is to be told, mostly nothing.
        """
        active_LE = np.array([layer.active for layer in report.layers], dtype=np.int64)
        idle_LE = self._idle_LE if self._idle_LE.size else np.zeros_like(active_LE)
        dead_LE = self._dead_LE if self._dead_LE.size else np.zeros(active_LE.shape, dtype=np.bool_)
        self._idle_LE = next_idle_steps(idle_LE, active_LE)
        back_LE = dead_LE & (self._idle_LE == 0)
        self._dead_LE = (dead_LE & ~back_LE) | (self._idle_LE >= self.dead_after)
        gone_LE = self._dead_LE & ~dead_LE
        # The last expert of a layer to go takes the layer with it.
        gone_LE[gone_LE.any(axis=1) & self._dead_LE.all(axis=1)] = True
        told = [
            f"step {step}: no token has reached {name} for {self.dead_after} steps or more; training goes on"
            for name in name_experts(gone_LE)
        ]
        back = f"again, after up to {int(idle_LE[back_LE].max(initial=0))} steps without"
        return told + [f"step {step}: tokens reach {name} {back}" for name in name_experts(back_LE)]

    @property
    def dead_layers(self) -> int:
        """Layers that are dead."""
        return int(self._dead_LE.all(axis=1).sum()) if self._dead_LE.size else 0

    @property
    def dead_experts(self) -> int:
        """Experts that are dead, those of dead layers included."""
        return int(self._dead_LE.sum())

    def state_dict(self) -> dict[str, Any]:
        """Idle steps of each expert, and which are dead, as lists."""
        return {"idle_steps": self._idle_LE.tolist(), "dead": self._dead_LE.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._idle_LE = np.array(state["idle_steps"] or [[]], dtype=np.int64)
        self._dead_LE = np.array(state["dead"] or [[]], dtype=np.bool_)
