"""Two hosts between which the link is cut in mid-run, or one of which has a rank that stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from cluster_hosts import SSH_TOOLS, TOOLS, Cluster, cluster, end_all, why_not
from forked_ranks import fork_ranks
from ranks import free_port, rank_environment
from test_faults_kill import Run, slow

from ds_remoe.training.watchdog import HUNG

HANG_TIMEOUT = 8
BIN = Path(sys.executable).parent
NO_SSH = why_not((*TOOLS, *SSH_TOOLS))

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path / "cluster", 2, ssh=NO_SSH is None) as made:
        yield made


def make_run(root: Path, name: str) -> Run:
    run = Run(root / name, root / "data")
    config = json.loads(run.config.read_text())
    config["remoe"]["train"]["hang_timeout"] = HANG_TIMEOUT
    run.config.write_text(json.dumps(config))
    return run


def entry_point(config: str) -> None:
    from ds_remoe import train

    train.main(["--config", config])


def finish(run: Run) -> None:
    """Train from where the run is to its end, on one host."""
    codes, output = fork_ranks(entry_point, 2, str(run.config), log=run.config.with_name("log"))
    assert codes == [0, 0], output


def wait_for_step(run: Run, step: int, processes: Sequence[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not run.metrics.exists() or len(run.metrics.read_bytes().splitlines()) < step:
        assert all(process.poll() is None for process in processes), [p.communicate()[0][-4000:] for p in processes]
        assert time.monotonic() < deadline, f"step {step} did not come"
        time.sleep(0.01)


def cut_link(hosts: Cluster) -> None:
    subprocess.run(hosts.command(1, ["ip", "link", "set", "eth0", "down"]), check=True)


def launcher_environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Outputs, once all have ended by themselves."""
    try:
        return [process.communicate(timeout=120)[0] for process in processes]
    finally:
        end_all(processes)


def test_a_link_that_is_cut_in_mid_step_ends_the_ranks_of_both_hosts(hosts: Cluster, tmp_path: Path) -> None:
    """Each side says that it does not hear the other; continued, the run has the undisturbed line."""
    quiet, run = make_run(tmp_path, "quiet"), make_run(tmp_path, "cut")
    finish(quiet)
    command, port = [sys.executable, "-m", "ds_remoe.train", "--config", str(run.config)], free_port()
    local = {"MASTER_ADDR": "node0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    processes = [hosts.start(host, command, rank_environment(host, 2, port) | local) for host in range(2)]
    wait_for_step(run, 5, processes)
    cut_link(hosts)
    outputs = ends(processes)
    assert [process.returncode for process in processes] == [HUNG, HUNG], "\n".join(outputs)
    for here, output in enumerate(outputs):
        assert f"rank {1 - here} (host node{1 - here}): not heard for" in output, output
        assert f"rank {here} (host node{here}): waiting for rank {1 - here}; step " in output
        assert f"rank {here} ends the run:" in output
    finish(run)
    assert run.line() == quiet.line()


@slow
def test_launchers_of_both_hosts_end_where_a_rank_is_stopped(hosts: Cluster, tmp_path: Path) -> None:
    run = make_run(tmp_path, "stopped")
    command = [f"{BIN}/deepspeed", "--hostfile", str(hosts.hostfile), "--no_ssh", "--master_addr", "node0"]
    program = ["--module", "ds_remoe.train", "--config", str(run.config)]
    processes = [
        hosts.start(host, [*command, "--node_rank", str(host), *program], launcher_environment()) for host in range(2)
    ]
    wait_for_step(run, 5, processes)
    lines = ((process, process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    ranks = [process for process, line in lines if "--local_rank=0" in line and str(run.config) in line]
    (stopped,) = [rank for rank in ranks if rank.environ()["RANK"] == "1"]
    stopped.send_signal(signal.SIGSTOP)
    outputs = ends(processes)
    assert [process.returncode for process in processes] == [HUNG, 256 - signal.SIGKILL], "\n".join(outputs)
    assert "rank 1 (host node1): not heard for" in outputs[0], outputs[0]
    assert "it is stopped; killed" in outputs[1], outputs[1]


@slow
@pytest.mark.skipif(NO_SSH is not None, reason=NO_SSH or "")
def test_pdsh_ends_where_the_link_is_cut_if_ssh_looks_for_its_other_end(hosts: Cluster, tmp_path: Path) -> None:
    """Without ServerAliveInterval the launcher waits for ssh to the lost host, which waits for ever."""
    run, forwarded, variables = make_run(tmp_path, "cut"), tmp_path / "environment", launcher_environment()
    forwarded.write_text("".join(f"{key}={variables[key]}\n" for key in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PATH")))
    variables["DS_ENV_FILE"] = str(forwarded)
    variables["PDSH_SSH_ARGS_APPEND"] = "-oServerAliveInterval=5 -oServerAliveCountMax=2"
    command = [f"{BIN}/deepspeed", "--hostfile", str(hosts.hostfile), "--launcher", "pdsh", "--master_addr", "node0"]
    process = hosts.start(0, [*command, "--module", "ds_remoe.train", "--config", str(run.config)], variables)
    wait_for_step(run, 5, [process])
    cut_link(hosts)
    (output,) = ends([process])
    assert process.returncode not in (0, 2), output
    assert "rank 1 (host node1): not heard for" in output, output
    left = subprocess.run(hosts.command(1, ["ps", "ax", "-o", "args"]), capture_output=True, text=True, check=True)
    assert str(run.config) not in left.stdout
