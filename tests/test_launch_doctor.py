"""`ds-remoe doctor`: what it sees on this machine, and what it makes of nodes that differ."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import free_port
from test_resume import run_config

from ds_remoe.launching import checks
from ds_remoe.launching.hosts import Host
from ds_remoe.launching.node import Facts

BIN = Path(sys.executable).parent
NODES = (Host("node-1", 2), Host("node-2", 2), Host("node-3", 2))
FACTS = Facts(
    host="node",
    versions={"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"},
    code="c" * 64,
    config="d" * 64,
    addresses={"node-1": ["10.0.0.1"], "node-2": ["10.0.0.2", "fe80::2%eth0"]},
    devices=0,
    folders={"runs/x": None},
    port_error=None,
    shm_bytes=1 << 34,
)


def nodes(**second: object) -> dict[Host, Facts]:
    """Three nodes, of which the second differs."""
    return {NODES[0]: FACTS, NODES[1]: replace(FACTS, **second), NODES[2]: FACTS}  # type: ignore[arg-type]


def test_nodes_that_agree_pass_every_check() -> None:
    same = nodes()
    found = [checks.names(same), checks.versions(same), checks.code(same), checks.config(same, "c.json")]
    found += [checks.folder(same, "runs/x"), checks.port(same, 1), checks.devices(same), checks.shared_memory(same)]
    assert [finding for finding in found if not finding.good or finding.remedy] == []


def test_a_node_that_differs_is_named_with_what_is_wrong_there() -> None:
    loopback = checks.names(nodes(addresses={"node-2": ["127.0.1.1"]}))
    assert checks.names(nodes(addresses={"node-2": ["127.0.1.1"]}), interface="eth0").good
    assert not checks.names(nodes(addresses={"node-3": ["127.0.1.1"]}), interface="eth0").good
    unknown = checks.names(nodes(addresses={"node-3": []}))
    versions = checks.versions(nodes(versions=FACTS.versions | {"deepspeed": "0.19.4"}))
    code = checks.code(nodes(code="e" * 64))
    config = checks.config(nodes(config=None), "c.json")
    folder = checks.folder(nodes(folders={"runs/x": "sees nothing of what the first node wrote there"}), "runs/x")
    memory = checks.shared_memory(nodes(shm_bytes=64 << 20))
    gpus = checks.devices({NODES[0]: replace(FACTS, devices=2), NODES[1]: replace(FACTS, devices=1)})
    for finding, seen in (
        (loopback, "node-2: node-2 is 127.0.1.1"),
        (unknown, "node-2: node-3 does not resolve"),
        (versions, "deepspeed 0.19.8 on node-1, node-3; deepspeed 0.19.4 on node-2"),
        (code, f"{'c' * 12} on node-1, node-3; {'e' * 12} on node-2"),
        (config, "missing on node-2"),
        (folder, "node-2: sees nothing"),
        (memory, "node-2: 64 MiB"),
        (gpus, "node-2: 1 GPUs for 2 ranks"),
    ):
        assert not finding.good
        assert seen in finding.found
        assert finding.remedy


def test_one_slow_link_is_named_and_links_within_a_node_are_not_its_measure() -> None:
    within, between = 50e9, 5e9
    table = [[within if i // 2 == j // 2 else between for j in range(6)] for i in range(6)]
    assert checks.bandwidth(NODES, table).good
    table[1][4] = 1e9
    slow = checks.bandwidth(NODES, table)
    assert not slow.good
    assert slow.found == "ranks 1 and 4: 1.000 GB/s"
    assert checks.bandwidth([Host(None, 1)], [[0.0]]).good


def doctor(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [f"{BIN}/ds-remoe", "doctor", *arguments]
    environment = {"PATH": f"{BIN}:/usr/bin:/bin", "COLUMNS": "200", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def test_this_machine_is_examined_for_real(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(run_config(tmp_path / "run", tmp_path / "data")))
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = str(taken.getsockname()[1])
        taken.listen()
        failed = doctor("--config", str(config), "--master_port", port)
    assert failed.returncode == 1, failed.stderr
    assert f"✗ │ port {port}" in failed.stdout
    assert "Address already in use" in failed.stdout
    good = doctor("--config", str(config), "--master_port", port)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "✗" not in good.stdout
    assert "GB/s" in good.stdout
    assert list(tmp_path.iterdir()) == [config], "it left something behind"


def test_what_cannot_be_reached_or_read_is_named(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("no-such-node.invalid slots=2\n")
    unreachable = doctor("--hostfile", str(hostfile))
    assert unreachable.returncode == 1
    assert "✗ │ ssh no-such-node.invalid" in unreachable.stdout
    assert doctor("--hostfile", str(tmp_path / "none")).returncode == 2
    assert doctor("--config", str(tmp_path / "none")).returncode == 2


def test_it_runs_in_the_folder_where_people_have_cloned_it(tmp_path: Path) -> None:
    """There a folder has the package's name, and `python -m` would take it for the package."""
    (tmp_path / "ds_remoe").mkdir()
    done = doctor("--brief", "--master_port", str(free_port()), folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--master_port", "99999"], "argument --master_port: 99999: must be between 1 and 65535"),
        (["--master_port", "0"], "argument --master_port: 0: must be between 1 and 65535"),
        (["--ranks", "0"], "argument --ranks: 0 is not positive"),
        (["--set", "remoe.moe.k=2"], "--set remoe.moe.k=2: changes a value of a run's file; add --config FILE"),
        (["--hostfile", "hosts", "--ranks", "2"], "--ranks 2: the slots of --hostfile say how many ranks"),
    ],
)
def test_wrong_use_is_refused(arguments: list[str], message: str) -> None:
    done = doctor("--brief", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
