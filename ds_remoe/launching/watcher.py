"""Outlives a supervisor that was killed, and ends its run.

`python -m ds_remoe.launching.watcher TOKEN FD GRACE [HOST ...]`, where FD is the reading end of a pipe whose other end
the supervisor alone holds. A byte on it is the supervisor's farewell; its end without one means that the supervisor is
gone, SIGKILL included.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from ds_remoe.launching.hosts import Host, run_on_all
from ds_remoe.launching.processes import end

FAREWELL = b"."
_LAUNCHER_SECONDS = 5.0
"""In which a launcher notices that the ranks on the other nodes have ended."""


class Watcher:
    """A watching process, from the supervisor's side; it is started anew where somebody ended it.

    Args:
        token: of the run.
        grace_seconds: that the ranks get for a last checkpoint when the supervisor has died.
        hosts: other nodes of the run.
    """

    def __init__(self, token: str, grace_seconds: float, hosts: Sequence[Host]) -> None:
        self._arguments = [str(grace_seconds), *(host.name for host in hosts if host.name is not None)]
        self._token = token
        self._start()

    def ensure(self) -> None:
        """Start another one if it is gone."""
        if self._process.poll() is not None:
            os.close(self._pipe)
            self._start()

    def dismiss(self) -> None:
        """The run has ended; let it go."""
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            os.write(self._pipe, FAREWELL)
        os.close(self._pipe)
        self._process.wait()

    def _start(self) -> None:
        reading, self._pipe = os.pipe()
        command = [sys.executable, "-m", "ds_remoe.launching.watcher", self._token, str(reading), *self._arguments]
        # A session of its own: what is sent to the supervisor's process group does not reach it.
        self._process = subprocess.Popen(
            command, pass_fds=(reading,), start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(reading)


def end_everywhere(token: str, grace_seconds: float, hosts: Sequence[Host]) -> int:
    """End what is left of a run, on other nodes first, as ranks there cannot print once the launcher here is gone.

    Args:
        token: of the run.
        grace_seconds: that ranks get to save.
        hosts: other nodes of the run; one that ssh does not reach is named on stderr.

    Returns:
        The ranks that were alive.
    """
    ranks = 0
    if hosts:
        arguments = [[token, str(grace_seconds)]] * len(hosts)
        answers = run_on_all(hosts, "ds_remoe.launching.processes", arguments, timeout=grace_seconds + 60)
        for host, answer in zip(hosts, answers, strict=True):
            if answer.code == 0:
                ranks += int(answer.output)
            else:
                print(f"supervise: cannot end what is left of the run on {host}: {answer.reason}", file=sys.stderr)
    return ranks + end(token, min(grace_seconds, _LAUNCHER_SECONDS) if hosts else grace_seconds)


def main(arguments: Sequence[str]) -> None:
    """Wait for the supervisor's end, and end its run unless it said farewell."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # a service manager sends them to all; the supervisor decides
    token, descriptor, grace, *names = arguments
    if os.read(int(descriptor), 1) != FAREWELL:
        end_everywhere(token, float(grace), [Host(name, 1) for name in names])


if __name__ == "__main__":
    main(sys.argv[1:])
