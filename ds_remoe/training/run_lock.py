"""One run at a time in a run's folder."""

from __future__ import annotations

import errno
from pathlib import Path

from filelock import FileLock, Timeout

from ds_remoe.training.manifest import CheckpointError
from ds_remoe.training.stop_mark import clear_stop_mark

_LASTING = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
}
"""What stays until somebody mends it; a full disk or a file server may come back, and a supervisor tries again."""


def lock_folder(folder: Path) -> FileLock:
    """Keep a run's folder to one run at a time, for as long as the result lives.

    Raises:
        CheckpointError: another run has it, or it cannot be made or written.
        OSError: the file system does not answer as it should, or is full, which may pass.
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
        if isinstance(error, OSError) and error.errno not in _LASTING:
            raise
        raise CheckpointError(
            f"remoe.train.output_dir = {folder}: cannot be used ({error}); mend that, or give this run another folder"
        ) from error
    return lock
