"""Read a run's JSON file, apply overrides, check everything: the one way to a `RunConfig`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_remoe.config.batch import BatchSizes, derive_batch_sizes
from ds_remoe.config.checks import check_run
from ds_remoe.config.deepspeed_section import check_sections
from ds_remoe.config.json_text import RefusedJSONError, parse_json
from ds_remoe.config.leave import leave
from ds_remoe.config.overrides import OverrideError, apply_overrides
from ds_remoe.config.problems import MISSING, ConfigError, ConfigProblem
from ds_remoe.config.schema import ReMoEConfig
from ds_remoe.config.typed import parse_remoe


@dataclass(frozen=True)
class RunConfig:
    """A configuration that passed every check.

    Attributes:
        path: the file it was read from.
        deepspeed: the whole file after overrides, as plain data; `deepspeed.initialize(config=...)` takes it.
        remoe: the typed "remoe" section.
        overrides: the `path=value` texts that were applied.
    """

    path: Path
    deepspeed: dict[str, Any]
    remoe: ReMoEConfig
    overrides: tuple[str, ...] = ()

    def batch_sizes(self, world_size: int) -> BatchSizes:
        """The batch sizes on `world_size` ranks.

        Raises:
            ValueError: if they do not fit `world_size`, which `load_run` refuses for the one it was given.
        """
        sizes = derive_batch_sizes(self.deepspeed, world_size)
        if sizes is None or not sizes.fits(world_size):
            raise ValueError(f"{self.path}: the batch sizes do not fit {world_size} ranks")
        return sizes


def load_run(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None,
    accelerator: str | None = None,
) -> RunConfig:
    """Read and check a configuration.

    Args:
        path: the JSON file.
        overrides: `path=value` texts, see `apply_overrides`.
        world_size: ranks of the run; None leaves out what depends on it.
        accelerator: DeepSpeed's name of the device ("cpu", "cuda"); None leaves out what depends on it.

    Raises:
        ConfigError: with every problem that was found.
    """
    path = Path(path)
    source = str(path)
    try:
        config = apply_overrides(read_run_file(path), overrides)
    except OverrideError as error:
        raise ConfigError(source, [error.problem]) from None
    clean, problems = check_sections(config)
    remoe: ReMoEConfig | None = None
    if "remoe" in config:
        remoe, found = parse_remoe(config["remoe"])
        problems += found
    else:
        problems.append(ConfigProblem("remoe", MISSING, "required: the model, the MoE layers, data and training loop"))
    problems += check_run(clean, config, remoe, world_size=world_size, accelerator=accelerator)
    if problems or remoe is None:
        raise ConfigError(source, problems)
    return RunConfig(path, config, remoe, tuple(overrides))


def load_run_or_exit(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None,
    accelerator: str | None = None,
) -> RunConfig:
    """`load_run` for launched processes: every rank exits with code 2, and one says why on stderr."""
    try:
        return load_run(path, overrides, world_size=world_size, accelerator=accelerator)
    except ConfigError as error:
        leave(str(error))


def read_run_file(path: Path) -> dict[str, Any]:
    """The object in a run's file, its content not checked yet.

    Raises:
        ConfigError: the file cannot be read, or holds no such object.
    """
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except OSError as error:
        raise ConfigError(source, [ConfigProblem("file", source, f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        remedy = f"not UTF-8 at byte {error.start}; save it as UTF-8"
        raise ConfigError(source, [ConfigProblem("file", source, remedy)]) from None
    try:
        config = parse_json(text)
    except json.JSONDecodeError as error:
        remedy = f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise ConfigError(source, [ConfigProblem("file", source, remedy)]) from None
    except RefusedJSONError as error:
        raise ConfigError(source, [error.problem]) from None
    if not isinstance(config, dict):
        remedy = "the file must hold one object {...}"
        raise ConfigError(source, [ConfigProblem("file", source, remedy)])
    return config
