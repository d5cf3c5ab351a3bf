"""Ranks that hang: whoever is left ends the run in the configured time and names the one that did not come."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import fork_ranks
from ranks import free_port
from test_resume import run_config

from ds_remoe.config import ConfigError, load_run
from ds_remoe.training.watchdog import HUNG, Limits, Position
from ds_remoe.training.watchdog.board import Board
from ds_remoe.training.watchdog.position import record_collectives
from ds_remoe.training.watchdog.verdict import Sighting, judge, tell
from ds_remoe.training.watchdog.whereabouts import Collective, Whereabouts, list_ranks

HANG_TIMEOUT = 5
STEP = 3


def write_config(root: Path, data: Path) -> Path:
    config = run_config(root / "run", data)
    config["remoe"]["train"]["hang_timeout"] = HANG_TIMEOUT
    config["remoe"]["logging"] = {}
    path = root / "config.json"
    path.write_text(json.dumps(config))
    return path


# What ranks do.


def sleep_in_python() -> None:
    time.sleep(10_000)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def keep_the_lock() -> None:
    ctypes.PyDLL(None).sleep(10_000)


def train(config: str, rank: int, fault: Callable[[], None], phase: str) -> None:
    """A run in which a rank meets a fault in the second micro-batch of STEP, before a collective of this phase."""
    from ds_remoe import train as entry

    start_collective = Position.start_collective

    def start(self: Position, operation: str, group: dist.ProcessGroup) -> None:
        if dist.get_rank() == rank and (self.phase, self.step, self.micro_batch) == (phase, STEP, 1):
            fault()
        start_collective(self, operation, group)

    pytest.MonkeyPatch().setattr(Position, "start_collective", start)
    entry.main(["--config", config])


WORD = Whereabouts(1, "node0", "starting", None, None, 30.0, 9.0, {}, None, ())
WORDS_KEY = "ds_remoe_watchdog/1"


def speak_before_rank_0() -> None:
    """Rank 1 says one word and no second; then rank 0's board begins, and reads once."""
    if dist.get_rank() == 1:
        board = Board(WORD.to_json, 0.1, time.monotonic)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        dist.TCPStore(address, port, is_master=False).wait([WORDS_KEY])
        board.close()  # its first round waits for what rank 0 has not made
        dist.barrier()
    else:
        dist.barrier()
        rounds, second = itertools.count(1), threading.Event()

        def publish() -> str:
            if next(rounds) == 2:
                second.set()
            return WORD.to_json()

        board = Board(publish, 0.1, time.monotonic)
        assert second.wait(60), "rank 0's board does not come round"
        assert board.sightings()[1].said == WORD
        board.close()
    dist.barrier()


# The tests.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def test_a_word_that_came_before_rank_0_outlives_its_start(tmp_path: Path) -> None:
    codes, output = fork_ranks(speak_before_rank_0, 2, log=tmp_path / "log")
    assert codes == [0, 0], output


@pytest.mark.parametrize(
    ("world_size", "rank", "fault", "phase", "expected"),
    [
        (
            4,
            3,
            sleep_in_python,
            "backward",
            ("rank 3 (host ", "alive, but did not arrive; step 3, backward of micro-batch 1", "sleep_in_python ("),
        ),
        (2, 0, stop, "optimizer step", ("rank 0 (host ", "stopped, dead or cut off", "it is stopped; killed")),
        (2, 1, keep_the_lock, "forward", ("rank 1 (host ", "stopped, dead or cut off", "stuck in a call; killed")),
    ],
    ids=["sleeps", "is_stopped", "keeps_pythons_lock"],
)
def test_a_rank_that_hangs_is_named_by_those_that_wait(
    world_size: int,
    rank: int,
    fault: Callable[[], None],
    phase: str,
    expected: tuple[str, ...],
    data: Path,
    tmp_path: Path,
) -> None:
    """Torch itself would wait for 30 minutes, and the stopped rank for ever."""
    config = write_config(tmp_path, data)
    codes, output = fork_ranks(train, world_size, str(config), rank, fault, phase, log=tmp_path / "log")
    wanted = [HUNG] * world_size
    wanted[rank] = HUNG if fault is sleep_in_python else -signal.SIGKILL
    assert codes == wanted, output
    for text in (*expected, f"of {HANG_TIMEOUT} s allowed", f"waiting for rank {rank}; step {STEP}, {phase}"):
        assert text in output, output
    if fault is sleep_in_python:
        assert output.count("ends the run:") == 1, output
        assert "rank 2 (host " in output
        assert (
            "waiting for ranks 2-3; step 3, backward of micro-batch 1, last collective all_reduce of all ranks"
            in output
        )
        assert "last collective all_to_all of ep_size_2 (ranks 2-3)" in output


def said(rank: int, started: dict[str, int], last: str | None, **changes: object) -> Sighting:
    """A rank of two expert groups "a" (ranks 0-1) and "b" (ranks 2-3) and the world "w"."""
    members = {"w": (0, 1, 2, 3), "a": (0, 1), "b": (2, 3)}
    newest = None
    if last is not None:
        label = "all ranks" if last == "w" else f"ep_{last}"
        newest = Collective("all_to_all", last, label, members[last], started[last])
    place = Whereabouts(rank, f"node{rank // 2}", "forward", 7, 0, 30.0, 9.0, started, newest, ())
    return Sighting(dataclasses.replace(place, **changes), 0.3)


