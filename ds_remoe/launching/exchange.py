"""A small all-to-all over all ranks, and its bandwidth between each pair: `python -m ds_remoe.launching.exchange`.

On each node, with FIRST (its first rank), SLOTS, WORLD, ADDRESS and PORT as arguments: starts the node's ranks; rank 0
prints what was measured as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import combinations

from ds_remoe.process_exit import run_and_exit

PAIR_BYTES = 8 << 20
REPEATS = 3
TIMEOUT = timedelta(seconds=30)


def start_ranks(first: int, slots: int, world: int, address: str, port: int) -> int:
    """Start this node's ranks and wait; the exit code of the first that failed, or 0."""
    processes = []
    for local in range(slots):
        variables: dict[str, object] = {
            "RANK": first + local,
            "LOCAL_RANK": local,
            "WORLD_SIZE": world,
            "LOCAL_SIZE": slots,
        }
        variables |= {"MASTER_ADDR": address, "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in variables.items()}}
        processes.append(subprocess.Popen([sys.executable, "-m", __spec__.name, "rank"], env=environment))
    try:
        return next((code for code in [process.wait() for process in processes] if code), 0)
    finally:
        for process in processes:
            process.kill()


def measure() -> list[list[float]] | None:
    """One rank: bytes per second that each pair exchanges in both directions at a time; on rank 0, [i][j] for i < j.

    Raises:
        RuntimeError: an element did not arrive as it was sent.
    """
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    from ds_remoe.deepspeed_compat import use_gloo_only

    accelerator = get_accelerator()
    backend = accelerator.communication_backend_name()
    if accelerator._name == "cpu":
        use_gloo_only()
        backend = "gloo"
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend=backend, timeout=TIMEOUT, verbose=False)
    if getattr(deepspeed.comm.comm.cdb, "shm_comm_op", None) is not None:
        raise RuntimeError("DeepSpeed's shm op is on, which crashes across hosts; use_gloo_only must switch it off")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(accelerator.current_device_name())
    sent = torch.arange(world, device=device) + 1000 * rank
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    if received.tolist() != [1000 * source + rank for source in range(world)]:
        raise RuntimeError(f"rank {rank}: an all-to-all brought {received.tolist()}")
    table = [[0.0] * world for _ in range(world)]
    for i, j in combinations(range(world), 2):
        peer = {i: j, j: i}.get(rank)
        splits = [PAIR_BYTES if other == peer else 0 for other in range(world)]
        out = torch.ones(sum(splits), dtype=torch.uint8, device=device)
        into = torch.zeros_like(out)
        best = float("inf")
        for _ in range(REPEATS):
            dist.barrier()
            began = time.perf_counter()
            dist.all_to_all_single(into, out, splits, splits)
            accelerator.synchronize()
            best = min(best, time.perf_counter() - began)
        seconds = torch.tensor([best if peer is not None else 0.0], dtype=torch.float64, device=device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        table[i][j] = PAIR_BYTES / float(seconds)
    dist.barrier()
    dist.destroy_process_group()
    return table if rank == 0 else None


def main(arguments: Sequence[str]) -> int:
    """Be a rank, or start a node's."""
    if list(arguments) == ["rank"]:
        table = measure()
        if table is not None:
            print(json.dumps(table))
        return 0
    first, slots, world, address, port = arguments
    return start_ranks(int(first), int(slots), int(world), address, int(port))


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1:]))
