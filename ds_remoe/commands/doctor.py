"""`ds-remoe doctor`."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ds_remoe.commands.arguments import port, positive
from ds_remoe.config import load_run

if TYPE_CHECKING:
    from rich.table import Table

    from ds_remoe.commands.arguments import Commands
    from ds_remoe.launching.checks import Finding
    from ds_remoe.launching.hosts import Host
    from ds_remoe.launching.node import Facts, Request

_NODE_SECONDS = 120
_EXCHANGE_SECONDS = 300
_FORWARDED = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "NCCL_", "GLOO_", "FI_", "LD_LIBRARY_PATH")


def add_doctor(commands: Commands) -> None:
    """Parser of `ds-remoe doctor`."""
    description = (
        "Look at this machine, or at every node of a hostfile through ssh, before a long run: names, versions, "
        "sources, the configuration, shared folders, the port, and an all-to-all with its bandwidth per pair of ranks."
    )
    parser = commands.add_parser("doctor", help="check the nodes before a run", description=description)
    parser.add_argument("--hostfile", metavar="FILE", help="the nodes, as in launch/hostfile.example")
    parser.add_argument("--config", metavar="FILE", help="a run's file: it, and its folders, are looked at")
    parser.add_argument(
        "--set", dest="overrides", metavar="PATH=VALUE", action="append", default=[], help="change a value of the file"
    )
    parser.add_argument("--ranks", type=positive, help="of this machine, without a hostfile (default: 2)")
    parser.add_argument("--master_addr", metavar="A", help="address of the first node (default: its name)")
    parser.add_argument("--master_port", type=port, default=29500, metavar="P", help="default: 29500")
    parser.add_argument(
        "--brief",
        action="store_true",
        help="without the all-to-all, and say only what is wrong: what launch/multinode.sh does before each start",
    )
    parser.set_defaults(run=doctor)


def doctor(arguments: argparse.Namespace) -> int:
    """Check, show a table, and return 1 if a run could not start."""
    from rich.console import Console

    from ds_remoe.launching.hosts import Host, HostfileError, read_hostfile

    if problem := _usage_problem(arguments):
        print(problem, file=sys.stderr)
        return 2
    try:
        hosts = read_hostfile(Path(arguments.hostfile)) if arguments.hostfile else [Host(None, arguments.ranks or 2)]
    except HostfileError as error:
        print(error, file=sys.stderr)
        return 2
    folders: list[str] = []
    if arguments.config:
        world = sum(host.slots for host in hosts)
        run = load_run(arguments.config, arguments.overrides, world_size=world)
        folders = [run.remoe.train.output_dir, run.remoe.data.cache_dir]
    findings = _examine(hosts, arguments, folders)
    if arguments.brief:
        for finding in findings:
            if not finding.good:
                print(f"doctor: {finding.check}: {finding.found}\n    remedy: {finding.remedy}", file=sys.stderr)
    else:
        Console().print(_table(findings))
    return 0 if all(finding.good for finding in findings) else 1


def _usage_problem(arguments: argparse.Namespace) -> str | None:
    if arguments.overrides and arguments.config is None:
        return f"--set {arguments.overrides[0]}: changes a value of a run's file; add --config FILE"
    if arguments.ranks is not None and arguments.hostfile is not None:
        return f"--ranks {arguments.ranks}: the slots of --hostfile say how many ranks; leave it out"
    return None


def _examine(hosts: Sequence[Host], arguments: argparse.Namespace, folders: Sequence[str]) -> list[Finding]:
    """Every check; those that need all nodes only if all answered."""
    from ds_remoe.launching import checks
    from ds_remoe.launching.checks import Finding
    from ds_remoe.launching.hosts import run_module
    from ds_remoe.launching.node import Request

    names = tuple(host.name for host in hosts if host.name is not None)
    request = Request(names, arguments.config, tuple(dict.fromkeys(folders)), secrets.token_hex(8), "read")
    nodes, failed = _ask(hosts[:1], replace(request, action="write", port=arguments.master_port))
    if not failed:
        others, failed = _ask(hosts[1:], request)
        nodes |= others
        removal = json.dumps(asdict(replace(request, action="remove")))
        run_module(hosts[0], "ds_remoe.launching.node", stdin=removal, timeout=_NODE_SECONDS)
    if failed:
        return failed
    findings = [Finding("ssh", True, f"reaches {', '.join(names)}")] if names else []
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME")
    findings += [checks.names(nodes, interface), checks.versions(nodes), checks.code(nodes)]
    if arguments.config:
        findings.append(checks.config(nodes, arguments.config))
    findings += [checks.folder(nodes, folder) for folder in request.folders]
    findings += [checks.port(nodes, arguments.master_port), checks.shared_memory(nodes)]
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        findings.append(checks.devices(nodes))
    if arguments.brief:
        return findings
    if all(finding.good for finding in findings):
        findings.append(_exchange(hosts, nodes, arguments))
    else:
        findings.append(Finding("all-to-all", False, "not tried", "mend the others first"))
    return findings


def _exchange(hosts: Sequence[Host], nodes: Mapping[Host, Facts], arguments: argparse.Namespace) -> Finding:
    from ds_remoe.launching import checks
    from ds_remoe.launching.checks import Finding
    from ds_remoe.launching.hosts import run_on_all

    environment = {key: value for key, value in os.environ.items() if key.startswith(_FORWARDED)}
    if not any(facts.devices for facts in nodes.values()):
        environment["DS_ACCELERATOR"] = "cpu"
    address = arguments.master_addr or hosts[0].name or "127.0.0.1"
    world, commands = 0, []
    for host in hosts:
        commands.append([str(world), str(host.slots)])
        world += host.slots
    answers = run_on_all(
        hosts,
        "ds_remoe.launching.exchange",
        [[*own, str(world), address, str(arguments.master_port)] for own in commands],
        environment=environment,
        timeout=_EXCHANGE_SECONDS,
    )
    failed = [f"{host}: {answer.reason}" for host, answer in zip(hosts, answers, strict=True) if answer.code != 0]
    if failed:
        remedy = (
            f"all nodes must reach {address}:{arguments.master_port} and each other on any port (firewall); name the "
            "network interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or the address in --master_addr"
        )
        return Finding("all-to-all", False, "; ".join(failed), remedy)
    (table,) = [line for line in answers[0].output.splitlines() if line.startswith("[[")]
    return checks.bandwidth(hosts, json.loads(table))


def _ask(hosts: Sequence[Host], request: Request) -> tuple[dict[Host, Facts], list[Finding]]:
    """Facts of the nodes, and a finding for each that gave none."""
    from ds_remoe.launching.checks import Finding
    from ds_remoe.launching.hosts import run_on_all
    from ds_remoe.launching.node import Facts

    if not hosts:
        return {}, []
    nodes, findings = {}, []
    answers = run_on_all(
        hosts, "ds_remoe.launching.node", [[]] * len(hosts), stdin=json.dumps(asdict(request)), timeout=_NODE_SECONDS
    )
    for host, answer in zip(hosts, answers, strict=True):
        if answer.code == 0:
            nodes[host] = Facts(**json.loads(answer.output.splitlines()[-1]))
        elif not answer.reached:
            remedy = f"make `ssh {host} true` work without a password (ssh-copy-id, known_hosts)"
            findings.append(Finding(f"ssh {host}", False, answer.reason, remedy))
        else:
            remedy = (
                f"ds_remoe must run there from {Path.cwd()} by {sys.executable}: share this folder, or clone it to the "
                "same path there and run `bash launch/setup.sh`"
            )
            findings.append(Finding(f"node {host}", False, answer.reason, remedy))
    return nodes, findings


def _table(findings: Sequence[Finding]) -> Table:
    from rich.table import Table

    table = Table("", "check", "found", "remedy")
    for finding in findings:
        table.add_row("[green]✓[/]" if finding.good else "[red]✗[/]", finding.check, finding.found, finding.remedy)
    return table
