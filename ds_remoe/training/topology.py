"""How a run is spread over ranks, as far as the files of its checkpoints depend on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """What DeepSpeed's files are cut for."""

    world_size: int
    ep_size: int
    zero_stage: int

    def __str__(self) -> str:
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{ranks}, ep_size {self.ep_size}, ZeRO {self.zero_stage}"
