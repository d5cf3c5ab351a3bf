"""Several hosts, each with its own address, processes and /dev/shm: the losses of one host, and no needless bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_hosts import SSH_TOOLS, TOOLS, Cluster, cluster, end_all, why_not
from ranks import free_port
from test_resume import run_config

from ds_remoe.bench.comm_bytes import least_bytes

BIN = Path(sys.executable).parent
RANK = Path(__file__).with_name("cluster_rank.py")
HIDDEN, SEQUENCE = 64, 128
Rows = dict[int, list[dict[str, Any]]]
NO_SSH = why_not((*TOOLS, *SSH_TOOLS))

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
needs_ssh = pytest.mark.skipif(NO_SSH is not None, reason=NO_SSH or "")
slow = pytest.mark.skipif("DS_REMOE_SLOW" not in os.environ, reason="slow: set DS_REMOE_SLOW=1")


def environment() -> dict[str, str]:
    kept = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return {**os.environ, **kept, "DEEPSPEED_TIMEOUT": "2", "PYTHONPATH": str(RANK.parent)}


def write_config(root: Path) -> Path:
    config = run_config(root / "run", root / "data")
    config["remoe"]["model"] |= {"hidden_size": HIDDEN, "seq_length": SEQUENCE, "init_std": 0.05}
    config["remoe"]["logging"] = {}
    path = root / "config.json"
    path.write_text(json.dumps(config))
    return path


def wait_for(processes: list[subprocess.Popen[str]]) -> None:
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        end_all(processes)
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(o[-4000:] for o in outputs)


def results(folder: Path, ranks: int) -> list[Rows]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def on_one_host(root: Path, config: Path, ranks: int) -> list[Rows]:
    folder = root / "one-host"
    folder.mkdir()
    command = [f"{BIN}/deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    command += [str(RANK), str(config), str(ranks), str(folder)]
    wait_for(
        [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)]
    )
    return results(folder, ranks)


def on_hosts(hosts: Cluster, folder: Path, config: Path, launcher: str) -> list[Rows]:
    """Start the ranks with deepspeed: from node0 through pdsh, or a task on each host as a scheduler does."""
    folder.mkdir()
    program = [str(RANK), str(config), str(hosts.size), str(folder)]
    command = [f"{BIN}/deepspeed", "--hostfile", str(hosts.hostfile)]
    variables = environment()
    if launcher == "pdsh":
        forwarded = folder / "environment"
        forwarded.write_text("".join(f"{k}={variables[k]}\n" for k in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PATH")))
        variables["DS_ENV_FILE"] = str(forwarded)
        processes = [hosts.start(0, [*command, "--launcher", "pdsh", "--master_addr", "node0", *program], variables)]
    else:
        command += ["--no_ssh", "--master_addr", "node0"]
        processes = [
            hosts.start(host, [*command, "--node_rank", str(host), *program], variables) for host in range(hosts.size)
        ]
    wait_for(processes)
    return results(folder, hosts.size)


def check_losses(got: list[Rows], expected: list[Rows]) -> None:
    for rank, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for stage in (1, 2):
            losses = [row["losses"] for row in ours[stage]]
            assert losses == [row["losses"] for row in theirs[stage]], f"ZeRO-{stage}, {rank=}"


def check_wire(got: list[Rows]) -> None:
    """All hosts together send what the routing needs and the dense parameters' collectives, and 5% for headers."""
    ranks = len(got)
    for stage in (1, 2):
        for rows in zip(*(own[stage] for own in got), strict=True):
            masks = [[row["masks"][layer] for row in rows] for layer in range(len(rows[0]["masks"]))]
            least = sum(least_bytes(masks_R, HIDDEN, element_size=4) for masks_R in masks)
            around = rows[0]["dense_bytes"] * (ranks - 1)  # the dense parameters once, from each rank to a ring's next
            reduced = 2 * around if rows[0]["is_boundary"] or stage == 2 else 0
            gathered = around if rows[0]["is_boundary"] else 0
            sent = {part: sum(row[part] for row in rows) for part in ("forward", "backward", "step")}
            where = f"ZeRO-{stage}: {least=} {reduced=} {gathered=} {sent=}"
            assert least > 500_000, f"too few bytes for headers and barriers not to matter; {where}"
            assert 0.5 * least <= sent["forward"] <= 0.53 * least, where
            assert 0.99 * reduced <= sent["backward"] - 0.5 * least <= 1.03 * reduced + 0.03 * least, where
            assert gathered <= sent["step"] <= 1.03 * gathered + 4000 * ranks, where


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=slow)], ids=lambda size: f"{size}_hosts")
def hosts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("hosts") / "cluster", request.param, ssh=NO_SSH is None) as made:
        yield made


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def expected(hosts: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Rows]:
    return on_one_host(tmp_path_factory.mktemp("expected"), config, hosts.size)


@pytest.mark.parametrize("launcher", ["no_ssh", pytest.param("pdsh", marks=needs_ssh)])
def test_hosts_train_as_one_host_does(
    launcher: str, hosts: Cluster, config: Path, expected: list[Rows], tmp_path: Path
) -> None:
    got = on_hosts(hosts, tmp_path / "hosts", config, launcher)
    check_losses(got, expected)
    check_wire(got)


@needs_ssh
def test_doctor_examines_every_host(hosts: Cluster, config: Path) -> None:
    command = [f"{BIN}/ds-remoe", "doctor", "--hostfile", str(hosts.hostfile), "--config", str(config)]
    process = hosts.start(0, [*command, "--set", f"remoe.moe.ep_size={hosts.size}"], environment())
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "between nodes" in output
