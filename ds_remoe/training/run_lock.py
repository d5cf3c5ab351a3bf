"""One run at a time in a run's folder."""

from __future__ import annotations

import errno
from pathlib import Path

from filelock import FileLock, Timeout

from ds_remoe.training.manifest import CheckpointError
from ds_remoe.training.stop_mark import clear_stop_mark

_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""A file server's troubles, after which a supervisor starts the run again."""


def lock_folder(folder: Path) -> FileLock:
    """Keep a run's folder to one run at a time, for as long as the result lives.

    Raises:
        CheckpointError: another run has it, or it cannot be made or written.
        OSError: its file server does not answer as it should, which may pass.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
        clear_stop_mark(folder)
    except Timeout:
        raise CheckpointError(
            f"remoe.train.output_dir = {folder}: another run is using it; wait for its end, end its processes, or give "
            "this run another folder"
        ) from None
    except (OSError, ValueError) as error:  # a path with NUL is a ValueError
        if getattr(error, "errno", None) in _PASSING:
            raise
        raise CheckpointError(
            f"remoe.train.output_dir = {folder}: cannot be used ({error}); mend that, or give this run another folder"
        ) from error
    return lock
