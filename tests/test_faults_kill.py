"""Runs that are killed at random moments, that meet a second run in their folder, or that lose their W&B server."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from forked_ranks import fork_ranks
from test_resume import TIMING, run_config
from wandb_server import API_KEY, Server

from ds_remoe.bench.results_file import write_results
from ds_remoe.training import metrics
from ds_remoe.training.checkpoint_folder import LATEST, CheckpointFolder, inspect
from ds_remoe.training.manifest import tag_of
from ds_remoe.training.trainer import Trainer
from ds_remoe.training.wandb_run import WandbRun
from ds_remoe.training.watchdog import HUNG, Position

STEPS, MANY_STEPS, SAVE_EVERY = 40, 200, 4
SAVING = "saving a checkpoint"

slow = pytest.mark.skipif("DS_REMOE_SLOW" not in os.environ, reason="slow: set DS_REMOE_SLOW=1")


@dataclass(frozen=True)
class Kill:
    """SIGKILL to a rank, `delay` seconds after it begins its `after`-th step or save of the session."""

    rank: int
    phase: str
    after: int
    delay: float


def random_kills(seed: int, count: int, save_seconds: float) -> list[Kill]:
    """Two in steps, then one at a moment of a save that takes about as long as given, and so on."""
    generator = random.Random(seed)
    kills = []
    for index in range(count):
        rank = generator.randrange(2)
        if index % 3 == 2:
            kills.append(Kill(rank, SAVING, generator.randint(1, 2), generator.uniform(0, save_seconds)))
        else:
            kills.append(Kill(rank, "forward", generator.randint(2, 10), generator.uniform(0, 0.02)))
    return kills


class Run:
    """One run folder, and the file in which ranks note each sample that they take."""

    def __init__(self, root: Path, data: Path, steps: int = STEPS, **wandb: Any) -> None:
        root.mkdir()
        self.steps = steps
        self.folder, self.config, self.samples = root / "run", root / "config.json", root / "samples"
        config = run_config(self.folder, data)
        config["remoe"]["train"] |= {"steps": steps, "save_interval": SAVE_EVERY}
        config["scheduler"]["params"]["total_num_steps"] = steps
        config["remoe"]["logging"] = {"wandb": wandb} if wandb else {}
        self.config.write_text(json.dumps(config))

    def train(self, kill: Kill | None = None, wait_for: str | None = None, log: str = "log") -> tuple[list[Any], str]:
        arguments = (str(self.config), str(self.samples), kill, wait_for)
        return fork_ranks(train, 2, *arguments, log=self.config.with_name(log))

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def save_seconds(self) -> float:
        """How long its saves took, the median."""
        return statistics.median(map(float, saves_beside(self.samples).read_text().split()))

    def line(self) -> list[dict[str, Any]]:
        """metrics.jsonl without times; reading it checks that the steps are 1, 2, 3, ..."""
        records = [asdict(record) for record in metrics.read(self.metrics)]
        return [{key: value for key, value in record.items() if key not in TIMING} for record in records]

    def taken(self) -> dict[str, set[str]]:
        """Samples by step, micro-batch and rank; a step that was done again has one set for each that differs."""
        found: dict[str, set[str]] = {}
        for line in self.samples.read_text().splitlines():
            place, _, samples = line.partition(": ")
            found.setdefault(place, set()).add(samples)
        return found


def saves_beside(samples: str | Path) -> Path:
    return Path(samples).with_name("saves")


def check_same(run: Run, undisturbed: Run) -> None:
    assert run.line() == undisturbed.line()
    taken = run.taken()
    assert taken == undisturbed.taken()
    assert {len(sets) for sets in taken.values()} == {1}, "a step was done again with other samples"
    samples = [sample for sets in taken.values() for sample in next(iter(sets)).split()]
    assert len(set(samples)) == len(samples) == run.steps * 8, "a sample was lost or seen twice"


# What ranks do.


def train(config: str, samples: str, kill: Kill | None, wait_for: str | None) -> None:
    """The program of a launched rank, which also notes its samples; it may be killed, or wait for a file in step 3."""
    from ds_remoe import train as entry

    patch, rank = pytest.MonkeyPatch(), dist.get_rank()
    take, at, begun = Trainer._batch, Position.at, itertools.count(1)
    saving_since: float | None = None

    def noted_batch(self: Trainer, batches: Any, step: int, index: int) -> Any:
        if batches is self.train_batches:
            numbers = " ".join(map(str, batches.samples(step, index, rank).tolist()))
            with open(samples, "a") as file:
                file.write(f"{step} {index} {rank}: {numbers}\n")
        return take(self, batches, step, index)

    def noted_at(self: Position, phase: str, step: int | None = None, micro_batch: int | None = None) -> None:
        nonlocal saving_since
        at(self, phase, step, micro_batch)
        if rank == 0 and saving_since is not None:
            with saves_beside(samples).open("a") as file:
                file.write(f"{time.monotonic() - saving_since}\n")
        saving_since = time.monotonic() if phase == SAVING else None
        if (
            kill is not None
            and (rank, phase, micro_batch or 0) == (kill.rank, kill.phase, 0)
            and next(begun) == kill.after
        ):
            threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while wait_for is not None and (phase, step) == ("forward", 3) and not os.path.exists(wait_for):
            time.sleep(0.01)

    patch.setattr(Trainer, "_batch", noted_batch)
    patch.setattr(Position, "at", noted_at)
    entry.main(["--config", config])


def train_until_the_server_dies(config: str, samples: str, url: str) -> None:
    """The same with W&B online; its server answers with errors from the log of step 5 on."""
    os.environ.update(WANDB_API_KEY=API_KEY, WANDB_BASE_URL=url, WANDB_ERROR_REPORTING="false")
    log = WandbRun.log

    def noted_log(self: WandbRun, record: Any) -> None:
        if record.step == 5:
            urllib.request.urlopen(url + "/stop", data=b"").close()
        log(self, record)

    patch = pytest.MonkeyPatch()
    patch.setattr(WandbRun, "log", noted_log)
    patch.setitem(WandbRun.__init__.__kwdefaults__, "finish_timeout", 3.0)
    train(config, samples, None, None)


# The tests.


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("runs")
    run = Run(root / "undisturbed", root / "data")
    codes, output = run.train()
    assert codes == [0, 0], output
    return run


def beside(undisturbed: Run, name: str, steps: int = STEPS, **wandb: Any) -> Run:
    root = undisturbed.config.parents[1]
    return Run(root / name, root / "data", steps, **wandb)


def kill_and_finish(run: Run, kills: list[Kill]) -> list[dict[str, Any]]:
    """Start the run again and again, each time with the next kill, then to its end; what each kill left."""
    found = []
    for kill in kills:
        codes, output = run.train(kill)
        assert codes[kill.rank] == -signal.SIGKILL, output
        assert codes[1 - kill.rank] == HUNG, output
        assert f"rank {kill.rank} (host " in output
        assert "not heard for" in output
        newest, latest = CheckpointFolder(run.folder / "checkpoints").all()[-1:], run.folder / "checkpoints" / LATEST
        state = inspect(newest[0], contents=True).state if newest else None
        pointed = latest.read_text() if latest.exists() else None
        done = len(run.metrics.read_bytes().splitlines())
        # A save begins after its step is logged and ends when the pointer names it.
        inside = kill.phase != "forward" and pointed != tag_of(done)
        left = {"steps in metrics.jsonl": done, "latest": pointed}
        left |= {"newest folder": newest[0].name if newest else None, "its state": state, "inside a save": inside}
        found.append(asdict(kill) | left)
    codes, output = run.train()
    assert codes == [0, 0], output
    return found


def test_kills_at_random_moments_leave_the_undisturbed_line(undisturbed: Run) -> None:
    run = beside(undisturbed, "killed")
    kill_and_finish(run, random_kills(1, 3, undisturbed.save_seconds()))
    check_same(run, undisturbed)


@slow
@pytest.mark.timeout(1200)
def test_twenty_kills_at_random_moments_leave_the_undisturbed_line(undisturbed: Run) -> None:
    """DS_REMOE_RESULTS names a file for what was found."""
    quiet, run = (beside(undisturbed, name, MANY_STEPS) for name in ("quiet", "killed-20-times"))
    codes, output = quiet.train()
    assert codes == [0, 0], output
    found = kill_and_finish(run, random_kills(20, 20, quiet.save_seconds()))
    check_same(run, quiet)
    assert sum(kill["inside a save"] for kill in found) >= 3, found
    if results := os.environ.get("DS_REMOE_RESULTS"):
        what = "20 SIGKILLs at random moments of one run: what each left, and that the line is the undisturbed run's."
        figures = {"kills": found, "steps": MANY_STEPS, "line equals the undisturbed run's, bit for bit": True}
        command = ["DS_REMOE_SLOW=1", "pytest", *sys.argv[1:]]
        write_results(Path(results), what, command, figures | {"each sample seen once": True})


def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(undisturbed: Run) -> None:
    run = beside(undisturbed, "shared")
    go = run.config.with_name("go")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run.train, wait_for=str(go))
        deadline = time.monotonic() + 60
        while not (run.metrics.exists() and run.metrics.stat().st_size):
            assert time.monotonic() < deadline, "the first run did not come to its first step"
            time.sleep(0.01)
        refused, output = run.train(log="second")
        go.touch()
        codes, first_output = first.result()
    assert refused == [2, 2], output
    assert output.count("another run is using it") == 2, output
    assert "not heard for" not in output
    assert codes == [0, 0], first_output
    check_same(run, undisturbed)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def test_a_wandb_server_that_dies_in_mid_run_leaves_the_undisturbed_line(undisturbed: Run, server: Server) -> None:
    run = beside(undisturbed, "wandb", mode="online")
    arguments = (str(run.config), str(run.samples), server.url)
    codes, output = fork_ranks(train_until_the_server_dies, 2, *arguments, log=run.config.with_name("log"))
    assert codes == [0, 0], output
    assert server.stopped
    assert "metrics.jsonl has everything" in output
    check_same(run, undisturbed)
