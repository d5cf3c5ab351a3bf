"""What one optimizer step reports: the record that metrics.jsonl, W&B, the progress bar and the pictures share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RecordError(ValueError):
    """A text is not the JSON form of a StepRecord."""


@dataclass(frozen=True)
class StepRecord:
    """Everything one optimizer step reports, made global over all ranks before it stands here.

    `None` means that a value does not exist for this run or this step, never that it is zero. L counts MoE layers and E
    routed experts of a layer.
    """

    step: int
    """Optimizer steps done, this one included; the first step is 1."""
    samples: int
    """Sequences seen since the start of the run."""
    tokens: int
    """Tokens seen since the start of the run."""
    lm_loss: float
    """Mean cross-entropy of the step in nats per token."""
    aux_loss: float
    """What was added to the loss: λ·L_reg (router relu), the weighted Switch loss (topk), 0 (dense)."""
    l1_coefficient: float | None
    """λ used in this step, before its update (eq. 6, 7); None unless the router is relu."""
    l1_loss: float | None
    """L_reg without λ (eq. 9, 10); None unless the router is relu."""
    sparsity: float | None
    """S of eq. 8 over all layers; None for a dense model."""
    layer_sparsity: tuple[float, ...]
    """[L] sparsity of each MoE layer; empty for a dense model."""
    active_experts_per_token: float | None
    """Mean over layers and tokens; None for a dense model."""
    expert_load: tuple[tuple[float, ...], ...]
    """[L][E] share of the step's tokens that each expert saw; a row sums to that layer's active experts per token."""
    learning_rate: float
    """Learning rate of the first parameter group."""
    grad_norm: float | None
    """Global gradient norm before clipping; None where the engine does not tell it."""
    tokens_per_second: float
    """Global throughput of this step."""
    tflops_per_device: float
    """Model TFLOP/s of one device, counted with the measured number of active experts."""
    mfu: float | None
    """tflops_per_device over the device's peak; None where the peak is unknown."""
    step_seconds: float
    """Wall time of the step, without evaluation and checkpoints."""
    valid_loss: float | None
    """Mean cross-entropy on the held-out split after this step; None where there was no evaluation."""
    skipped: str | None = None
    """Why the step was not applied: "non_finite" (loss or gradient), "spike" (gradient norm) or "overflow" (fp16 loss
    scale); None where it was."""
    dead_layers: int | None = None
    """MoE layers that no token has reached for train.dead_after applied steps; None for a dense model."""
    dead_experts: int | None = None
    """The same of experts, those of dead layers included."""

    def to_json(self) -> str:
        """One line of standard JSON without the newline, `step` first.

        Floats are written with all their digits. JSON has no non-finite numbers, so these are the strings "NaN",
        "Infinity" and "-Infinity". `from_json` gives back exactly this record.
        """
        row = {field.name: json_value(getattr(self, field.name)) for field in fields(self)}
        return json.dumps(row, allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> StepRecord:
        """The record that `to_json` wrote. RecordError names the missing, unknown or ill-typed key."""
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:
            raise RecordError(f"not a JSON object: {error}: {_excerpt(line)}") from error
        if not isinstance(row, dict):
            raise RecordError(f"expected a JSON object, found {type(row).__name__}: {_excerpt(line)}")
        return cls.from_dict(row)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> StepRecord:
        """The record of a parsed line; keys and types must be those of `to_json`.

        A field with a default may be missing, as in the lines of a release that did not have it yet.
        """
        names = [field.name for field in fields(cls)]
        if missing := [field.name for field in fields(cls) if field.name not in row and field.default is MISSING]:
            raise RecordError(f"missing keys {missing} in a step record; was it written by another release?")
        if unknown := [name for name in row if name not in names]:
            raise RecordError(f"unknown keys {unknown} in a step record; was it written by another release?")
        decoded: dict[str, Any] = {}
        for field in fields(cls):
            if field.name not in row:
                continue
            try:
                decoded[field.name] = _DECODERS[str(field.type)](row[field.name])
            except (TypeError, ValueError) as error:
                raise RecordError(f"{field.name}: expected {field.type}, found {row[field.name]!r}") from error
        return cls(**decoded)


def json_value(value: Any) -> Any:
    """The value as standard JSON takes it: tuples as lists, non-finite floats as "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode_int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(value)
    return value


def _decode_float(value: Any) -> float:
    if isinstance(value, str):
        if value not in _NON_FINITE:
            raise ValueError(value)
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(value)
    return float(value)


def _decode_row(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise TypeError(value)
    return tuple(_decode_float(item) for item in value)


def _decode_table(value: Any) -> tuple[tuple[float, ...], ...]:
    if not isinstance(value, list):
        raise TypeError(value)
    return tuple(_decode_row(item) for item in value)


def _decode_optional(value: Any) -> float | None:
    return None if value is None else _decode_float(value)


def _decode_optional_int(value: Any) -> int | None:
    return None if value is None else _decode_int(value)


def _decode_optional_text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(value)
    return value


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": _decode_int,
    "int | None": _decode_optional_int,
    "str | None": _decode_optional_text,
    "float": _decode_float,
    "float | None": _decode_optional,
    "tuple[float, ...]": _decode_row,
    "tuple[tuple[float, ...], ...]": _decode_table,
}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"bare {name} is not JSON")


def _excerpt(line: str | bytes) -> str:
    return repr(line[:80])
