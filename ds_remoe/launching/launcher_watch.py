"""Lets a rank see that DeepSpeed's launcher is gone.

Between a rank and its `deepspeed` command stands a launcher for each node. On a single node the command dies of SIGTERM
and leaves both behind; a launcher that is killed leaves its ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass

from ds_remoe.launching.processes import TOKEN_VARIABLE, command_line, parent

_RUNNERS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
"""Names of DeepSpeed's command, and of its module."""
_LAUNCHER = "deepspeed.launcher.launch"
_PERIOD_SECONDS = 0.2


@dataclass(frozen=True)
class _Ancestors:
    """Who started this rank.

    Attributes:
        launcher: pid of DeepSpeed's launcher of this node.
        runner: of the `deepspeed` command; None where it runs on another node.
    """

    launcher: int
    runner: int | None

    def missing(self) -> str | None:
        """Whoever of them is gone, for messages: a process whose parent ends gets another one at once."""
        if os.getppid() != self.launcher:
            return f"deepspeed's launcher (process {self.launcher})"
        if self.runner is not None and parent(self.launcher) != self.runner:
            return f"deepspeed (process {self.runner})"
        return None


def stop_without_launcher() -> None:
    """Send SIGTERM to this process, at which a rank saves and ends, once what launched it is gone.

    Does nothing where DeepSpeed's launcher did not start the process, or under `ds-remoe supervise`, which looks after
    the launcher itself and decides whether its end is the run's.
    """
    ancestors = _ancestors()
    if ancestors is not None and TOKEN_VARIABLE not in os.environ:
        threading.Thread(target=_watch, args=(ancestors,), name="launcher watch", daemon=True).start()


def _watch(ancestors: _Ancestors) -> None:
    while (missing := ancestors.missing()) is None:
        time.sleep(_PERIOD_SECONDS)
    if os.environ.get("LOCAL_RANK") == "0":
        with contextlib.suppress(OSError):  # nobody reads any more
            os.write(2, f"\n{missing} is gone: its ranks save and end, as at SIGTERM\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)


def _ancestors() -> _Ancestors | None:
    launcher = os.getppid()
    if _LAUNCHER not in command_line(launcher):
        return None
    runner = parent(launcher)
    # Through ssh it is a shell's or sshd's, whose end may be that of a connection alone.
    names = {os.path.basename(argument) for argument in command_line(runner)[:3]}
    return _Ancestors(launcher, runner if names.intersection(_RUNNERS) else None)
