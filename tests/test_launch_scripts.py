"""The scripts in launch/: what they refuse before they start anything, and that the shell understands them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_remoe.launch_environment import launch_command

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), LAUNCH.with_name(".ci") / "run"])


def multinode(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    command = ["bash", str(LAUNCH / "multinode.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--hostfile FILE is missing"),
        (("--hostfile",), "--hostfile needs a value"),
        (("--hostfile", "/no/such/file", "--config", "x"), "/no/such/file: no such file"),
        (("--hostfile", "launch/hostfile.example"), "nothing for the trainer"),
        (("--hostfile", "launch/hostfile.example", "--master_port", "x", "--config", "x"), "--master_port x"),
    ],
)
def test_wrong_use_of_multinode_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = multinode(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_gpu_check_overwrites_nothing_and_needs_a_gpu(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": path}
    for folder, message in ((tmp_path, "exists; move it away"), (tmp_path / "new", "torch finds no CUDA device")):
        command = ["bash", "launch/gpu_check.sh", str(folder)]
        done = subprocess.run(command, cwd=LAUNCH.parent, env=environment, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
    assert not (tmp_path / "new").exists()


def test_setup_knows_its_tools() -> None:
    done = subprocess.run(["bash", "launch/setup.sh", "rival"], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert "unknown argument 'rival'; give 'dev', 'rivals' or nothing" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_understands(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(["shellcheck", "--shell=bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_command_that_goes_on_fits_how_the_run_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_JOB_ID", "DS_REMOE_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    assert launch_command(2) == "bash launch/train.sh 2"
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert launch_command(2) == "bash launch/train.sh 2"
    monkeypatch.setenv("DS_REMOE_HOSTFILE", "/a b/hosts")
    assert launch_command(4) == "bash launch/multinode.sh --hostfile '/a b/hosts'"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert launch_command(4) == "sbatch --nodes 2 launch/slurm.sbatch"
