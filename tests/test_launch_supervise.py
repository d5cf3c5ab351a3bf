"""What looks after a run: killed ranks, launchers and supervisors, signals to each, and what is not restarted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from launched_runs import (
    BIN,
    LAUNCHER,
    RUNNER,
    STEPS,
    RealRun,
    light,
    needs_venv,
    slow,
    stopped_once,
    supervised,
    wait_until,
)
from ranks import free_port

from ds_remoe.launching.hosts import Host, HostfileError, read_hostfile
from ds_remoe.launching.processes import TOKEN_VARIABLE, end


def test_a_killed_rank_or_launcher_is_restarted_and_a_stopped_launcher_is_not(tmp_path: Path) -> None:
    session = light(tmp_path)
    session.wait_for_steps(2)
    session.kill_and_see_it_restart("--local_rank=1")
    assert session.saved() == [], "a rank without its peer cannot have saved"
    session.kill_and_see_it_restart(LAUNCHER)
    assert len(session.saved()) == 1, "the ranks that outlived the launcher were not given time to save"
    session.find(LAUNCHER)[0].terminate()
    output = session.end()
    for expected in ("restart 1 of 10", "the launcher was gone", "restart 2 of 10", "stopped by SIGTERM; saved after"):
        assert expected in output, output[-5000:]
    assert len(session.saved()) == 2


def test_sigterm_to_deepspeed_itself_which_would_leave_its_ranks_behind(tmp_path: Path) -> None:
    session = light(tmp_path)
    session.wait_for_steps(2)
    session.find(RUNNER)[0].terminate()
    assert "stopped by SIGTERM to the launcher; saved after" in session.end()
    assert len(session.saved()) == 1


def test_a_killed_supervisor_leaves_a_checkpoint_and_no_process(tmp_path: Path) -> None:
    session = light(tmp_path)
    session.wait_for_steps(2)
    session.process.kill()
    wait_until(lambda: session.find("") == [], "the end of the killed supervisor's run", seconds=60)
    assert session.saved() == [f"step{session.steps():08d}"]


@needs_venv
def test_sigterm_to_the_launch_script_saves_once_and_the_run_goes_on_as_undisturbed(
    run: RealRun, undisturbed: RealRun
) -> None:
    session = run.by_script()
    session.wait_for_steps(3)
    session.terminate()
    stopped_once(session)
    run.train_to_the_end()
    assert run.records() == undisturbed.records()


@slow
@needs_venv
@pytest.mark.parametrize("part", ["--local_rank=0", "--local_rank=1", RUNNER, LAUNCHER])
def test_sigterm_to_any_process_under_the_launch_script_saves_once(part: str, run: RealRun) -> None:
    session = run.by_script()
    session.wait_for_steps(3)
    session.find(part)[0].terminate()
    stopped_once(session)


@slow
def test_faults_of_every_process_leave_the_undisturbed_line(run: RealRun, undisturbed: RealRun) -> None:
    """A rank killed, then the launcher, then SIGTERM to the supervisor, then SIGKILL to it; and on to the end."""
    launcher = [f"{BIN}/deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*launcher, "--module", "ds_remoe.train", "--config", str(run.config)]
    session = supervised(run.folder, *command)
    session.wait_for_steps(5)
    session.kill_and_see_it_restart("--local_rank=1")
    session.kill_and_see_it_restart(LAUNCHER)
    session.terminate()
    assert "supervise: stopped by SIGTERM; saved after" in session.end()
    session = supervised(run.folder, *command)
    session.wait_for_steps(2)
    session.process.kill()
    wait_until(lambda: session.find("") == [], "the end of the killed supervisor's run", seconds=60)
    assert session.steps() < STEPS, "the signal came too late to prove anything"
    assert session.saved()[-1] == f"step{session.steps():08d}", "its ranks were not given time to save"
    supervised(run.folder, *command).end()
    assert run.records() == undisturbed.records()


def test_a_rank_that_starts_after_the_end_was_asked_for_is_asked_too(tmp_path: Path) -> None:
    """By SIGTERM, at which bash gives 143, and not by SIGKILL after the grace."""
    rank = "import time; open('up', 'w'); time.sleep(600)"
    script = f'while [ ! -e go ]; do sleep 0.01; done; RANK=0 LOCAL_RANK=0 {sys.executable} -c "{rank}"; echo $? >code'
    launcher = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env={**os.environ, TOKEN_VARIABLE: "late"})
    ended = threading.Thread(target=end, args=("late", 60))
    ended.start()
    (tmp_path / "go").touch()
    ended.join()
    launcher.wait()
    assert (tmp_path / "code").read_text() == "143\n"


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

    by_srun = supervise(tmp_path / "by_srun", f"{step} exit 143", "--max-restarts", "1")  # it ended the other tasks
    assert (by_srun.returncode, starts(tmp_path / "by_srun")) == (1, 2)

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
        (["--run-dir", "x", "--", "no-such-command"], "COMMAND 'no-such-command': cannot be run"),
        (["--run-dir", "x", "--", "true", "--hostfile", "no-such"], "--hostfile no-such"),
        (["--run-dir", "x", "--", "./plain"], "COMMAND './plain': cannot be run"),
        (["--run-dir", "x", "--", "./by-plain"], "COMMAND './by-plain': cannot be run (Permission denied)"),
        (["--run-dir", "x", "--", "./no-format"], "COMMAND './no-format': cannot be run (Exec format error)"),
        (["--run-dir", "plain", "--", "true"], "plain is not a folder; choose another path"),
        (["--run-dir", "plain/x", "--", "true"], "--run-dir plain/x: "),
    ],
)
def test_wrong_use_is_refused_before_anything_starts(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()  # not executable
    for name, content in (("by-plain", f"#!{tmp_path}/plain\n"), ("no-format", "exit 0\n")):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [f"{BIN}/ds-remoe", "supervise", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr


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


def test_a_signal_while_a_failed_run_waits_for_its_restart_is_no_success(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [f"{BIN}/ds-remoe", "supervise", "--run-dir", str(tmp_path / "run"), "--backoff", "600", "--", "false"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            wait_until(lambda: "goes on" in log.read_text() or process.poll() is not None, "the restart's announcement")
            process.terminate()
            assert process.wait(60) == 1, log.read_text()
        finally:
            process.kill()
    assert "stopped by SIGTERM while waiting to restart a run that failed" in log.read_text()
