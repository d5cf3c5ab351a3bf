"""The literal tables of DeepSpeed's keys against the installed package."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from ds_remoe.config import deepspeed_keys as keys
from ds_remoe.config import load_run


class RecordingDict(dict[str, Any]):
    """A dict that remembers which keys were asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return _RecordingKeys(self)


class _RecordingKeys:
    def __init__(self, owner: RecordingDict) -> None:
        self.owner = owner

    def __contains__(self, key: object) -> bool:
        return key in self.owner

    def __iter__(self) -> Iterator[str]:
        return iter(dict.keys(self.owner))


def test_release() -> None:
    assert f"DeepSpeed {version('deepspeed')}" == keys.RELEASE


def test_top_level_keys_are_those_that_deepspeed_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime import config

    given = RecordingDict({"train_batch_size": 8})
    # DeepSpeed reads from a shallow copy, which would remember for itself.
    monkeypatch.setattr(config.copy, "copy", lambda value: value)
    config.DeepSpeedConfig(given)
    # Read by deepspeed.initialize rather than by DeepSpeedConfig.
    sequence_parallel = {"sequence_parallel_size", "data_parallel_size"}
    assert given.asked | sequence_parallel == set(keys.TOP_LEVEL) | set(keys.REFUSED) | set(keys.REMOVED)


def test_removed_keys_are_those_that_deepspeed_refuses() -> None:
    from deepspeed.runtime import config

    assert set(keys.REMOVED) == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(config._REMOVED_ZERO_CONFIG_KEYS) <= set(keys.ZERO_REFUSED)


def _pydantic_sections() -> list[tuple[str, set[str]]]:
    return [
        ("deepspeed.runtime.zero.config.DeepSpeedZeroConfig", {*keys.ZERO, *keys.ZERO_REFUSED}),
        (
            "deepspeed.runtime.zero.offload_config.DeepSpeedZeroOffloadOptimizerConfig",
            {*keys.OFFLOAD_OPTIMIZER, *keys.OFFLOAD_OPTIMIZER_REFUSED},
        ),
        ("deepspeed.runtime.precision_config.DeepSpeedBF16Config", set(keys.BF16)),
        ("deepspeed.runtime.precision_config.DeepSpeedFP16Config", set(keys.FP16)),
        ("deepspeed.monitor.config.TensorBoardConfig", set(keys.MONITORS["tensorboard"])),
        ("deepspeed.monitor.config.WandbConfig", set(keys.MONITORS["wandb"])),
        ("deepspeed.monitor.config.CSVConfig", set(keys.MONITORS["csv_monitor"])),
        ("deepspeed.monitor.config.CometConfig", set(keys.MONITORS["comet"])),
        ("deepspeed.comm.config.CommsLoggerConfig", set(keys.MONITORS["comms_logger"])),
    ]


@pytest.mark.parametrize(("path", "table"), _pydantic_sections(), ids=lambda value: str(value).rsplit(".", 1)[-1][:40])
def test_section_keys(path: str, table: set[str]) -> None:
    module, name = path.rsplit(".", 1)
    model: type[BaseModel] = getattr(__import__(module, fromlist=[name]), name)
    fields = {field.alias or key for key, field in model.model_fields.items()}
    if name == "DeepSpeedZeroConfig":
        from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS

        fields |= set(_REMOVED_ZERO_CONFIG_KEYS)
    assert table == fields


def test_schedules() -> None:
    from deepspeed.runtime import lr_schedules

    assert set(keys.SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)
    for name, table in keys.SCHEDULERS.items():
        signature = inspect.signature(getattr(lr_schedules, name))
        parameters = {
            key: parameter
            for key, parameter in signature.parameters.items()
            if key not in ("optimizer", "last_batch_iteration")
        }
        assert set(table) == set(parameters), name
        required = {key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
        assert set(keys.SCHEDULER_REQUIRED.get(name, ())) == required, name


def test_optimizer_parameters() -> None:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    popped_by_the_engine = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
    for optimizer, table in (
        (torch.optim.AdamW, keys.optimizer_params(torch_adam=True, offload=False)),
        (torch.optim.Adam, keys.optimizer_params(torch_adam=True, offload=True)),
        (FusedAdam, keys.optimizer_params(torch_adam=False, offload=False)),
        (DeepSpeedCPUAdam, keys.optimizer_params(torch_adam=False, offload=True)),
    ):
        assert set(table) - popped_by_the_engine <= set(inspect.signature(optimizer).parameters), optimizer


def test_defaults_that_the_checks_rely_on() -> None:
    from deepspeed.runtime import constants, lr_schedules

    from ds_remoe.config import checks_engine, checks_scheduler

    assert checks_engine._GRADIENT_CLIPPING_DEFAULT == constants.GRADIENT_CLIPPING_DEFAULT
    for name in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        parameters = inspect.signature(getattr(lr_schedules, name)).parameters
        assert parameters["warmup_num_steps"].default == checks_scheduler._WARMUP_NUM_STEPS_DEFAULT
    for kind, name, default in (
        (lr_schedules.WarmupDecayLR, "warmup_max_lr", 0.001),
        (lr_schedules.LRRangeTest, "lr_range_test_min_lr", 0.001),
        (lr_schedules.OneCycle, "cycle_momentum", True),
    ):
        assert inspect.signature(kind).parameters[name].default == default


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json")), ids=lambda p: p.stem
)
def test_deepspeed_reads_the_shipped_files(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    run = load_run(path, ["train_batch_size=8", "train_batch_size=null"], world_size=None)
    engine = DeepSpeedConfig(run.deepspeed)
    assert engine.zero_optimization_stage == run.deepspeed["zero_optimization"]["stage"]
    assert engine.gradient_clipping == 1.0
    assert engine.train_micro_batch_size_per_gpu == run.batch_sizes(1).micro_batch
    assert engine.scheduler_params["total_num_steps"] == run.remoe.train.steps
