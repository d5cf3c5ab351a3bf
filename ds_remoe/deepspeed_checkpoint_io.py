"""DeepSpeed's checkpoint writer and reader, held so that a full disk hangs no rank and no file runs code.

Checked against DeepSpeed 0.19.8; whatever else touches its internals stands in `deepspeed_compat`. DeepSpeed is only
imported for a load, so that checkpoints can be examined without it.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch

PLAIN_CLASSES: Final = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes in the ZeRO optimizer's files besides tensors and builtins: holders of numbers, without code of their own."""


_GETATTR: Final = "builtins.getattr"


class UnsafeFileError(RuntimeError):
    """A file holds something else than tensors and plain values."""


def _enum_member(kind: Any, name: Any) -> Enum:
    """What getattr may do while a file is loaded: Python 3.11.2 pickles an enumeration's member as a call of it."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise UnsafeFileError(f"loading it would take the attribute {name!r} of {kind!r}")


def unsafe_globals(path: Path) -> list[str]:
    """The functions and classes that unpickling a file of `torch.save` would call, without those known to be harmless.

    Nothing is unpickled.

    Raises:
        UnsafeFileError: this cannot be told, as the file is not one of `torch.save`.
    """
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except OSError:
        raise
    except Exception as error:
        # Whatever the disassembler stumbles over, torch.save did not write it.
        raise UnsafeFileError(f"{path}: not a file of torch.save ({type(error).__name__}: {error})") from error
    return sorted(set(found) - {*PLAIN_CLASSES, _GETATTR})


def load_values(path: str | Path, map_location: Any = None, *, mmap: bool = False) -> Any:
    """`torch.load` of tensors, builtins and `PLAIN_CLASSES`; no code in the file is run.

    With `mmap` the tensors are mapped from the file, and read where they are used.

    Raises:
        UnsafeFileError: the file holds anything else; the message names it.
    """
    unsafe = unsafe_globals(Path(path))
    if unsafe:
        raise UnsafeFileError(f"{path}: loading it would run {', '.join(unsafe)}; it is refused")
    classes = []
    for name in PLAIN_CLASSES:
        module, _, attribute = name.rpartition(".")
        classes.append(getattr(import_module(module), attribute))
    try:
        with torch.serialization.safe_globals([*classes, (_enum_member, _GETATTR)]):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path}: {error}; it is refused") from error
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(f"{path}: refused: {str(error).splitlines()[-1]}") from error


@contextmanager
def loading_values_only(engine: Any) -> Iterator[None]:
    """Within it, `engine.load_checkpoint` reads every file with `load_values`.

    Experts' files are mapped, as their content is copied into the model; others may be kept by the optimizer.
    """
    reader = engine.checkpoint_engine
    reader.load = lambda path, map_location=None: load_values(path, map_location, mmap="_expert_" in Path(path).name)
    try:
        yield
    finally:
        del reader.load


@dataclass
class Writes:
    """What a rank wrote during a save.

    Attributes:
        files: in the order of writing.
        error: the first that a write ran into; nothing was written after it.
        failed_at: the file or folder that it was about.
        free_bytes: free space of the file system at that moment.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    error: BaseException | None = None
    failed_at: Path | None = None
    free_bytes: int = 0

    def attempt(self, path: Path, action: Callable[[], object]) -> None:
        """Do something about `path`, unless something failed before; an error is remembered, not raised.

        torch.save reports a full disk as RuntimeError, the system itself as OSError.
        """
        if self.error is not None:
            return
        try:
            action()
        except (OSError, RuntimeError) as error:
            self.error, self.failed_at = _cause(error), path
            self.free_bytes = shutil.disk_usage(self.folder).free

    def write(self, path: Path, action: Callable[[], object]) -> None:
        """`attempt` to write a file."""
        if self.error is None:
            self.files.append(path)
        self.attempt(path, action)


def _cause(error: BaseException) -> BaseException:
    """Where it began: torch's writer raises once more, saying less, as it closes a file that it could not write."""
    return error if error.__context__ is None else _cause(error.__context__)


def _enums_to_values(state: dict[str, Any]) -> None:
    """Put an enumeration's number in its place: Python 3.11.2 pickles a member as a call of getattr."""
    for key, value in state.items():
        if isinstance(value, Enum):
            state[key] = value.value
        elif isinstance(value, dict):
            _enums_to_values(value)


@contextmanager
def recording_writes(engine: Any, folder: Path) -> Iterator[Writes]:
    """Within it, `engine.save_checkpoint` returns on every rank, also where a write fails.

    DeepSpeed ends its save with a barrier, where the others would wait for a rank that had raised.

    Args:
        engine: of DeepSpeed, with the writer that `torch.save`s on the rank itself.
        folder: exists, on the file system that is written to.
    """
    writes, writer = Writes(folder), engine.checkpoint_engine
    save, makedirs, copy_script = writer.save, writer.makedirs, engine._copy_recovery_script

    def write(state_dict: dict[str, Any], path: str) -> None:
        _enums_to_values(state_dict)
        writes.write(Path(path), lambda: save(state_dict, path))

    writer.save = write
    writer.makedirs = lambda path, exist_ok=False: writes.attempt(Path(path), lambda: makedirs(path, exist_ok=exist_ok))
    engine._copy_recovery_script = lambda save_path: writes.attempt(Path(save_path), lambda: copy_script(save_path))
    try:
        yield writes
    finally:
        del writer.save, writer.makedirs, engine._copy_recovery_script
