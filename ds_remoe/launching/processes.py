"""The processes of a supervised run, found by a mark in their environment, however they were started and re-parented.

Process groups and parents do not do: DeepSpeed's launcher killed leaves its ranks to init, and ranks on other nodes are
children of sshd there. `python -m ds_remoe.launching.processes TOKEN GRACE` ends those of one machine; a supervisor
runs it on the others through ssh.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TOKEN_VARIABLE = "PYTHON_DS_REMOE_RUN"
"""Holds the run's token. DeepSpeed forwards PYTHON* to other nodes by itself, and nothing else that is ours to name."""

_PROC = Path("/proc")
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class MarkedProcess:
    """A living process that carries a token.

    Attributes:
        pid: of it.
        is_rank: whether a launcher started it as a rank; false of launchers, and of what a rank started.
    """

    pid: int
    is_rank: bool


def marked(token: str) -> list[MarkedProcess]:
    """The processes of this machine that carry `token`, by pid; zombies are none."""
    ranks: dict[int, str | None] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and (environment := _environment(int(entry.name))).get(TOKEN_VARIABLE) == token:
            ranks[int(entry.name)] = environment.get("RANK") if "LOCAL_RANK" in environment else None
    return [
        # What a rank starts (wandb's service, for one) inherits its RANK.
        MarkedProcess(pid, rank is not None and ranks.get(parent(pid)) != rank)
        for pid, rank in sorted(ranks.items())
    ]


def ask_ranks_to_stop(token: str, asked: set[int]) -> int:
    """SIGTERM to the ranks of this machine, so that they save and end.

    Not to the launcher, which would give them 30 seconds and then end with code 1 however well they ended.

    Args:
        token: of the run.
        asked: pids of ranks that got the signal before and get it no more; those that get it now are added.

    Returns:
        The ranks that got it now.
    """
    new = [process.pid for process in marked(token) if process.is_rank and process.pid not in asked]
    sent = [pid for pid in new if _send(pid, token, signal.SIGTERM)]
    asked.update(sent)
    return len(sent)


def end(token: str, grace_seconds: float) -> int:
    """End what is left of a run on this machine: SIGTERM to ranks, that they may save, and SIGKILL after the grace.

    Returns:
        The ranks that were still alive when it began.
    """
    asked = set[int]()
    ranks = ask_ranks_to_stop(token, asked)
    deadline = time.monotonic() + grace_seconds
    while (left := marked(token)) and time.monotonic() < deadline:
        ask_ranks_to_stop(token, asked)  # those, too, that a launcher has started meanwhile
        time.sleep(_POLL_SECONDS)
    while left:  # again and again, as a process that is being killed may have just started another
        for process in left:
            _send(process.pid, token, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
        left = marked(token)
    return ranks


def _send(pid: int, token: str, signum: signal.Signals) -> bool:
    """A signal to the process if it still is the one with the token: the descriptor outlasts a reuse of the pid."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if _environment(pid).get(TOKEN_VARIABLE) != token:
            return False
        signal.pidfd_send_signal(descriptor, signum)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def _environment(pid: int) -> dict[str, str]:
    try:
        raw = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:  # it ended, or is another user's
        return {}
    return dict(text.split("=", 1) for text in raw.decode(errors="replace").split("\0") if "=" in text)


def parent(pid: int) -> int:
    """The pid of the process's parent; 0 where there is no such process."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything


def command_line(pid: int) -> list[str]:
    """The process's arguments, its program first; empty where there is no such process."""
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return raw.decode(errors="replace").split("\0")[:-1]


if __name__ == "__main__":
    print(end(sys.argv[1], float(sys.argv[2])))
