"""The end of a process that was in a process group, without the interpreter's own shutdown."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

_FAILED, _KILLED_BY_SIGINT = 1, 128 + signal.SIGINT


def run_and_exit(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end the process with the exit code it returns (None: 0), as `sys.exit(main())` would.

    Where torch was imported Python's shutdown is left out: threads are joined, exit handlers run, the standard streams
    flushed, and that is all; a file left open keeps what it buffers to itself. gloo's threads may still hold the last
    collectives' tensors, also after `destroy_process_group` where anyone keeps a group (as DeepSpeed does), and one
    that lets go of them during that shutdown aborts the process: "terminate called without an active exception", exit
    code -6 after a run that ended well (pytorch/pytorch issue 190489).
    """
    try:
        code = main() or 0
    except SystemExit as stop:
        code = _code_of(stop)
    except BaseException as error:
        if "torch" not in sys.modules:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        code = _KILLED_BY_SIGINT if isinstance(error, KeyboardInterrupt) else _FAILED
    if "torch" not in sys.modules:
        sys.exit(code)
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # as a process of multiprocessing ends
        atexit._run_exitfuncs()
        code = code if _flushed() else code or _FAILED
        if code == _KILLED_BY_SIGINT:  # a shell goes on with its script, unless the signal ended the command
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        os._exit(code & 0xFF)


def _code_of(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return _FAILED


def _flushed() -> bool:
    """Flush Python's standard streams and C's; False where what was to be said is lost."""
    done = True
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, ValueError):  # the reader is gone, or the disk is full
            done = False
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)
    return done
