"""Ends a rank that cannot end itself: one that is stopped, or whose main thread never gives Python's lock away.

A child process of the rank, started as `python -I -S reaper.py HANG_TIMEOUT NAME` with a pipe from the rank as stdin.
Each line on the pipe is a sign of life and the seconds that may pass to the next one; its end is that of the rank. Only
the standard library is imported, so it costs a rank about 10 MB and no time.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import time
from collections.abc import Sequence

LATER = 1.25
"""The other ranks go first, as they can say more."""
_SLICE_SECONDS = 0.5


def watch(hang_timeout: float, name: str) -> None:
    """Wait for the rank's end; kill it after LATER times the silence that it asked for.

    A rank that SIGSTOP has stopped gets no more than LATER times `hang_timeout`, wherever it is. Time in which this
    process was stopped, too, as when a scheduler suspends the whole job, does not count.
    """
    rank = os.getppid()
    silent, limit, last = 0.0, math.inf, time.monotonic()
    while True:
        ready, _, _ = select.select([0], [], [], _SLICE_SECONDS)
        now = time.monotonic()
        silent, last = silent + min(now - last, 2 * _SLICE_SECONDS), now
        if ready:
            lines = os.read(0, 1 << 16).split()
            if not lines:
                return
            silent, limit = 0.0, float(lines[-1])
        if os.getppid() != rank:  # it ended, and something that it forked keeps the pipe
            return
        is_stopped = silent >= LATER * hang_timeout and _state(rank) == "T"
        if silent >= LATER * limit or is_stopped:
            why = "it is stopped" if _state(rank) == "T" else "its main thread is stuck in a call"
            print(f"{name}: no sign of life for {silent:.0f} s, {why}; killed", file=sys.stderr, flush=True)
            os.kill(rank, signal.SIGKILL)
            return


def _state(pid: int) -> str:
    """The process's state letter; empty where there is no /proc."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def main(arguments: Sequence[str]) -> None:
    """Watch the parent process."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # a launcher sends them to all; a rank that saves is to be watched still
    timeout, name = arguments
    watch(float(timeout), name)


if __name__ == "__main__":
    main(sys.argv[1:])
