"""A plain `deepspeed` command that nothing looks after: its ranks do, when it or its launcher is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched_runs import BIN, LAUNCHER, RealRun, Session, saved_once, slow, wait_until
from ranks import free_port
from test_resume import run_config

from ds_remoe.launching.processes import TOKEN_VARIABLE


def bare(run: RealRun) -> Session:
    launcher = [f"{BIN}/deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    return Session([*launcher, "--module", "ds_remoe.train", "--config", str(run.config)], run.folder)


def ends_saved(session: Session, missing: str) -> None:
    """It says why it ends, saves once and leaves no process."""
    output, _ = session.process.communicate(timeout=120)  # its ranks hold the same pipe
    wait_until(lambda: session.find("") == [], "the end of the launcher", seconds=10)
    # Rank 1 may be the first to see it, and the run then ends before rank 0 has looked.
    said = f"{missing} is gone: its ranks save and end" in output and "stopped by SIGTERM after step" in output
    assert said or "stopped by a signal to another rank" in output, output[-5000:]
    saved_once(session)


def test_sigterm_to_deepspeed_saves_once_and_the_run_goes_on_as_undisturbed(run: RealRun, undisturbed: RealRun) -> None:
    session = bare(run)
    session.wait_for_steps(3)
    session.terminate()
    ends_saved(session, f"deepspeed (process {session.process.pid})")
    run.train_to_the_end()
    assert run.records() == undisturbed.records()


@slow
@pytest.mark.parametrize("part", ["deepspeed", LAUNCHER])
def test_sigkill_to_deepspeed_or_its_launcher_saves_once(part: str, run: RealRun) -> None:
    session = bare(run)
    session.wait_for_steps(3)
    launcher = session.find(LAUNCHER)[0]
    (launcher if part == LAUNCHER else session.process).kill()
    ends_saved(session, f"process {launcher.pid if part == LAUNCHER else session.process.pid})")


def test_sigterm_to_the_launcher_of_the_node_saves_once(run: RealRun) -> None:
    """It passes the signal on."""
    session = bare(run)
    session.wait_for_steps(3)
    session.find(LAUNCHER)[0].terminate()
    output, _ = session.process.communicate(timeout=120)
    assert "stopped by " in output, output[-5000:]
    assert session.find("") == []
    saved_once(session)


LEFT_BEHIND = """
import time
from ds_remoe.launching.launcher_watch import stop_without_launcher
stop_without_launcher()
time.sleep(2)
print("left alone", flush=True)
"""


@pytest.mark.parametrize(
    ("launcher", "variables", "output"),
    [
        (LAUNCHER, {}, ""),
        ("another.launcher", {}, "left alone\n"),
        (LAUNCHER, {TOKEN_VARIABLE: "supervised"}, "left alone\n"),
    ],
)
def test_only_deepspeeds_launcher_without_a_supervisor_is_missed(
    launcher: str, variables: dict[str, str], output: str
) -> None:
    start = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(1)"
    done = subprocess.run(
        [sys.executable, "-c", start, LEFT_BEHIND, launcher],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == output, done.stderr


def test_without_any_launcher_it_is_a_run_of_one_rank(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", tmp_path / "data")
    config["remoe"]["moe"]["ep_size"] = 1
    config["remoe"]["train"]["steps"] = 6
    config["scheduler"]["params"]["total_num_steps"] = 6
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "OMPI_", "PMI_", "MV2_", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    command = [sys.executable, "-m", "ds_remoe.train", "--config", str(file)]
    done = subprocess.run(
        command, env=environment | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("variables", "message", "code"),
    [
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE = 'two' (environment): must be a whole number", 2),
        ({"WORLD_SIZE": "1", "RANK": "-1"}, "RANK = '-1' (environment): must be a whole number", 2),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK = 2 (environment): must be less than WORLD_SIZE = 2", 2),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE = 'x': must be the number of ranks on this machine", 2),
        ({"DS_ACCELERATOR": "gpu"}, "DS_ACCELERATOR = 'gpu' (environment): DS_ACCELERATOR must be one of", 2),
        ({"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "torch finds no such device here; set it to cpu", 1),
    ],
)
def test_an_environment_that_cannot_be_is_refused(variables: dict[str, str], message: str, code: int) -> None:
    command = [sys.executable, "-m", "ds_remoe.train", "--config", "ds_configs/quickstart.json"]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
