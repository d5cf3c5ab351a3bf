"""What ranks tell each other of where they are, as JSON."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from ds_remoe.deepspeed_groups import group_label
from ds_remoe.training.watchdog.position import Position

_FRAMES = 4


@dataclass(frozen=True)
class Collective:
    """The newest collective that a rank has started; on a GPU the host may be ahead of the one that it waits for.

    Attributes:
        operation: for example "all_to_all".
        group: torch's name of the group, the same on all its ranks.
        label: a name for messages.
        ranks: of the group.
        number: collectives that the rank has started in this group, this one included.
    """

    operation: str
    group: str
    label: str
    ranks: tuple[int, ...]
    number: int

    def __str__(self) -> str:
        own = "" if self.label == "all ranks" else f" ({list_ranks(self.ranks)})"
        return f"{self.operation} of {self.label}{own}"


@dataclass(frozen=True)
class Whereabouts:
    """What one rank says of itself.

    Attributes:
        rank, host: of it.
        phase, step, micro_batch, limit: see `Position`.
        stalled: seconds since its last sign of progress.
        started: collectives started, by torch's name of the group.
        last: the newest of them; None before the first.
        stack: where its Python is, innermost first; empty unless it stalls.
    """

    rank: int
    host: str
    phase: str
    step: int | None
    micro_batch: int | None
    limit: float
    stalled: float
    started: dict[str, int]
    last: Collective | None
    stack: tuple[str, ...]

    @classmethod
    def of(cls, position: Position, stalled: float, *, with_stack: bool) -> Whereabouts:
        """Those of this rank."""
        started, newest = dict(position.started), position.last
        last: Collective | None = None
        if newest is not None:
            operation, group = newest
            number = started.get(group.group_name, 0)
            ranks = tuple(dist.get_process_group_ranks(group))
            last = Collective(operation, group.group_name, group_label(group), ranks, number)
        return cls(
            rank=dist.get_rank(),
            host=socket.gethostname(),
            phase=position.phase,
            step=position.step,
            micro_batch=position.micro_batch,
            limit=position.limit,
            stalled=stalled,
            started=started,
            last=last,
            stack=main_stack() if with_stack else (),
        )

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Whereabouts:
        """What `to_json` wrote."""
        values = json.loads(text)
        last = values["last"]
        if last is not None:
            last = Collective(**{**last, "ranks": tuple(last["ranks"])})
        return cls(**{**values, "last": last, "stack": tuple(values["stack"])})

    @property
    def place(self) -> str:
        """Step, phase and micro-batch, as far as there are any."""
        step = "" if self.step is None else f"step {self.step}, "
        return f"{step}{self.phase}" + ("" if self.micro_batch is None else f" of micro-batch {self.micro_batch}")


def main_stack() -> tuple[str, ...]:
    """Where the main thread's Python is, innermost call first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack: list[str] = []
    while frame is not None and len(stack) < _FRAMES:
        stack.append(f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
        frame = frame.f_back
    return tuple(stack)


def list_ranks(ranks: Sequence[int]) -> str:
    """For example "rank 2", or "ranks 0-3, 7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    listed = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
