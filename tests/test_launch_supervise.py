"""A supervised run: killed ranks, launchers and supervisors, and what it does not restart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ranks import free_port
from test_resume import Run

from ds_remoe.launching.hosts import Host, HostfileError, read_hostfile
from ds_remoe.launching.processes import TOKEN_VARIABLE

BIN = Path(sys.executable).parent
STEPS = 100  # so many that the last of several signals comes before the end on a fast machine, too


class BareRun(Run):
    """A run without W&B, whose processes are no part of these tests."""

    def __init__(self, folder: Path, data: Path) -> None:
        super().__init__(folder, data)
        content = json.loads(self.config.read_text())
        content["remoe"]["logging"] = {}
        content["remoe"]["train"]["steps"] = STEPS
        content["scheduler"]["params"]["total_num_steps"] = STEPS
        self.config.write_text(json.dumps(content))


class Supervised(BareRun):
    """A run under `ds-remoe supervise`."""

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [f"{BIN}/ds-remoe", "supervise", "--backoff", "0.1", "--grace", "60", "--"]
        command += [f"{BIN}/deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
        command += ["--module", "ds_remoe.train", "--config", str(self.config), *arguments]
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        wait_until(lambda: len(self.lines()) >= step or process.poll() is not None, f"step {step}")
        assert process.poll() is None, process.communicate()[0][-5000:]

    def kill_and_see_it_restart(self, name: str, process: subprocess.Popen[str]) -> None:
        """SIGKILL to a process of the run; returns when ranks started after it have done some steps."""
        old = {rank.pid for rank in self.processes("--local_rank")}
        self.processes(name)[0].kill()

        def new_ranks() -> int:
            pids = {rank.pid for rank in self.processes("--local_rank=")}
            return len(pids - old) if not pids & old else 0

        wait_until(lambda: new_ranks() == 2 or process.poll() is not None, "the restart")
        self.wait_for_step(len(self.lines()) + 1, process)

    def processes(self, of: str) -> list[psutil.Process]:
        """Those of this run that carry a supervisor's token and have `of` in their command line."""
        found = []
        for process in psutil.process_iter():
            try:
                line, environment = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            if TOKEN_VARIABLE in environment and str(self.config) in line and any(of in part for part in line):
                found.append(process)
        return found


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("runs")
    run = BareRun(root / "undisturbed", root / "data")
    run.finish()
    return run


def test_faults_of_every_process_leave_the_undisturbed_line(undisturbed: Run) -> None:
    """A rank killed, then the launcher, then SIGTERM to the supervisor, then SIGKILL to it; and on to the end."""
    run = Supervised(undisturbed.folder.with_name("disturbed"), undisturbed.folder.with_name("data"))
    process = run.start()
    try:
        run.wait_for_step(5, process)
        run.kill_and_see_it_restart("--local_rank=1", process)
        run.kill_and_see_it_restart("deepspeed.launcher.launch", process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-5000:]
        done = len(run.lines())
        assert done < STEPS, "the signal came too late to prove anything"
        assert f"stopped by SIGTERM; saved after step {done}" in output
        assert "restart 1 of 10" in output
        assert "restart 2 of 10" in output
        assert "the launcher was gone" in output
        assert run.checkpoints()[-1] == f"step{done:08d}"
        assert run.processes("") == []

        process = run.start()
        run.wait_for_step(done + 2, process)
        process.kill()
        wait_until(lambda: run.processes("") == [], "the end of the killed supervisor's run", seconds=60)
        assert len(run.lines()) < STEPS, "the signal came too late to prove anything"
        assert run.checkpoints()[-1] == f"step{len(run.lines()):08d}", "its ranks were not given time to save"
    finally:
        process.kill()
    process = run.start()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-5000:]
    assert run.records() == undisturbed.records()


def supervise(folder: Path, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Supervise a shell script as the run of `folder`; it counts its starts in folder/starts."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [f"{BIN}/ds-remoe", "supervise", "--backoff", "0.01", "--run-dir", str(folder), *options]
    script = f"cd {folder}; echo >>starts; n=$(wc -l <starts); {script}"
    return subprocess.run([*command, "--", "sh", "-c", script], capture_output=True, text=True, timeout=60)


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines())


def test_it_knows_when_a_restart_makes_no_sense(tmp_path: Path) -> None:
    refused = supervise(tmp_path / "refused", "exit 2")
    assert (refused.returncode, starts(tmp_path / "refused")) == (2, 1)

    step = """echo "{\\"step\\": $n, " >>metrics.jsonl; """
    same = """echo '{"step": 7, ' >metrics.jsonl; """
    repeating = supervise(tmp_path / "repeating", f"{same} exit 1")
    assert (repeating.returncode, starts(tmp_path / "repeating")) == (1, 2)
    assert "failed after step 7 before, too" in repeating.stderr

    moving = supervise(tmp_path / "moving", f"{step} kill -9 $$", "--max-restarts", "3")
    assert (moving.returncode, starts(tmp_path / "moving")) == (1, 4)
    assert "killed by SIGKILL" in moving.stderr
    assert "gave up after 3 restarts" in moving.stderr

    never_met = supervise(tmp_path / "never_met", "exit 1", "--max-restarts", "4")  # as when a node is still rebooting
    assert (never_met.returncode, starts(tmp_path / "never_met")) == (1, 5)

    saved = f"{step} mkdir -p checkpoints/step0000000$n; printf step0000000$n >checkpoints/latest; "
    recovers = supervise(tmp_path / "recovers", f"{saved} [ $n = 3 ]")
    assert (recovers.returncode, starts(tmp_path / "recovers")) == (0, 3)

    unsaved = supervise(tmp_path / "unsaved", step, "--max-restarts", "1")  # deepspeed hides a killed launcher as 0
    assert (unsaved.returncode, starts(tmp_path / "unsaved")) == (1, 2)
    assert "is not saved" in unsaved.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "true"], "--run-dir"),
        (["--run-dir", "x", "--backoff", "-1", "--", "true"], "--backoff"),
        (["--run-dir", "x", "--", "true", "--resume", "none"], "--resume none"),
        (["--", "true", "--config", "no-such.json"], "no-such.json"),
        (["--run-dir", "x", "--", "true", "--hostfile", "no-such"], "--hostfile no-such"),
    ],
)
def test_wrong_use_is_refused_before_anything_starts(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [f"{BIN}/ds-remoe", "supervise", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    file = tmp_path / "hostfile"
    file.write_text("# ours\n\nnode-1 slots=8\n  node-2   slots=4 # half\n")
    assert read_hostfile(file) == [Host("node-1", 8), Host("node-2", 4)]
    assert {host.name: host.slots for host in read_hostfile(file)} == dict(fetch_hostfile(str(file)))
    for wrong, message in (
        ("a slots=1\na slots=2\n", "twice"),
        ("a\n", "line 1"),
        ("a slots=0\n", "line 1"),
        ("#\n", "no node"),
    ):
        file.write_text(wrong)
        with pytest.raises(HostfileError, match=message):
            read_hostfile(file)
