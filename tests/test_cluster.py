"""Several hosts, each with its own address, processes and /dev/shm: the losses of one host, and no needless bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_hosts import SSH_TOOLS, TOOLS, Cluster, cluster, end_all, why_not
from cluster_rank import train_stages
from forked_ranks import fork_ranks
from test_resume import run_config

from ds_remoe.bench.comm_bytes import least_bytes
from ds_remoe.bench.results_file import write_results

BIN = Path(sys.executable).parent
RANK = Path(__file__).with_name("cluster_rank.py")
HIDDEN, SEQUENCE = 64, 128
Rows = dict[int, list[dict[str, Any]]]
NO_SSH = why_not((*TOOLS, *SSH_TOOLS))

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
slow = pytest.mark.skipif("DS_REMOE_SLOW" not in os.environ, reason="slow: set DS_REMOE_SLOW=1")


def environment() -> dict[str, str]:
    kept = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return {**os.environ, **kept, "DEEPSPEED_TIMEOUT": "2", "PYTHONPATH": str(RANK.parent)}


def write_config(root: Path) -> Path:
    config = run_config(root / "run", root / "data")
    config["remoe"]["model"] |= {"hidden_size": HIDDEN, "seq_length": SEQUENCE, "init_std": 0.05}
    config["remoe"]["moe"]["activation_budget"] = None  # in the dense stage rows would be sent again
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


def on_one_host(folder: Path, config: Path, ranks: int, ep_size: int) -> list[Rows]:
    folder.mkdir()
    codes, output = fork_ranks(train_stages, ranks, str(config), ep_size, str(folder), log=folder / "log", timeout=400)
    assert codes == [0] * ranks, output
    return results(folder, ranks)


def on_hosts(
    hosts: Cluster, folder: Path, config: Path, launcher: str, ep_size: int, ranks_per_host: int = 1
) -> list[Rows]:
    """Start the ranks with deepspeed: from node0 through pdsh, or a task on each host as a scheduler does."""
    folder.mkdir()
    program = [str(RANK), str(config), str(ep_size), str(folder)]
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"node{host} slots={ranks_per_host}\n" for host in range(hosts.size)))
    command = [f"{BIN}/deepspeed", "--hostfile", str(hostfile)]
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
    return results(folder, hosts.size * ranks_per_host)


def check_losses(got: list[Rows], expected: list[Rows]) -> None:
    for rank, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for stage in (1, 2):
            losses = [row["losses"] for row in ours[stage]]
            assert losses == [row["losses"] for row in theirs[stage]], f"ZeRO-{stage}, {rank=}"


def least_by_host(rows_R: list[dict[str, Any]], ep_size: int) -> list[int]:
    """What each host must send of a micro-batch's `least_bytes`, forward and backward; EP groups are ranks in a row."""
    least_R = [0] * len(rows_R)
    total = 0
    for first in range(0, len(rows_R), ep_size):
        for masks in zip(*(row["masks"] for row in rows_R[first : first + ep_size]), strict=True):
            total += least_bytes(masks, HIDDEN, element_size=4)
            for source, mask_TE in enumerate(masks):
                for target, local_TL in enumerate(mask_TE.chunk(ep_size, dim=1)):
                    if source != target:
                        rows, pairs = int(local_TL.any(dim=1).sum()), int(local_TL.sum())
                        least_R[first + source] += rows * (2 * 4 * HIDDEN + (local_TL.shape[1] + 7) // 8) + 4 * pairs
                        least_R[first + target] += rows * 2 * 4 * HIDDEN + 4 * pairs
    assert sum(least_R) == total
    return least_R


def check_wire(got: list[Rows], ep_size: int) -> list[dict[str, Any]]:
    """Each host sends what routing needs, all together the gradients' collectives, and 5% for headers; a row each."""
    ranks, table = len(got), []
    for stage in (1, 2):
        for index, rows in enumerate(zip(*(own[stage] for own in got), strict=True)):
            least_R = least_by_host(list(rows), ep_size)
            boundary, least = rows[0]["is_boundary"], sum(least_R)
            # A ring over n hosts sends the tensor n - 1 times to add it up, and as often again to hand it round.
            copies = ranks // ep_size
            around = rows[0]["dense_bytes"] * (ranks - 1) + rows[0]["expert_bytes"] * (copies - 1) * ep_size
            reduced = 2 * around if boundary or stage == 2 else 0
            gathered = around if boundary else 0
            sent = {part: sum(row[part] for row in rows) for part in ("forward", "backward", "step")}
            where = f"ZeRO-{stage}, {ep_size=}, {index=}: {least_R=} {reduced=} {gathered=} {sent=}"
            assert least > 500_000, f"too few bytes for headers and barriers not to matter; {where}"
            for least_here, row in zip(least_R, rows, strict=True):
                assert 0.99 * least_here <= 2 * row["forward"] <= 1.06 * least_here, f"{row['forward']=} {where}"
            assert 0.99 * reduced <= sent["backward"] - 0.5 * least <= 1.03 * reduced + 0.03 * least, where
            assert gathered <= sent["step"] <= 1.03 * gathered + 4000 * ranks, where
            table += [
                {"zero_stage": stage, "micro_batch": index, "host": host, "routing_least": least_here}
                | {"collectives_all_hosts": reduced + gathered}
                | {f"sent_{part}": row[part] for part in sent}
                for host, (least_here, row) in enumerate(zip(least_R, rows, strict=True))
            ]
    return table


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=slow)], ids=lambda size: f"{size}_hosts")
def hosts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("hosts") / "cluster", request.param, ssh=NO_SSH is None) as made:
        yield made


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, Any]]:
    """What DS_REMOE_CLUSTER_RESULTS, a file's name, is to keep."""
    kept: dict[str, Any] = {}
    yield kept
    if path := os.environ.get("DS_REMOE_CLUSTER_RESULTS"):
        what = (
            "Hosts as network namespaces of one machine, one rank each, fp32: losses against those of one host, and "
            "bytes that left each host's eth0 by its counters, per micro-batch, against the least that routing needs"
        )
        write_results(
            Path(path),
            what,
            ["DS_REMOE_SLOW=1", f"DS_REMOE_CLUSTER_RESULTS={path}", "pytest", "tests/test_cluster.py"],
            kept,
        )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.mark.parametrize("launcher", ["pdsh", pytest.param("no_ssh", marks=slow if NO_SSH is None else ())])
