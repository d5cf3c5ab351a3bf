"""The measurements of `ds-remoe bench memory` with the experts spread over ranks of this machine."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_remoe.bench.memory import Point, measure
from ds_remoe.bench.memory_peak import Peak
from ds_remoe.bench.memory_rigs import Sizes
from ds_remoe.bench.ranks import run_module
from ds_remoe.config.schema import ModelConfig, MoEConfig
from ds_remoe.process_exit import run_and_exit
from ds_remoe.training import runtime


def measure_on_ranks(sizes: Sizes, kinds: Sequence[str], densities: Sequence[float]) -> list[Point]:
    """`memory.measure` on `sizes.moe.ep_size` ranks.

    Raises:
        RankError: a rank failed.
    """
    given: dict[str, Any] = {"vocab_size": sizes.vocab_size, "micro_batch": sizes.micro_batch}
    given |= {"model": sizes.model.model_dump(), "moe": sizes.moe.model_dump()}
    given["dtype"] = str(sizes.dtype).removeprefix("torch.")
    request = {"sizes": given, "kinds": list(kinds), "densities": list(densities)}
    with tempfile.TemporaryDirectory(prefix="ds-remoe-memory-") as folder:
        task, results = Path(folder) / "request.json", Path(folder) / "points.json"
        task.write_text(json.dumps(request), encoding="utf-8")
        run_module("ds_remoe.bench.memory_ranks", [str(task), str(results)], sizes.moe.ep_size)
        points = json.loads(results.read_text(encoding="utf-8"))
    return [Point(**{**point, "peak": Peak(**point["peak"])}) for point in points]


def _fullest(points: Iterator[Point]) -> Iterator[Point]:
    """Each point with the peak of the rank that needed most; all ranks call together."""
    for point in points:
        peaks = [point.peak] * dist.get_world_size()
        dist.all_gather_object(peaks, point.peak)
        yield replace(point, peak=max(peaks, key=lambda peak: peak.activations))


def main() -> None:
    """Measure the request in the first file as one rank; rank 0 writes the points to the second."""
    task, results = map(Path, sys.argv[1:])
    request = json.loads(task.read_text(encoding="utf-8"))
    runtime.quiet_output()
    device = runtime.start(seed=0)
    given = request["sizes"]
    given |= {"model": ModelConfig(**given["model"]), "moe": MoEConfig(**given["moe"]), "device": device}
    sizes = Sizes(**{**given, "dtype": getattr(torch, given["dtype"])})
    points = list(_fullest(measure(sizes, request["kinds"], request["densities"])))
    if dist.get_rank() == 0:
        results.write_text(json.dumps([asdict(point) for point in points]), encoding="utf-8")
    runtime.stop()


if __name__ == "__main__":
    run_and_exit(main)
