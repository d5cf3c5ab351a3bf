"""Slurm on the hosts of cluster_hosts.py: munged and slurmctld on the first, slurmd on each; nothing of /etc."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster_hosts import TOOLS, Cluster, cluster, why_not

SLURM_TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")

# Each node has a GPU in name, as the batch script asks for some, and two CPUs, however many this machine has. Times are
# short: of a credential (a requeued job waits for its end), for a node to answer, and from SIGTERM to SIGKILL.
_CONF = """
ClusterName=test
SlurmctldHost=node0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
MpiDefault=none
ReturnToService=2
SlurmdTimeout=30
KillWait=10
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=node[0-{last}] CPUs=2 Gres=gpu:1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_no_slurm() -> str | None:
    """The reason why Slurm cannot run here; None if it can."""
    if missing := [tool for tool in SLURM_TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)} (Debian: apt install slurm-wlm munge)"
    return why_not(TOOLS)


class Slurm:
    """A running Slurm; its controller and its first node are node0."""

    def __init__(self, hosts: Cluster, folder: Path) -> None:
        self.hosts, self._folder = hosts, folder

    def on_host(self, host: int, command: Sequence[str]) -> list[str]:
        """What runs a command of Slurm's there."""
        return self.hosts.command(host, ["env", f"SLURM_CONF={self._folder}/slurm.conf", *command])

    def call(self, *command: str) -> str:
        """What a command prints."""
        done = subprocess.run(self.on_host(0, command), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, ExitCode and the rest."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", number)))

    def _up(self) -> None:
        folder, last = self._folder, self.hosts.size - 1
        (folder / "slurm.conf").write_text(_CONF.format(folder=folder, last=last))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        # Without a name slurmd looks for cgroups, and ends where there are none; none of its plugins here uses them.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        # force: others could not enter pytest's folder, which here is as it should be.
        own = [f"--{name}={folder}/munge.{name}" for name in ("socket", "log-file", "pid-file", "seed-file")]
        self._start(0, ["munged", "--foreground", "--force", f"--key-file={key}", *own])
        self._start(0, ["slurmctld", "-D"])
        for host in range(self.hosts.size):
            self._start(host, ["slurmd", "-D", "-N", f"node{host}"])
        deadline = time.monotonic() + 60
        while self._idle_nodes() < self.hosts.size:
            assert time.monotonic() < deadline, "".join(log.read_text()[-3000:] for log in folder.glob("*.out"))
            time.sleep(0.1)

    def _idle_nodes(self) -> int:
        sinfo = self.on_host(0, ["sinfo", "--noheader", "--states=idle", "--format=%D"])
        lines = subprocess.run(sinfo, capture_output=True, text=True).stdout.split()
        return sum(int(line) for line in lines)

    def _start(self, host: int, daemon: list[str]) -> None:
        """It ends with its host."""
        with (self._folder / f"{daemon[0]}-{host}.out").open("w") as log:
            subprocess.Popen(self.on_host(host, daemon), stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@contextmanager
def slurm(folder: Path, nodes: int) -> Iterator[Slurm]:
    """Slurm on this many hosts; all of it, and its jobs, end with them."""
    with cluster(folder / "hosts", nodes, ssh=False) as hosts:
        made = Slurm(hosts, folder)
        made._up()
        yield made
