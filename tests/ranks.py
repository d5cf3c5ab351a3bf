"""Run one function on several gloo ranks of this machine; starting ranks is slow, so put many cases into one call."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What the launcher would set for one rank."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")])),
    }


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Call `function(*args)` of a test module on every rank, its process group made; return the ranks' results.

    Raises:
        AssertionError: a rank failed; the message holds the end of each rank's output.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"module": function.__module__, "name": function.__qualname__, "args": args}, f"{folder}/call.pt")
        port, processes = free_port(), []
        for rank in range(world_size):
            with open(f"{folder}/log{rank}", "wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, folder],
                        env=rank_environment(rank, world_size, port),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            codes = [process.wait(timeout) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
        logs = "\n".join(f"--- rank {r}\n{Path(f'{folder}/log{r}').read_text()[-4000:]}" for r in range(world_size))
        assert codes == [0] * world_size, f"exit codes {codes}\n{logs}"
        return [torch.load(f"{folder}/result{r}.pt", weights_only=False) for r in range(world_size)]


def _main(folder: str) -> None:
    import importlib

    import deepspeed

    from ds_remoe.deepspeed_compat import use_gloo_only

    use_gloo_only()
    deepspeed.init_distributed(dist_backend="gloo")
    call = torch.load(f"{folder}/call.pt", weights_only=False)
    function = getattr(importlib.import_module(call["module"]), call["name"])
    torch.save(function(*call["args"]), f"{folder}/result{os.environ['RANK']}.pt")


if __name__ == "__main__":
    from ds_remoe.process_exit import run_and_exit

    run_and_exit(lambda: _main(sys.argv[1]))
