"""What `ds-remoe doctor` checks before a run: each check compares the nodes' facts and says what to do."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from ds_remoe.launching.hosts import Host
from ds_remoe.launching.node import Facts

LEAST_SHM_BYTES = 1 << 30
SLOW_PAIR = 0.25
"""A pair of nodes with less than this share of the median bandwidth is reported."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        check: what was looked at.
        good: whether a run can start.
        found: what was seen.
        remedy: what to do; empty for a good one.
    """

    check: str
    good: bool
    found: str
    remedy: str = ""


Nodes = Mapping[Host, Facts]


def names(nodes: Nodes, interface: str | None = None) -> Finding:
    """The hostfile's names, and each node's own, mean a real address everywhere.

    Args:
        nodes: what they say.
        interface: whose address ranks give each other; without one they give what their node's own name means.
    """
    problems = []
    for host, facts in nodes.items():
        for name, addresses in facts.addresses.items():
            if interface and name in (host.name, facts.host):
                continue
            loopback = [text for text in addresses if ipaddress.ip_address(text.partition("%")[0]).is_loopback]
            if not addresses:
                problems.append(f"{host}: {name} does not resolve")
            elif loopback and len(nodes) > 1:
                problems.append(f"{host}: {name} is {loopback[0]}")
    if problems:
        remedy = (
            "mend /etc/hosts there (no 127.* for host names); or, where that is a node's own name, set "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to its network interface"
        )
        return Finding("host names", False, "; ".join(problems), remedy)
    found = "no name is loopback" if len(nodes) > 1 else "one node, whose ranks meet at 127.0.0.1"
    return Finding("host names", True, found)


def versions(nodes: Nodes) -> Finding:
    """Python and the packages are the same on all nodes."""
    odd = []
    for package in next(iter(nodes.values())).versions:
        odd += _differing(nodes, partial(_version, package))
    if odd:
        remedy = "run `bash launch/setup.sh` in the same commit on each node, or share one .venv"
        return Finding("package versions", False, "; ".join(odd), remedy)
    seen = next(iter(nodes.values())).versions
    found = ", ".join(f"{name} {seen[name]}" for name in ("python", "torch", "deepspeed"))
    return Finding("package versions", True, found)


def code(nodes: Nodes) -> Finding:
    """ds_remoe's sources are the same on all nodes."""
    odd = _differing(nodes, lambda facts: facts.code[:12])
    remedy = "check out the same commit on each node, without local changes" if odd else ""
    return Finding("ds_remoe's sources", not odd, "; ".join(odd) or f"sha256 {_first(nodes).code[:12]}", remedy)


def config(nodes: Nodes, path: str) -> Finding:
    """The configuration file is there and the same on all nodes."""
    odd = _differing(nodes, lambda facts: facts.config[:12] if facts.config else "missing")
    if odd or _first(nodes).config is None:
        found = "; ".join(odd) or f"{path} is missing"
        return Finding("configuration", False, found, f"put the same {path} on each node")
    return Finding("configuration", True, f"{path}, sha256 {str(_first(nodes).config)[:12]}")


def folder(nodes: Nodes, path: str) -> Finding:
    """What one node writes into the folder, the others read."""
    errors = [f"{host}: {facts.folders[path]}" for host, facts in nodes.items() if facts.folders[path]]
    if errors:
        remedy = "use a folder that all nodes share and may write to (NFS, Lustre); node-local disks break checkpoints"
        return Finding(f"folder {path}", False, "; ".join(errors), remedy)
    return Finding(f"folder {path}", True, "shared by all nodes" if len(nodes) > 1 else "can be written")


def port(nodes: Nodes, number: int) -> Finding:
    """Nobody listens on the port of rank 0's node."""
    error = _first(nodes).port_error
    if error is None:
        return Finding(f"port {number}", True, f"free on {next(iter(nodes))}")
    remedy = "end that process, often an orphan of a killed run, or take another --master_port"
    return Finding(f"port {number}", False, f"{next(iter(nodes))}: {error}", remedy)


def devices(nodes: Nodes) -> Finding:
    """Each node has a GPU for each of its ranks, or no node has any."""
    short = [f"{host}: {facts.devices} GPUs for {host.slots} ranks" for host, facts in nodes.items()]
    wrong = [text for text, (host, facts) in zip(short, nodes.items(), strict=True) if facts.devices < host.slots]
    if wrong and any(facts.devices for facts in nodes.values()):
        return Finding("GPUs", False, "; ".join(wrong), "lower slots in the hostfile, or see `nvidia-smi` there")
    return Finding("GPUs", True, "none, ranks take the CPU" if wrong else "one for each rank")


def shared_memory(nodes: Nodes) -> Finding:
    """The ranks of a node have room in /dev/shm for what they exchange."""
    small = [
        f"{host}: {facts.shm_bytes >> 20} MiB"
        for host, facts in nodes.items()
        if host.slots > 1 and facts.shm_bytes < LEAST_SHM_BYTES
    ]
    remedy = "give the container more, e.g. docker run --shm-size=16g" if small else ""
    return Finding("/dev/shm", not small, "; ".join(small) or "large enough", remedy)


def bandwidth(hosts: Sequence[Host], table: Sequence[Sequence[float]]) -> Finding:
    """No pair of ranks is much slower than its like: pairs within a node and between nodes are judged apart."""
    node_of = [node for node, host in enumerate(hosts) for _ in range(host.slots)]
    texts, slow = [], []
    for between in (False, True):
        pairs = {
            (i, j): table[i][j]
            for i in range(len(node_of))
            for j in range(i + 1, len(node_of))
            if (node_of[i] != node_of[j]) == between
        }
        if not pairs:
            continue
        middle = median(pairs.values())
        texts.append(
            f"{'between' if between else 'within'} nodes {min(pairs.values()) / 1e9:.2f} to "
            f"{max(pairs.values()) / 1e9:.2f} GB/s each way"
        )
        bad = {pair: rate for pair, rate in pairs.items() if rate < SLOW_PAIR * middle}
        slow += [f"ranks {i} and {j}: {rate / 1e9:.3f} GB/s" for (i, j), rate in bad.items()]
    if slow:
        remedy = "look at the link, its negotiated speed and the interface (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)"
        return Finding("all-to-all", False, "; ".join(slow), remedy)
    return Finding("all-to-all", True, "; ".join(texts) or "one rank")


def _version(package: str, facts: Facts) -> str:
    return f"{package} {facts.versions[package]}"


def _first(nodes: Nodes) -> Facts:
    return next(iter(nodes.values()))


def _differing(nodes: Nodes, what: Callable[[Facts], str]) -> list[str]:
    """Each value with its nodes where they differ; nothing where they agree."""
    values = {host: what(facts) for host, facts in nodes.items()}
    counts = Counter(values.values())
    if len(counts) == 1:
        return []
    owners = {
        value: ", ".join(str(host) for host in values if values[host] == value) for value, _ in counts.most_common()
    }
    return [f"{value} on {hosts}" for value, hosts in owners.items()]