def test_the_verdict_follows_every_chain_of_waiting_to_its_end() -> None:
    waiting = {
        0: said(0, {"w": 5, "a": 9}, "w"),
        1: said(1, {"w": 5, "a": 9}, "w"),
        2: said(2, {"w": 4, "b": 9}, "b"),
        3: said(3, {"w": 4, "b": 8}, "b", stack=("f (x.py:1)",)),
    }
    verdict = judge(waiting, 2.0)
    assert (verdict.silent, verdict.absent) == ((), (3,))
    assert verdict.waiting == {0: (2, 3), 1: (2, 3), 2: (3,)}
    lines = tell(waiting, 2.0).splitlines()
    assert lines[0] == (
        "rank 3 (host node1): alive, but did not arrive; step 7, forward of micro-batch 0, "
        "last collective all_to_all of ep_b (ranks 2-3), Python at f (x.py:1)"
    )
    assert lines[1].startswith("ranks 0-1 (host node0): waiting for ranks 2-3; step 7, forward")
    assert lines[2].startswith("rank 2 (host node1): waiting for rank 3; step 7, forward")

    # A host ahead of its device has started more than it waits for; whoever started fewest is the one still.
    ahead = waiting | {2: said(2, {"w": 4, "b": 11}, "b")}
    assert judge(ahead, 2.0).absent == (3,)

    dead = {rank: dataclasses.replace(sighting, age=31.0 if rank > 1 else 0.1) for rank, sighting in waiting.items()}
    assert judge(dead, 2.0).silent == (2, 3)
    assert tell(dead, 2.0).count("(host node1): not heard for 31 s, so stopped, dead or cut off;") == 2
    never = waiting | {3: Sighting(None, 40.0)}
    assert tell(never, 2.0).startswith("rank 3: not heard for 40 s, so stopped, dead or cut off; never heard")

    together = {rank: said(rank, {"w": 5}, "w") for rank in range(4)}
    assert (judge(together, 2.0).silent, judge(together, 2.0).absent) == ((), ())
    assert tell(together, 2.0).startswith("no rank is behind")
    assert "ranks 0-3 (hosts node0, node1): step 7" in tell(together, 2.0)
    assert [list_ranks(ranks) for ranks in ((2,), (0, 1, 2, 5, 7, 8))] == ["rank 2", "ranks 0-2, 5, 7-8"]
    for sighting in waiting.values():
        assert sighting.said is not None
        assert Whereabouts.from_json(sighting.said.to_json()) == sighting.said


def test_limits_of_the_phases_of_a_run() -> None:
    position, told = Position(Limits(hang=30.0, collective=1800.0)), []
    position.limit_changed = told.append
    limits = []
    for phase, step in [
        ("preparing the data", None),
        ("starting", None),
        ("forward", 41),
        ("evaluation", 41),
        ("saving a checkpoint", 41),
        ("forward", 42),
        ("forward", 43),
        ("saving a checkpoint", 43),
        ("evaluation", 44),
        ("ending", 44),
    ]:
        beats = position.beats
        position.at(phase, step)
        limits.append(position.limit)
        assert position.beats > beats
    assert limits == [math.inf, 1800.0, 1800.0, 1800.0, 1800.0, 30.0, 30.0, 1800.0, 30.0, 1800.0]
    assert told == [math.inf, 1800.0, 30.0, 1800.0, 30.0, 1800.0]


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_every_collective_counts_whichever_function_starts_it() -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    position = Position()
    undo = record_collectives(position)
    try:
        group, x = dist.new_group([0]), torch.ones(1)
        calls: list[tuple[str, Callable[[], object]]] = [
            ("all_reduce", lambda: dist.all_reduce(x, group=group)),
            ("all_to_all", lambda: dist.all_to_all_single(x.clone(), x, group=group)),
            ("all_gather", lambda: dist.all_gather_into_tensor(x.clone(), x, group=group)),
            ("all_gather", lambda: dist.all_gather([x.clone()], x, group=group)),
            ("reduce_scatter", lambda: dist.reduce_scatter_tensor(x.clone(), x, group=group)),
            ("broadcast", lambda: dist.broadcast(x, 0, group=group)),
            ("gather", lambda: dist.gather(x, [x.clone()], group=group)),
            ("barrier", lambda: dist.barrier(group=group)),
        ]
        for number, (operation, call) in enumerate(calls, start=1):
            call()
            assert position.last == (operation, group)
            assert position.started[group.group_name] == number
        dist.broadcast_object_list([1], 0)
        assert position.last is not None
        assert position.last[0] == "broadcast"
        assert position.last[1] is dist.group.WORLD
        undo()
        beats = position.beats
        dist.all_reduce(x)
        assert position.beats == beats
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("minutes", "seconds", "field"),
    [("1", 61, "remoe.train.hang_timeout"), ("0.5", 10, "DEEPSPEED_TIMEOUT"), ("0", 10, "DEEPSPEED_TIMEOUT")],
)
def test_a_timeout_that_torch_would_forestall_is_refused(
    minutes: str, seconds: int, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, tmp_path)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", minutes)
    with pytest.raises(ConfigError) as refused:
        load_run(config, [f"remoe.train.hang_timeout={seconds}"], world_size=2)
    assert [problem.field for problem in refused.value.problems] == [field]
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "2")
    load_run(config, [f"remoe.train.hang_timeout={seconds}"], world_size=2)
