"""Start the ranks of a benchmark on this machine: one process each, in one process group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

LOG_TAIL = 4000


class RankError(RuntimeError):
    """A rank failed; the message says which, and holds the end of its output."""


def run_module(module: str, arguments: Sequence[str], world_size: int) -> None:
    """Run `python -m module arguments` on every rank and wait for all; when one fails the others are ended.

    Each rank has its share of the cores, unless OMP_NUM_THREADS is set, and a GPU of its own where the machine has
    enough of them; else the ranks run on the CPU.

    Raises:
        RankError: a rank failed.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="ds-remoe-ranks-") as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                with log.open("wb") as output:
                    command = [sys.executable, "-m", module, *arguments]
                    environment = _environment(rank, world_size, port)
                    processes.append(
                        subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
                    )
            failed = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            tail = logs[failed].read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]
            raise RankError(f"rank {failed} of {world_size} failed, code {processes[failed].returncode}:\n{tail}")


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all are done, or until one fails: its rank, else None."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if None not in codes:
            return None
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What the deepspeed launcher would set for one rank."""
    environment = {
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // world_size, 1)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if torch.cuda.device_count() < world_size:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
