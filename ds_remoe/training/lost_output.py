"""Output that goes nowhere ends no run: a terminal that closed, ssh or pdsh that was killed, a log's full disk.

Nor does a character that the output's encoding has not.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

_GOES_NOWHERE = (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""Of a pipe and a terminal without a reader; of a file without room."""


class LastingOutput(io.FileIO):
    """A file descriptor for writing, which turns to /dev/null when its reader is gone or its disk is full."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: Any, /) -> int:
        """As FileIO's."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GOES_NOWHERE:
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        return super().write(data)


def outlast_readers() -> None:
    """Make this process's stdout and stderr go on where they cannot be written, so that a rank trains on and saves."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream: TextIO) -> TextIO:
    stream.flush()
    output = io.BufferedWriter(LastingOutput(stream.fileno()))
    return io.TextIOWrapper(output, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)
