"""`ds-remoe supervise`."""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds_remoe.config import load_run
from ds_remoe.config.folders import is_folder, nearest_existing

if TYPE_CHECKING:
    from ds_remoe.commands.arguments import Commands
    from ds_remoe.launching.hosts import Host
    from ds_remoe.launching.supervisor import Progress

_TAIL_BYTES = 1 << 20


def add_supervise(commands: Commands) -> None:
    """Parser of `ds-remoe supervise`."""
    description = (
        "Run a launcher's command and restart it from the last good checkpoint when it fails. Stops at exit code 2 "
        "(configuration), and at a failure that repeats at the same step. SIGTERM and SIGINT make all ranks save; exit "
        "code 0 then. No process is left when the supervisor itself is killed. launch/train.sh and launch/multinode.sh "
        "run so by themselves, with --max-restarts 0. Linux only."
    )
    parser = commands.add_parser("supervise", help="restart a run when it fails", description=description)
    parser.add_argument("--max-restarts", type=int, default=10, metavar="N", help="in all (default: 10)")
    parser.add_argument(
        "--backoff",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds before a restart, doubled while the run gets no further, up to 600 (default: 10)",
    )
    parser.add_argument(
        "--grace", type=float, default=120.0, metavar="S", help="seconds that ranks get to save (default: 120)"
    )
    parser.add_argument(
        "--run-dir", metavar="DIR", help="remoe.train.output_dir; by default that of the command's --config and --set"
    )
    parser.add_argument(
        "command",
        nargs="+",
        metavar="COMMAND",
        help="after --, for example: -- bash launch/train.sh 2 --config FILE; ranks of other nodes are found through "
        "its --hostfile, unless it has --no_ssh",
    )
    parser.set_defaults(run=supervise)


def supervise(arguments: argparse.Namespace) -> int:
    """Run the command until it is done."""
    from ds_remoe.launching.hosts import HostfileError
    from ds_remoe.launching.supervisor import CommandError, Policy, Supervisor
    from ds_remoe.training.manifest import CheckpointError
    from ds_remoe.training.run_files import refuse_misplaced

    problem = _problem(arguments)
    if problem:
        print(f"supervise: {problem}", file=sys.stderr)
        return 2
    command: list[str] = arguments.command
    folder = _run_folder(arguments.run_dir, command)
    policy = Policy(arguments.max_restarts, arguments.backoff, arguments.grace)
    try:
        refuse_misplaced(folder)
        return Supervisor(command, policy, lambda: look(folder), _other_nodes(command)).run()
    except (CheckpointError, HostfileError, CommandError) as error:
        print(f"supervise: {error}", file=sys.stderr)
        return 2


def look(folder: Path) -> Progress:
    """How far the run of this folder has come."""
    from ds_remoe.launching.supervisor import Progress
    from ds_remoe.training.checkpoint_folder import CheckpointFolder
    from ds_remoe.training.manifest import TAG, CheckpointError
    from ds_remoe.training.stop_mark import stopped_by

    try:
        latest = CheckpointFolder(folder / "checkpoints").latest()
    except CheckpointError:  # the next attempt says what is wrong with it
        latest = None
    tag = TAG.fullmatch(latest.name) if latest else None
    files = (folder / ".lock", folder / "metrics.jsonl")
    stats = [path.stat() for path in files if path.exists()]
    mark = tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
    return Progress(_last_step(folder / "metrics.jsonl"), int(tag[1]) if tag else None, mark, stopped_by(folder))


def _last_step(metrics: Path) -> int:
    """Step of the last whole line, read from the file's end, as a long run's has millions of lines."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
        whole = file.read().rpartition(b"\n")[0]
    steps: list[bytes] = re.findall(rb'^\{"step": (\d+),', whole, re.MULTILINE)
    return int(steps[-1]) if steps else 0


def _problem(arguments: argparse.Namespace) -> str | None:
    if not sys.platform.startswith("linux"):
        return f"needs Linux (/proc, pidfd), and this is {sys.platform}"
    for name in ("max_restarts", "backoff", "grace"):
        if not getattr(arguments, name) >= 0:
            return f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 0"
    if arguments.run_dir is None and not _values(arguments.command, "--config"):
        return "the command has no --config FILE, so --run-dir DIR must say where the run keeps its checkpoints"
    if arguments.run_dir is not None:
        existing = nearest_existing(Path(arguments.run_dir))
        if not is_folder(existing):
            return f"--run-dir {arguments.run_dir}: {existing} is not a folder; choose another path"
    if shutil.which(arguments.command[0]) is None:
        return f"COMMAND {arguments.command[0]!r}: cannot be run; give its path, or start a script with bash"
    resume = _values(arguments.command, "--resume")
    if arguments.max_restarts > 0 and resume and resume[-1] != "auto":
        return f"--resume {resume[-1]}: each restart would go back to it; leave it out, which continues by itself"
    return None


def _run_folder(given: str | None, command: Sequence[str]) -> Path:
    """ConfigError where the command's configuration is wrong, before anything is started."""
    if given is not None:
        return Path(given)
    return load_run(_values(command, "--config")[-1], _values(command, "--set"), world_size=None).remoe.output_dir


def _other_nodes(command: Sequence[str]) -> list[Host]:
    from ds_remoe.launching.hosts import read_hostfile

    hostfile = _values(command, "--hostfile") + _values(command, "-H")
    hosts = read_hostfile(Path(hostfile[-1])) if hostfile else []
    return [] if "--no_ssh" in command else hosts


def _values(command: Sequence[str], option: str) -> list[str]:
    """Of each `option VALUE` and `option=VALUE` in a command."""
    values = [value for name, value in itertools.pairwise(command) if name == option]
    return values + [text.removeprefix(f"{option}=") for text in command if text.startswith(f"{option}=")]
