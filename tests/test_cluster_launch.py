"""launch/multinode.sh and `ds-remoe doctor` on two hosts through pdsh and ssh: whole runs, signals, and what bites."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import distribution
from pathlib import Path

import psutil
import pytest
from cluster_hosts import NET, SSH_TOOLS, TOOLS, Cluster, cluster, why_not
from launched_runs import (
    BIN,
    LAUNCHER,
    ROOT,
    RUNNER,
    RealRun,
    Session,
    environment,
    needs_venv,
    saved_once,
    slow,
    stopped_once,
    wait_until,
)

NO_SSH = why_not((*TOOLS, *SSH_TOOLS))
PORT = "29711"

pytestmark = [pytest.mark.skipif(NO_SSH is not None, reason=NO_SSH or ""), needs_venv]


class HostSession(Session):
    """A command on node0."""

    def __init__(self, hosts: Cluster, command: list[str], folder: Path) -> None:
        super().__init__(hosts.command(0, command), folder)

    def terminate(self) -> None:
        """SIGTERM to the command: nsenter, which waits for it, passes none on."""
        psutil.Process(self.process.pid).children()[0].terminate()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("hosts") / "cluster", 2, ssh=True) as made:
        yield made


def script(hostfile: Path, config: Path) -> list[str]:
    command = ["bash", f"{ROOT}/launch/multinode.sh", "--hostfile", str(hostfile), "--master_port", PORT]
    return [*command, "--config", str(config)]


def on_node0(hosts: Cluster, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    full = {**environment(), **variables}
    return subprocess.run(
        hosts.command(0, command), env=full, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )


@contextmanager
def mounted(hosts: Cluster, host: int, *arguments: str) -> Iterator[None]:
    """A mount that this host alone sees; the last argument is where."""
    subprocess.run(hosts.command(host, ["mount", *arguments]), check=True)
    try:
        yield
    finally:
        subprocess.run(hosts.command(host, ["umount", arguments[-1]]), check=True)


def test_a_run_through_pdsh_stops_when_asked_and_goes_on_as_on_one_host(
    hosts: Cluster, run: RealRun, undisturbed: RealRun, tmp_path: Path
) -> None:
    """With a hostfile and a .deepspeed_env as people write them (comments, blank lines), from a folder of their own.

    A file there that has a module's name stands in for none, on no node.
    """
    hostfile, variables = tmp_path / "hostfile", tmp_path / "variables"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "torch.py").write_text("raise SystemExit('not this one')\n")
    hostfile.write_text("# ours\n\n" + hosts.hostfile.read_text().replace("\n", "  # a node\n"))
    variables.write_text("# for all nodes\n\nFROM_FILE=x\n   \n")
    start = ["env", f"--chdir={elsewhere}", f"DS_ENV_FILE={variables}"]
    session = HostSession(hosts, [*start, *script(hostfile, run.config)], run.folder)
    session.wait_for_steps(3)
    assert {rank.environ()["FROM_FILE"] for rank in session.find("--local_rank=") if "ssh" not in rank.name()} == {"x"}
    session.terminate()
    stopped_once(session)
    run.train_to_the_end()
    assert run.records() == undisturbed.records()


def test_what_cannot_be_started_is_refused_with_a_remedy(hosts: Cluster, undisturbed: RealRun, tmp_path: Path) -> None:
    hostfile, variables = tmp_path / "hostfile", tmp_path / "variables"

    def refusal(lines: str, code: int) -> str:
        hostfile.write_text(lines)
        done = on_node0(hosts, script(hostfile, undisturbed.config), DS_ENV_FILE=str(variables))
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr

    both = hosts.hostfile.read_text()
    assert "line 2: 'node1': must be `name slots=n`" in refusal("node0 slots=1\nnode1\n", 2)
    unreachable = refusal("node0 slots=1\nnode9 slots=1\n", 1)
    assert "doctor: ssh node9: " in unreachable
    assert "make `ssh node9 true` work without a password" in unreachable
    with mounted(hosts, 1, "-t", "tmpfs", "tmpfs", str(ROOT / ".venv")):
        without = refusal(both, 1)
    assert "doctor: node node1: " in without
    assert "run `bash launch/setup.sh`" in without
    variables.write_text("PATH\n")
    assert f"{variables}: the line 'PATH' is not NAME=VALUE" in refusal(both, 2)


def test_doctor_names_what_bites_and_measures_what_does_not(
    hosts: Cluster, undisturbed: RealRun, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    config = RealRun(shared / "run", shared / "data").config.rename(tmp_path / "config.json")
    names, other, metadata = tmp_path / "hosts", tmp_path / "other.json", tmp_path / "METADATA"
    names.write_text(f"127.0.0.1 localhost\n127.0.1.1 node1\n{NET}.1 node0\n")
    other.write_text(config.read_text() + "\n")
    installed = Path(str(distribution("deepspeed").locate_file(""))) / (
        f"deepspeed-{distribution('deepspeed').version}.dist-info/METADATA"
    )
    metadata.write_text(
        installed.read_text().replace(f"\nVersion: {distribution('deepspeed').version}", "\nVersion: 0.1")
    )
    listen = f"import socket, time; s = socket.create_server(('', {PORT})); print('up', flush=True); time.sleep(600)"
    doctor = ["env", "COLUMNS=600", f"{BIN}/ds-remoe", "doctor", "--hostfile", str(hosts.hostfile)]
    doctor += ["--config", str(config), "--master_port", PORT]
    with ExitStack() as stack:
        stack.enter_context(mounted(hosts, 1, "-t", "tmpfs", "tmpfs", str(shared)))
        for source, target in ((names, Path("/etc/hosts")), (other, config), (metadata, installed)):
            stack.enter_context(mounted(hosts, 1, "--bind", str(source), str(target)))
        orphan = hosts.start(0, [sys.executable, "-c", listen], environment())
        assert orphan.stdout is not None
        orphan.stdout.readline()
        found = on_node0(hosts, doctor)
        psutil.Process(orphan.pid).children()[0].kill()
        orphan.communicate()
    assert found.returncode == 1, found.stderr
    for expected in (
        "✓ │ ssh",
        "✗ │ host names",
        "node1: node1 is 127.0.1.1",
        "✗ │ package versions",
        "deepspeed 0.1 on node1",
        "✗ │ configuration",
        f"✗ │ folder {shared}/run",
        f"✗ │ folder {shared}/data",
        "node1: sees nothing of what the first node wrote there",
        f"✗ │ port {PORT}",
        "node0: Address already in use by process ",
        "import socket, time;",
        "✗ │ all-to-all",
    ):
        assert expected in found.stdout, found.stdout
    good = on_node0(hosts, doctor)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "✗" not in good.stdout
    assert "between nodes" in good.stdout
    assert list(shared.iterdir()) == [], "it left something behind"


@slow
@pytest.mark.parametrize("part", ["--local_rank=", RUNNER, LAUNCHER])
def test_sigterm_to_any_process_of_a_pdsh_run_saves_once(part: str, hosts: Cluster, run: RealRun) -> None:
    """To the rank and the launcher of the second host, and to deepspeed on the first."""
    session = HostSession(hosts, script(hosts.hostfile, run.config), run.folder)
    session.wait_for_steps(3)
    found = [process for process in session.find(part) if "ssh" not in process.name() and process.name() != "pdsh"]
    found[-1].terminate()
    stopped_once(session)


@slow
def test_sigterm_to_a_plain_deepspeed_that_runs_through_pdsh_saves_once(
    hosts: Cluster, run: RealRun, tmp_path: Path
) -> None:
    """Nothing looks after it: it asks the ranks of all hosts itself, and its own code is 1."""
    variables = tmp_path / "variables"
    variables.write_text(f"PATH={environment()['PATH']}\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    launcher = [f"{BIN}/deepspeed", "--hostfile", str(hosts.hostfile), "--master_port", PORT]
    command = [*launcher, "--module", "ds_remoe.train", "--config", str(run.config)]
    session = HostSession(hosts, ["env", f"DS_ENV_FILE={variables}", *command], run.folder)
    session.wait_for_steps(3)
    session.terminate()
    output, _ = session.process.communicate(timeout=120)
    wait_until(lambda: session.find("") == [], "the end of the ranks", seconds=60)
    saved_once(session)
    assert session.process.returncode == 1, output[-5000:]


@slow
def test_a_rank_killed_on_a_host_is_restarted_and_sigterm_stops_the_supervisor(
    hosts: Cluster, run: RealRun, undisturbed: RealRun
) -> None:
    supervise = [f"{BIN}/ds-remoe", "supervise", "--backoff", "0.1", "--grace", "60", "--"]
    session = HostSession(hosts, [*supervise, *script(hosts.hostfile, run.config)], run.folder)
    session.wait_for_steps(8)
    session.kill_and_see_it_restart("--local_rank=")
    session.terminate()
    stopped_once(session)
    run.train_to_the_end()
    assert run.records() == undisturbed.records()
