"""Whether a folder that a run writes to can be made and written."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def why_unusable(folder: str) -> str | None:
    """Why a folder can be neither written nor made, as far as that can be told without making it."""
    if "\0" in folder:
        return "holds a NUL character, which no path has; choose another path"
    path = Path(folder).absolute()
    existing = next(one for one in [path, *path.parents] if os.path.lexists(one))
    if not os.path.isdir(existing):
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
