"""What one node says of itself.

`python -m ds_remoe.launching.node` takes a request as JSON on stdin and prints the facts as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shlex
import shutil
import socket
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

PACKAGES = ("torch", "deepspeed", "numpy", "triton", "tokenizers", "sentencepiece", "pydantic")
_SHM = "/dev/shm"


@dataclass(frozen=True)
class Request:
    """What to look at.

    Attributes:
        names: host names to resolve.
        config: a configuration file; None for none.
        folders: that all nodes should share.
        nonce: content of a file in each folder.
        action: "write" that file, "read" it, or only "remove" it.
        port: to be free on this node; None where it does not matter.
    """

    names: tuple[str, ...] = ()
    config: str | None = None
    folders: tuple[str, ...] = ()
    nonce: str = ""
    action: Literal["write", "read", "remove"] = "read"
    port: int | None = None


@dataclass(frozen=True)
class Facts:
    """What a node found.

    Attributes:
        host: its own name.
        versions: of Python and the packages that matter; "missing" for one that is not there.
        code: SHA-256 of ds_remoe's sources.
        config: SHA-256 of the configuration file; None where it cannot be read.
        addresses: of each name, sorted; empty for one that does not resolve.
        devices: GPUs; 0 where ranks take the CPU.
        folders: of each, what is wrong with it; None if this node can write the nonce or reads it.
        port_error: why the port cannot be listened on, and which process does; None if it can.
        shm_bytes: free in /dev/shm.
    """

    host: str
    versions: dict[str, str]
    code: str
    config: str | None
    addresses: dict[str, list[str]]
    devices: int
    folders: dict[str, str | None]
    port_error: str | None
    shm_bytes: int


def facts(request: Request) -> Facts:
    """Look at this node."""
    import torch

    import ds_remoe

    return Facts(
        host=socket.gethostname(),
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        code=_digest(sorted(Path(ds_remoe.__file__).parent.rglob("*.py"))),
        config=_digest([Path(request.config)]) if request.config and Path(request.config).is_file() else None,
        addresses={name: _addresses(name) for name in (*request.names, socket.gethostname())},
        devices=torch.cuda.device_count(),
        folders={folder: _folder_error(Path(folder), request) for folder in request.folders},
        port_error=None if request.port is None else _port_error(request.port),
        shm_bytes=shutil.disk_usage(_SHM).free if Path(_SHM).is_dir() else 0,
    )


def remove_nonces(request: Request) -> None:
    """Take away what "write" made, a folder included that nothing else stands in."""
    for folder in request.folders:
        _nonce_file(Path(folder), request).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def _folder_error(folder: Path, request: Request) -> str | None:
    path = _nonce_file(folder, request)
    try:
        if request.action == "write":
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(request.nonce)
        return None if path.read_text() == request.nonce else f"{path} holds something else"
    except FileNotFoundError:
        return "sees nothing of what the first node wrote there"
    except OSError as error:
        return str(error)


def _nonce_file(folder: Path, request: Request) -> Path:
    return folder / f".doctor-{request.nonce}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _addresses(name: str) -> list[str]:
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)})
    except OSError:
        return []


def _port_error(port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does: TIME_WAIT is no obstacle
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            return f"{error.strerror or error}{_owner(port)}"
    return None


def _owner(port: int) -> str:
    """Who listens on a port, for messages."""
    import psutil  # type: ignore[import-untyped]

    try:
        pids = {
            c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == "LISTEN"
        }
        commands = [f"process {pid}: {shlex.join(psutil.Process(pid).cmdline())[:200]}" for pid in pids if pid]
    except (psutil.Error, OSError):
        commands = []
    return f" by {'; '.join(commands)}" if commands else f"; `ss -ltnp sport = :{port}` there shows by which process"


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    request = Request(**{**asked, "names": tuple(asked["names"]), "folders": tuple(asked["folders"])})
    if request.action == "remove":
        remove_nonces(request)
    else:
        print(json.dumps(asdict(facts(request))))
