"""Output that nobody reads any more ends no run: a terminal that closed, ssh or pdsh that was killed."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

_READER_IS_GONE = (errno.EPIPE, errno.EIO)
"""Of a pipe, and of a terminal."""


class LastingOutput(io.FileIO):
    """A file descriptor for writing, which turns to /dev/null when its reader is gone."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: Any, /) -> int:
        """As FileIO's."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _READER_IS_GONE:
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        return super().write(data)


def outlast_readers() -> None:
    """Make this process's stdout and stderr go on where their reader ends, so that a rank trains on and can save."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream: TextIO) -> TextIO:
    stream.flush()
    output = io.BufferedWriter(LastingOutput(stream.fileno()))
    return io.TextIOWrapper(output, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
