"""What the launcher tells a rank by environment variables, before any process group exists."""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path

COLLECTIVE_TIMEOUT = "DEEPSPEED_TIMEOUT"
_COLLECTIVE_TIMEOUT_MINUTES = "30"
HOSTFILE = "DS_REMOE_HOSTFILE"
"""Set by launch/multinode.sh, which forwards it to the ranks."""
_TASKS_OF_OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""The number of ranks by launchers that set no WORLD_SIZE."""
RANKS_PER_NODE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def ranks_per_node() -> int | None:
    """Ranks on this machine, as torchrun (LOCAL_WORLD_SIZE) or DeepSpeed's launcher (LOCAL_SIZE) says; None if neither.

    Raises:
        ValueError: the variable is no positive whole number.
    """
    for name in RANKS_PER_NODE:
        text = os.environ.get(name)
        if text is None:
            continue
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{name} = {text!r}: must be the number of ranks on this machine, at least 1")
        return int(text)
    return None


def launched_ranks() -> int:
    """Ranks of the run, as WORLD_SIZE says; 1 where no launcher has set it.

    Raises:
        ValueError: WORLD_SIZE, RANK, LOCAL_RANK or the ranks of this machine are no whole numbers, or RANK is none of
            the run's.
    """
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        text = os.environ.get(name, "1")
        if not text.isdecimal():
            raise ValueError(
                f"{name} = {text!r} (environment): must be a whole number; launchers set it, unset it here"
            )
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if rank >= world_size:
        raise ValueError(f"RANK = {rank} (environment): must be less than WORLD_SIZE = {world_size}")
    ranks_per_node()
    return world_size


def start_alone() -> None:
    """Be the one rank of a run where no launcher says otherwise, as with `python -m ds_remoe.train`."""
    if {"RANK", "WORLD_SIZE"} & os.environ.keys() or any(os.environ.get(n, "1") != "1" for n in _TASKS_OF_OTHERS):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in alone.items():
        os.environ.setdefault(name, value)


def collective_timeout() -> float:
    """Seconds after which torch gives up a collective: DEEPSPEED_TIMEOUT (minutes), by default 30 minutes.

    Raises:
        ValueError: the variable is no positive whole number; DeepSpeed reads none else.
    """
    text = os.environ.get(COLLECTIVE_TIMEOUT, _COLLECTIVE_TIMEOUT_MINUTES)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{COLLECTIVE_TIMEOUT} = {text!r}: must be a whole number of minutes, at least 1")
    return 60.0 * int(text)


def launch_command(world_size: int) -> str:
    """What starts a run like this one again from this working directory, without the trainer's arguments."""
    if ranks_per_node() in (None, world_size):
        return f"bash {_script('train.sh')} {world_size}"
    if "SLURM_JOB_ID" in os.environ:
        return f"sbatch --nodes {os.environ.get('SLURM_JOB_NUM_NODES', 'N')} {_script('slurm.sbatch')}"
    return f"bash {_script('multinode.sh')} --hostfile {shlex.quote(os.environ.get(HOSTFILE, 'FILE'))}"


def _script(name: str) -> str:
    """How a shell that stands here names a script of launch/."""
    root = Path(__file__).parents[1]
    path = Path("launch", name)
    return shlex.quote(str(path if Path.cwd() == root.resolve() else root / path))
