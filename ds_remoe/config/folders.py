"""Whether a folder that a run writes to can be made and written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
"""Why a path cannot be looked at, for good; other errors are a file server's, and may pass."""


def look_at(path: Path, *, follow: bool = True) -> os.stat_result | None:
    """What lies at a path; None if nothing does, as far as this process can see.

    Raises:
        OSError: the file system does not answer as it should.
    """
    try:
        return os.stat(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    except ValueError:  # no file system has such a name
        return None


def nearest_existing(path: Path) -> Path:
    """The path, absolute, or the nearest of the folders above it where something lies, be it a link to nowhere."""
    return next(one for one in [path.absolute(), *path.absolute().parents] if look_at(one, follow=False))


def is_folder(path: Path) -> bool:
    """Whether a folder, or a link to one, lies there."""
    found = look_at(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: Path) -> bool:
    """Whether a file, or a link to one, lies there."""
    found = look_at(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def why_unusable(folder: str) -> str | None:
    """Why a folder can be neither written nor made, as far as that can be told without making it."""
    if "\0" in folder:
        return "holds a NUL character, which no path has; choose another path"
    path = Path(folder).absolute()
    existing = nearest_existing(path)
    if not is_folder(existing):
        return f"{existing} is not a folder; choose another path"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable; choose another path or change its rights"
    for missing in (path, *(existing / name for name in path.relative_to(existing).parts)):
        try:
            os.lstat(missing)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return "it, or a name in it, is too long for the file system; choose another path"
    return None
