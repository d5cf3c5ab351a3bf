"""Nodes of a hostfile, and a Python module run on each of them through ssh."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_SSH_FAILED = 255
_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")


class HostfileError(ValueError):
    """A hostfile cannot be read; the message names the line and what would be right."""


@dataclass(frozen=True)
class Host:
    """A node: the name by which ssh reaches it (None: this machine, without ssh) and its number of ranks."""

    name: str | None
    slots: int

    def __str__(self) -> str:
        return self.name or "this machine"


@dataclass(frozen=True)
class Answer:
    """What a command on a node said.

    Attributes:
        code: its exit code; None where it did not end in time.
        output, errors: its stdout and stderr.
        reached: false where ssh did not come through.
    """

    code: int | None
    output: str
    errors: str
    reached: bool

    @property
    def reason(self) -> str:
        """The last line of its errors, for messages."""
        lines = self.errors.strip().splitlines()
        return lines[-1] if lines else f"exit code {self.code}"


def read_hostfile(path: Path) -> list[Host]:
    """The nodes of a hostfile as DeepSpeed reads it: `name slots=n` a line; blank lines and comments are left out.

    Raises:
        HostfileError: it cannot be read, holds none, or a line is not of this form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HostfileError(f"--hostfile {path}: cannot be read: {error}") from None
    hosts: dict[str, Host] = {}
    for number, text in enumerate(lines, start=1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or int(match[2]) < 1:
            raise HostfileError(f"{path}, line {number}: {line!r}: must be `name slots=n` with n at least 1")
        if match[1] in hosts:
            raise HostfileError(f"{path}, line {number}: {match[1]} stands twice; give it one line with all its slots")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise HostfileError(f"--hostfile {path}: names no node; launch/hostfile.example shows how")
    return list(hosts.values())


def run_module(
    host: Host,
    module: str,
    arguments: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout: float = 60,
) -> Answer:
    """Run `python -m module` on a node, in this working directory and by this interpreter's path, and wait for it.

    What lies in the working directory counts as modules there only if it does here.
    """
    variables = {} if {"", str(Path.cwd())} & set(sys.path) else {"PYTHONSAFEPATH": "1"}
    command = ["env", *(f"{key}={value}" for key, value in {**variables, **(environment or {})}.items())]
    command += [sys.executable, "-m", module, *arguments]
    if host.name is not None:
        remote = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
        command = [*SSH, host.name, remote]
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"no answer within {timeout:.0f} s", True)
    except OSError as error:
        return Answer(None, "", str(error), False)
    return Answer(done.returncode, done.stdout, done.stderr, host.name is None or done.returncode != _SSH_FAILED)


def run_on_all(
    hosts: Sequence[Host],
    module: str,
    arguments: Sequence[Sequence[str]],
    *,
    environment: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout: float = 60,
) -> list[Answer]:
    """`run_module` on all nodes at once, the i-th arguments on the i-th node; the answers in the nodes' order."""
    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        futures = [
            pool.submit(run_module, host, module, own, environment=environment, stdin=stdin, timeout=timeout)
            for host, own in zip(hosts, arguments, strict=True)
        ]
        return [future.result() for future in futures]
