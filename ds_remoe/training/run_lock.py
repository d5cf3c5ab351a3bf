"""One run at a time in a run's folder."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from ds_remoe.training.manifest import CheckpointError
from ds_remoe.training.stop_mark import clear_stop_mark


def lock_folder(folder: Path) -> FileLock:
    """Keep a run's folder to one run at a time, for as long as the result lives.

    Raises:
        CheckpointError: another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"remoe.train.output_dir = {folder}: another run is using it; wait for its end, end its processes, or give "
            "this run another folder"
        ) from None
    clear_stop_mark(folder)
    return lock
