"""Several hosts on this machine: namespaces with their own address, host name, processes, /dev/shm and, if asked, sshd.

Nothing outside changes, and nothing stays: the namespaces have no names, so they go with their processes, and those die
with the process that made them, even where that is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

NET = "10.77.0"
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")
SSH_TOOLS = ("pdsh", "sshd", "ssh", "ssh-keygen")

_NODE = r"""
set -e
hostname "$1"
mount --make-rprivate /
mount -t sysfs sysfs /sys 2>/dev/null || true
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2/hosts" /etc/hosts
if [ -n "$3" ]; then
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir /run/sshd
    mount --bind "$2/ssh_config" /etc/ssh/ssh_config
    touch "$2/up-$1"
    exec "$3" -D -f "$2/sshd_config" -E "$2/sshd-$1.log"
fi
touch "$2/up-$1"
exec sleep infinity
"""


def why_not(tools: Sequence[str] = TOOLS) -> str | None:
    """The reason why hosts cannot be made here; None if they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs Linux and root, to make namespaces"
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        return (
            f"needs {', '.join(missing)} (Debian: apt install iproute2 util-linux openssh-server openssh-client pdsh)"
        )
    probe = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "ip", "link", "add", "type", "veth"]
    done = subprocess.run(probe, capture_output=True, text=True)
    return f"cannot make namespaces: {done.stderr.strip()}" if done.returncode else None


class Cluster:
    """Hosts node0, node1, ...; `cluster` makes and ends them."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.hostfile = folder / "hostfile"
        self._pids: list[int] = []

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """What runs `command` on a host, in this working directory."""
        return [
            "nsenter",
            "-t",
            str(self._pids[host]),
            "-m",
            "-u",
            "-i",
            "-n",
            "-p",
            f"--wd={Path.cwd()}",
            "--",
            *command,
        ]

    def start(self, host: int, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(host, command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def power_off(self, host: int) -> None:
        """Nothing more comes from it, not even the end of its connections; for good."""
        _run(self.command(host, ["ip", "link", "set", "eth0", "down"]))
        os.kill(self._pids[host], signal.SIGKILL)

    def _up(self, processes: list[subprocess.Popen[bytes]], sshd: str) -> None:
        names = [f"node{host}" for host in range(self.size)]
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{NET}.{host + 1} {name}\n" for host, name in enumerate(names))
        )
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
        if sshd:
            _write_ssh_files(self.folder, names)
        switch = _start(processes, ["unshare", "--net", "sleep", "infinity"])
        _wait_for(lambda: Path(f"/proc/{switch}/comm").read_text() == "sleep\n", "the switch")
        inside = ["nsenter", "-t", str(switch), "-n"]
        _run([*inside, "ip", "link", "add", "br0", "type", "bridge"])
        _run([*inside, "ip", "link", "set", "br0", "up"])
        apart = [
            "unshare",
            "--net",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
        ]
        parents = [_start(processes, [*apart, "sh", "-c", _NODE, "sh", name, str(self.folder), sshd]) for name in names]
        for host, (name, parent) in enumerate(zip(names, parents, strict=True)):
            _wait_for(lambda name=name: (self.folder / f"up-{name}").exists(), name)
            child = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0]
            self._pids.append(int(child))
            _run([*inside, "ip", "link", "add", f"p{host}", "type", "veth", "peer", "name", "eth0", "netns", child])
            _run([*inside, "ip", "link", "set", f"p{host}", "master", "br0", "up"])
            for line in ("link set lo up", f"addr add {NET}.{host + 1}/24 dev eth0", "link set eth0 up"):
                _run(["nsenter", "-t", child, "-n", "ip", *line.split()])

        for name in names if sshd else ():
            reach = self.command(0, ["ssh", name, "true"])
            _wait_for(lambda reach=reach: subprocess.run(reach, capture_output=True).returncode == 0, f"{name}'s sshd")


@contextmanager
def cluster(folder: Path, size: int, *, ssh: bool) -> Iterator[Cluster]:
    """`size` hosts, one rank each in the hostfile; with `ssh`, each reaches each as root."""
    folder.mkdir(parents=True)
    made, processes = Cluster(folder, size), list[subprocess.Popen[bytes]]()
    try:
        made._up(processes, (shutil.which("sshd") or "") if ssh else "")
        yield made
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def end_all(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Kill what was started on hosts; a host's other processes go with the host."""
    for process in processes:
        process.kill()
        process.wait()


def _write_ssh_files(folder: Path, names: Sequence[str]) -> None:
    for key in ("id", "host"):
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)])
    public = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text("".join(f"{name},{NET}.{i + 1} {public}\n" for i, name in enumerate(names)))
    client = {"User": "root", "IdentityFile": folder / "id", "IdentitiesOnly": "yes", "LogLevel": "ERROR"}
    client |= {"UserKnownHostsFile": folder / "known_hosts", "StrictHostKeyChecking": "yes", "ConnectTimeout": "5"}
    (folder / "ssh_config").write_text("Host *\n" + "".join(f"  {key} {value}\n" for key, value in client.items()))
    server = {"Port": "22", "HostKey": folder / "host", "AuthorizedKeysFile": folder / "id.pub", "StrictModes": "no"}
    server |= {"UsePAM": "no", "PasswordAuthentication": "no", "PermitRootLogin": "prohibit-password"}
    server |= {"UseDNS": "no", "PidFile": "none"}
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in server.items()))


def _start(processes: list[subprocess.Popen[bytes]], command: Sequence[str]) -> int:
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL)
    processes.append(process)
    return process.pid


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _wait_for(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come up"
        time.sleep(0.02)


def sent_bytes() -> int:
    """Bytes that have left this host through eth0; 0 where there is none, as on a single host."""
    found = subprocess.run(["ip", "-j", "-s", "link", "show", "eth0"], capture_output=True, text=True).stdout
    return int(json.loads(found)[0]["stats64"]["tx"]["bytes"]) if found.strip() else 0
