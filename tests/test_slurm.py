"""launch/slurm.sbatch under a real Slurm: whole jobs, the signals it sends, a rank that is killed, a lost node."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from launched_runs import STEPS, RealRun, Session, needs_venv, slow, stopped_once, wait_until
from slurm_cluster import Slurm, slurm, why_no_slurm

pytestmark = [pytest.mark.skipif(why_no_slurm() is not None, reason=why_no_slurm() or ""), needs_venv, slow]
LONGER = [f"--set={name}=9000" for name in ("remoe.train.steps", "scheduler.params.total_num_steps")]


class Job(Session):
    """A job of the batch script, on two of the nodes, a rank on each; its process is `sbatch --wait`."""

    def __init__(self, cluster: Slurm, run: RealRun, *overrides: str, options: tuple[str, ...] = ()) -> None:
        self._cluster, self._output = cluster, run.folder.with_suffix(".out")
        # A line of what it prints, as soon as it prints one: the job's number.
        command = ["stdbuf", "-oL", "sbatch", "--wait", "--parsable", "--nodes=2", "--cpus-per-task=1"]
        command += ["--gpus-per-node=1", "--time=10", f"--output={self._output}", *options]
        command += ["launch/slurm.sbatch", "--config", str(run.config), *overrides]
        super().__init__(cluster.on_host(0, command), run.folder)
        assert self.process.stdout is not None
        self.number = self.process.stdout.readline().strip()
        assert self.number.isdecimal(), self.number + self.process.communicate()[0]

    def call(self, *command: str) -> None:
        """A command about this job."""
        self._cluster.call(*command, self.number)

    def state(self) -> tuple[str, str]:
        """How it stands: JobState and ExitCode."""
        found = self._cluster.job(self.number)
        return found["JobState"], found["ExitCode"]

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def end(self) -> str:
        self.process.wait(400)  # it prints nothing more
        super().end()
        assert self.state() == ("COMPLETED", "0:0"), self.output()[-5000:]
        return self.output()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm"), 3) as made:
        yield made


@pytest.fixture
def run(cluster: Slurm, undisturbed: RealRun, request: pytest.FixtureRequest) -> Iterator[RealRun]:
    yield undisturbed.sibling(request.node.name)
    cluster.call("scancel", "--user=root")  # a job that a failed test has left would hold the nodes


def test_a_job_stops_when_asked_and_the_next_restarts_a_killed_rank_and_ends_as_on_one_host(
    cluster: Slurm, run: RealRun, undisturbed: RealRun
) -> None:
    job = Job(cluster, run)
    job.wait_for_steps(3)
    job.call("scancel", "--signal=TERM", "--batch")
    stopped_once(job)
    job = Job(cluster, run)
    job.wait_for_steps(8)
    away = [rank for rank in job.find("--local_rank=") if rank.environ()["RANK"] == "1"]
    assert [rank.environ()["SLURMD_NODENAME"] for rank in away] == ["node1"]
    away[0].kill()
    output = job.end()
    assert re.search(r"supervise: goes on after step \d+ in 10 s \(restart 1 of 10\)", output), output[-5000:]
    assert run.records() == undisturbed.records()


def test_the_time_limit_makes_all_ranks_save(cluster: Slurm, run: RealRun) -> None:
    """Slurm looks at limits twice a minute, so the run is long."""
    job = Job(cluster, run, *LONGER, options=("--signal=B:TERM@110",))
    job.wait_for_steps(3)
    job.call("scontrol", "update", "TimeLimit=2", "JobId")
    output = job.end()
    assert "supervise: SIGTERM: the ranks save and end" in output
    assert "supervise: stopped by SIGTERM; saved after" in output


def test_scancel_leaves_a_checkpoint_and_no_process(cluster: Slurm, run: RealRun) -> None:
    job = Job(cluster, run)
    job.wait_for_steps(3)
    job.call("scancel")
    wait_until(lambda: job.find("") == [], "the end of the cancelled job's run")
    job.process.wait(60)
    wait_until(lambda: job.state()[0] == "CANCELLED", "the job to be cancelled", seconds=30)
    assert job.steps() < STEPS, "the signal came too late to prove anything"
    assert job.saved()[-1] == f"step{job.steps():08d}"


def test_a_wrong_configuration_is_refused_once(cluster: Slurm, run: RealRun) -> None:
    job = Job(cluster, run, "--set", "remoe.train.steps=-1")
    job.process.wait(60)
    assert job.state() == ("FAILED", "2:0")
    assert job.output().count("remoe.train.steps") == 1, job.output()


def test_a_node_that_is_lost_requeues_the_job_onto_another(cluster: Slurm, run: RealRun, undisturbed: RealRun) -> None:
    """The last of these tests, as node1 does not come back."""
    job = Job(cluster, run)
    job.wait_for_steps(8)
    assert {rank.environ()["SLURMD_NODENAME"] for rank in job.find("--local_rank=")} == {"node0", "node1"}
    cluster.hosts.power_off(1)
    output = job.end()
    assert "DUE TO NODE FAILURE" in output
    assert cluster.job(job.number)["NodeList"] == "node[0,2]"
    assert run.records() == undisturbed.records()
