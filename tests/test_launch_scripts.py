"""The scripts in launch/: what they refuse before they start anything, and that the shell understands them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launched_runs import ROOT, needs_venv

from ds_remoe.launch_environment import launch_command

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), LAUNCH.with_name(".ci") / "run"])


def start(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script, started in a folder."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "SLURM_SUBMIT_DIR": str(ROOT)}
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("multinode.sh", [], "--hostfile FILE is missing"),
        ("multinode.sh", ["--hostfile"], "--hostfile needs a value"),
        ("multinode.sh", ["--hostfile", "/no/such/file", "--config", "x"], "/no/such/file: no such file"),
        ("multinode.sh", ["--hostfile", "hosts"], "nothing for the trainer: add --config FILE"),
        ("multinode.sh", ["--hostfile", "hosts", "--set", "remoe.moe.k=2"], "nothing for the trainer"),
        ("multinode.sh", ["--hostfile", "hosts", "--master_port", "x", "--config", "x"], "--master_port x"),
        ("multinode.sh", ["--hostfile", "hosts", "--master_port", "65536", "--config", "x"], "--master_port 65536"),
        ("slurm.sbatch", ["--set", "remoe.moe.k=2"], "slurm.sbatch: nothing for the trainer: add --config FILE"),
        ("train.sh", ["0", "--config", "x"], "usage: bash launch/train.sh RANKS --config FILE"),
        ("train.sh", ["1", "--set", "remoe.moe.k=2"], "train.sh: --config FILE is missing"),
    ],
)
def test_wrong_use_is_refused(script: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node-1 slots=1\n")
    done = start(tmp_path, script, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@needs_venv
@pytest.mark.parametrize("script", [["train.sh", "1"], ["multinode.sh", "--hostfile", "hosts", "--no_ssh"]])
def test_relative_names_are_those_of_the_folder_of_the_start(script: list[str], tmp_path: Path) -> None:
    """Also where the clone, or modules with the names of ours, stand in it."""
    (tmp_path / "ds_remoe").mkdir()
    (tmp_path / "torch.py").write_text("1 / 0")
    (tmp_path / "hosts").write_text("node-1 slots=1\n")
    (tmp_path / "mine.json").write_text('{"remoe": {"modell": {}}}')
    done = start(tmp_path, *script, "--config", "mine.json")
    assert done.returncode == 2, done.stderr
    assert "mine.json: " in done.stderr
    assert "remoe.modell" in done.stderr


def test_gpu_check_overwrites_nothing_and_needs_a_gpu(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": path}
    for folder, message in ((tmp_path.name, "exists; move it away"), (tmp_path / "new", "torch finds no CUDA device")):
        command = ["bash", str(LAUNCH / "gpu_check.sh"), str(folder)]
        done = subprocess.run(command, cwd=tmp_path.parent, env=environment, capture_output=True, text=True)
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
    monkeypatch.chdir(LAUNCH.parent)
    assert launch_command(2) == "bash launch/train.sh 2"
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert launch_command(2) == "bash launch/train.sh 2"
    monkeypatch.setenv("DS_REMOE_HOSTFILE", "/a b/hosts")
    assert launch_command(4) == "bash launch/multinode.sh --hostfile '/a b/hosts'"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert launch_command(4) == "sbatch --nodes 2 launch/slurm.sbatch"


def test_the_command_that_goes_on_is_for_the_folder_of_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    assert launch_command(2) == f"bash {LAUNCH}/train.sh 2"
