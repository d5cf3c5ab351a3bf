"""Step records with known content for the tests of logging and analysis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ds_remoe.training.record import StepRecord

LAYERS, EXPERTS = 3, 8


def relu_record(step: int, sparsity: float = 0.875, **changes: Any) -> StepRecord:
    """A step of a ReLU-routed model whose numbers all differ and depend on the step."""
    coefficient = 1e-8 * 1.2 ** (step % 40)
    l1_loss = 0.3 + 1 / (step + 2)
    load = tuple(
        tuple((1 - sparsity) * (1 + 0.01 * (e - 3.5) + 0.001 * layer) for e in range(EXPERTS))
        for layer in range(LAYERS)
    )
    record = StepRecord(
        step=step,
        samples=16 * step,
        tokens=2048 * step,
        lm_loss=3 + 4 / math.sqrt(step),
        aux_loss=coefficient * l1_loss,
        l1_coefficient=coefficient,
        l1_loss=l1_loss,
        sparsity=sparsity,
        layer_sparsity=tuple(1 - sum(row) / EXPERTS for row in load),
        active_experts_per_token=sum(map(sum, load)) / LAYERS,
        expert_load=load,
        learning_rate=1e-3 / step,
        grad_norm=1 / 3 + step,
        tokens_per_second=20_000.0 + step,
        tflops_per_device=0.031,
        mfu=None,
        step_seconds=0.1,
        valid_loss=3.5 - step / 1000 if step % 100 == 0 else None,
    )
    return replace(record, **changes)


def dense_record(step: int) -> StepRecord:
    """A step of a dense model, which has no routing."""
    return replace(
        relu_record(step),
        aux_loss=0.0,
        l1_coefficient=None,
        l1_loss=None,
        sparsity=None,
        layer_sparsity=(),
        active_experts_per_token=None,
        expert_load=(),
    )


def relu_run(sparsities: Sequence[float], **changes: Any) -> list[StepRecord]:
    """Records of the steps 1, 2, 3, ... with these sparsities."""
    return [relu_record(step, sparsity, **changes) for step, sparsity in enumerate(sparsities, start=1)]


def three_stages() -> list[float]:
    """Sparsities of 300 steps: dense to step 60, rising to step 100, then 0.875 with small fluctuations."""
    dense = [0.5, *(0.05 for _ in range(59))]
    rising = [0.5 + 0.36 * index / 40 for index in range(40)]
    settled = [0.875 + 0.004 * math.sin(index) for index in range(200)]
    return dense + rising + settled
