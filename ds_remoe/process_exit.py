"""The end of a process that was in a process group, without the interpreter's own shutdown."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

_FAILED = 1


def run_and_exit(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end the process with the exit code it returns (None: 0), as `sys.exit(main())` would.

    Threads are joined, exit handlers run and streams flushed; only Python's own shutdown is left out. gloo's threads
    may still hold the last collectives' tensors, also after `destroy_process_group` where anyone keeps a group (as
    DeepSpeed does), and one that lets go of them during that shutdown aborts the process: "terminate called without
    an active exception", exit code -6 after a run that ended well (pytorch/pytorch issue 190489).
    """
    try:
        code = main() or 0
    except SystemExit as stop:
        code = _code_of(stop)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else _FAILED
    threading._shutdown()  # type: ignore[attr-defined]  # as a process of multiprocessing ends
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or _FAILED  # the reader is gone or the disk is full: what was to be said is lost
    os._exit(code)


def _code_of(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return _FAILED
