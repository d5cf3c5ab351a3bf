"""Runs under `deepspeed` and what looks after it, their processes, and signals to them: for tests of launching."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from forked_ranks import fork_ranks
from ranks import free_port
from test_resume import SAVE_EVERY, Run

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STEPS = 60  # so many that a signal comes before the end on a fast machine, too
slow = pytest.mark.skipif("DS_REMOE_SLOW" not in os.environ, reason="slow: set DS_REMOE_SLOW=1")
needs_venv = pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="launch/ scripts use the repository's .venv; run bash launch/test.sh"
)


def environment() -> dict[str, str]:
    path = f"{BIN}:{os.environ['PATH']}"
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


class Session:
    """A command that looks after a run, and the run's processes."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.folder = folder
        self._metrics = folder / "metrics.jsonl"
        self.process = subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd=ROOT,
        )

    def terminate(self) -> None:
        """SIGTERM to the command."""
        self.process.terminate()

    def steps(self) -> int:
        return len(self._metrics.read_text().splitlines()) if self._metrics.exists() else 0

    def wait_for_steps(self, count: int) -> None:
        """Until there are some more."""
        wanted = self.steps() + count
        wait_until(lambda: self.steps() >= wanted or self.process.poll() is not None, f"step {wanted}")
        assert self.process.poll() is None, self.process.communicate()[0][-5000:]

    def find(self, part: str) -> list[psutil.Process]:
        """The run's processes, other than the command itself, with `part` in an argument."""
        found = []
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if process.pid != self.process.pid and any(str(self.folder) in text for text in line):
                found += [process] if any(part in text for text in line) else []
        return found

    def kill_and_see_it_restart(self, part: str) -> None:
        """SIGKILL to a process; returns when ranks started after it have done some steps."""
        old = {rank.pid for rank in self.find("--local_rank=")}
        self.find(part)[0].kill()

        def new_ranks() -> int:
            pids = {rank.pid for rank in self.find("--local_rank=")}
            return len(pids - old) if not pids & old else 0

        wait_until(lambda: new_ranks() == 2 or self.process.poll() is not None, "the restart")
        self.wait_for_steps(2)

    def saved(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step*"))

    def end(self) -> str:
        """Its output, once it has ended with code 0 and left no process, and the last step is the one saved last."""
        output, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, output[-5000:]
        assert self.find("") == []
        assert self.saved()[-1] == f"step{self.steps():08d}"
        return output


def supervised(folder: Path, *command: str) -> Session:
    options = ["--backoff", "0.1", "--grace", "60", "--run-dir", str(folder)]
    return Session([f"{BIN}/ds-remoe", "supervise", *options, "--", *command], folder)


def light(folder: Path) -> Session:
    """Light ranks under DeepSpeed's launcher, supervised."""
    folder.mkdir(exist_ok=True)
    launcher = [f"{BIN}/deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    return supervised(folder, *launcher, str(ROOT / "tests" / "light_rank.py"), str(folder))


RUNNER, LAUNCHER = "bin/deepspeed", "deepspeed.launcher.launch"


class RealRun(Run):
    """A run without W&B, of as many steps as these tests need."""

    def __init__(self, folder: Path, data: Path) -> None:
        super().__init__(folder, data)
        content = json.loads(self.config.read_text())
        content["remoe"]["logging"] = {}
        content["remoe"]["train"]["steps"] = STEPS
        content["scheduler"]["params"]["total_num_steps"] = STEPS
        self.config.write_text(json.dumps(content))

    def sibling(self, name: str) -> RealRun:
        """One like it, with the same data."""
        return RealRun(self.folder.with_name(re.sub(r"\W+", "-", name)), self.folder.with_name("data"))

    def train_to_the_end(self) -> None:
        """Without a launcher."""
        log = self.folder.with_suffix(".log")
        codes, output = fork_ranks(train_to_the_end, 2, str(self.config), log=log)
        assert codes == [0, 0], output

    def by_script(self) -> Session:
        return Session(["bash", "launch/train.sh", "2", "--config", str(self.config)], self.folder)


def train_to_the_end(config: str) -> None:
    """What a rank does."""
    from ds_remoe.config import load_run
    from ds_remoe.training.trainer import Trainer

    run = load_run(config, [], world_size=2, accelerator="cpu")
    assert Trainer(run, torch.device("cpu")).train().step == STEPS


def saved_once(session: Session) -> None:
    """It has saved its last step, before it was done, and no other checkpoint that was not due."""
    assert session.steps() < STEPS, "the signal came too late to prove anything"
    assert session.saved()[-1] == f"step{session.steps():08d}"
    assert [tag for tag in session.saved()[:-1] if int(tag.removeprefix("step")) % SAVE_EVERY] == []


def stopped_once(session: Session) -> None:
    """Its supervisor ended well, and it saved once."""
    assert "supervise: stopped by " in session.end()
    saved_once(session)
