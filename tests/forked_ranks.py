"""Ranks forked from a server with torch and deepspeed imported, so that a start takes little; they may be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranks import free_port, rank_environment

PRELOADED = ["forked_ranks", "ds_remoe.training.trainer", "deepspeed.runtime.zero.muon.muon_optimizer"]
"""What takes long to import; DeepSpeed's ZeRO looks at Muon, which compiles at its import, for every optimizer."""


def fork_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, log: Path, timeout: float = 120
) -> tuple[list[int | None], str]:
    """Call `function(*args)` of a test module on every rank, its gloo group made.

    Args:
        function: of a module's top level.
        world_size: ranks to start.
        args: picklable.
        log: its name with the rank added is each rank's output.
        timeout: seconds for all; a rank that still runs then is killed.

    Returns:
        Exit codes (negative: the signal; None: killed for the timeout) and the ranks' outputs in a row.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    logs = [log.with_name(f"{log.name}.{rank}") for rank in range(world_size)]
    with _server_environment():
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, port, logs[rank], function, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
    try:
        for process in ranks:
            process.join(timeout)
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return codes, "\n".join(f"--- {path.name}\n{path.read_text()[-10_000:]}" for path in logs)


@contextlib.contextmanager
def _server_environment() -> Any:
    """What the fork server must see when the first call starts it."""
    changed = {key: value for key, value in rank_environment(0, 1, 0).items() if os.environ.get(key) != value}
    kept = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for key, value in kept.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _rank(
    rank: int, world_size: int, port: int, log: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    # Replaced streams must not close what they wrote to, as the interpreter's own do not.
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.environ.update(rank_environment(rank, world_size, port))
    torch.set_num_threads(1)
    import deepspeed

    from ds_remoe.deepspeed_compat import use_gloo_only

    use_gloo_only()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    function(*args)