def test_hosts_train_as_one_host_does(
    launcher: str, hosts: Cluster, config: Path, figures: dict[str, Any], tmp_path: Path
) -> None:
    """At each ep_size, the losses of both ZeRO stages and the wire."""
    if launcher == "pdsh" and NO_SSH is not None:
        pytest.skip(NO_SSH)
    for ep_size in (2, 4)[: hosts.size // 2]:
        expected = on_one_host(tmp_path / f"one-host-{ep_size}", config, hosts.size, ep_size)
        got = on_hosts(hosts, tmp_path / f"hosts-{ep_size}", config, launcher, ep_size)
        check_losses(got, expected)
        figures[f"{hosts.size} hosts, ep_size {ep_size}, {launcher}"] = {
            "losses_equal_one_host": True,
            "wire": check_wire(got, ep_size),
        }


@slow
def test_a_token_crosses_once_to_another_host_with_two_ranks(hosts: Cluster, config: Path, tmp_path: Path) -> None:
    """hierarchical_all_to_all: the losses of the flat exchange, and the bytes of one row for each (token, host)."""
    if hosts.size != 2:
        pytest.skip("for two hosts")
    content = json.loads(config.read_text())
    content["remoe"]["moe"]["hierarchical_all_to_all"] = True
    hierarchical = tmp_path / "hierarchical.json"
    hierarchical.write_text(json.dumps(content))
    flat, once = (
        on_hosts(hosts, tmp_path / name, path, "no_ssh", 4, ranks_per_host=2)
        for name, path in (("flat", config), ("once", hierarchical))
    )
    for stage in (1, 2):
        for rank in range(4):
            losses = [[loss for row in run[rank][stage] for loss in row["losses"]] for run in (flat, once)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        for index, rows in enumerate(zip(*(own[stage] for own in once), strict=True)):
            for host in range(2):
                least_here = least_to_the_other_host(rows, host)
                sent, sent_flat = (run[2 * host][stage][index]["forward"] for run in (once, flat))
                where = f"ZeRO-{stage}, {index=}, {host=}: {sent=} {sent_flat=} {least_here=}"
                assert 0.99 * least_here <= sent <= 1.08 * least_here, where
                assert sent < sent_flat, where


def least_to_the_other_host(rows_R: Sequence[dict[str, Any]], host: int) -> int:
    """What a host of two ranks must send forward: its tokens, with masks and weights, and the others' results."""
    total = 0
    for rank, row in enumerate(rows_R):
        for mask_TE in row["masks"]:
            is_ours = rank // 2 == host
            wanted_TL = mask_TE.chunk(2, dim=1)[1 - host if is_ours else host]
            rows, pairs = int(wanted_TL.any(dim=1).sum()), int(wanted_TL.sum())
            total += rows * 4 * HIDDEN + (rows * ((wanted_TL.shape[1] + 7) // 8) + 4 * pairs if is_ours else 0)
    return total
