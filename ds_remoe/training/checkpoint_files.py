"""The files of a checkpoint on the disk: flushed and hashed after a save, checked before a load."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ds_remoe.training.manifest import MANIFEST, CheckpointError, FileRecord, Manifest

_CHUNK_BYTES = 4 << 20

Advance = Callable[[int], None]
"""Takes the number of bytes read since its last call."""


def record_file(path: Path) -> FileRecord:
    """Force a file to the disk and hash it.

    Raises:
        CheckpointError: it is a file of `torch.save` that a load would refuse, because unpickling it would run code.
    """
    from ds_remoe.deepspeed_checkpoint_io import unsafe_globals

    with path.open("rb") as file:
        os.fsync(file.fileno())
    unsafe = unsafe_globals(path) if path.suffix == ".pt" else []
    if unsafe:
        raise CheckpointError(
            f"{path}: holds {', '.join(unsafe)}, which a resume would refuse to load; keep only tensors, numbers and "
            "texts in the states of model, optimizer and scheduler"
        )
    return FileRecord(path.stat().st_size, sha256_of(path))


def sha256_of(path: Path, advance: Advance | None = None) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits, a few megabytes in memory at a time."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()


def share_out(files: Mapping[str, FileRecord], shares: int) -> list[list[str]]:
    """Files by name in `shares` lists of nearly the same bytes, the same on every rank."""
    parts: list[list[str]] = [[] for _ in range(shares)]
    sizes = [0] * shares
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        least = sizes.index(min(sizes))
        parts[least].append(name)
        sizes[least] += files[name].size
    return parts


def file_problem(checkpoint: Path, name: str, record: FileRecord, *, advance: Advance | None = None) -> str | None:
    """What is wrong with a file, compared with the manifest's record of it; None if nothing is.

    Nothing is unpickled. A file that runs code when it is unpickled is wrong, also where its hash is right.
    """
    try:
        return _file_problem(checkpoint, name, record, advance)
    except OSError as error:
        return f"{checkpoint / name}: cannot be read ({error})"


def _file_problem(checkpoint: Path, name: str, record: FileRecord, advance: Advance | None) -> str | None:
    from ds_remoe.deepspeed_checkpoint_io import UnsafeFileError, unsafe_globals

    path = checkpoint / name
    size = size_problem(checkpoint, name, record)
    if size is not None:
        return size + _origin(checkpoint, name, sha256_of(path)) if path.is_file() else size
    if record.sha256 is not None:
        digest = sha256_of(path, advance)
        if digest != record.sha256:
            changed = f"{path}: its content is not what was saved (SHA-256 {digest[:12]}…, saved {record.sha256[:12]}…)"
            return changed + _origin(checkpoint, name, digest)
    try:
        unsafe = unsafe_globals(path) if path.suffix == ".pt" else []
    except UnsafeFileError as error:
        return str(error)
    return f"{path}: loading it would run {', '.join(unsafe)}" if unsafe else None


def size_problem(checkpoint: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with a file at first sight: missing, or of another size than was saved."""
    path = checkpoint / name
    if not path.is_file():
        return f"{path}: missing, though the manifest names it"
    size = path.stat().st_size
    return f"{path}: {size} bytes, but {record.size} were saved" if size != record.size else None


def unnamed_files(checkpoint: Path, named: Collection[str]) -> list[Path]:
    """Files of the folder, at any depth, that are neither named nor the manifest."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return [path for path in files if path.name != MANIFEST and str(path.relative_to(checkpoint)) not in named]


def unnamed_problems(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Files that were not saved, but which DeepSpeed could take for part of the checkpoint, as it goes by names."""
    strange = (path for path in unnamed_files(checkpoint, manifest.files) if path.suffix == ".pt")
    return [f"{path}: not of this checkpoint: the manifest does not name it; remove it" for path in strange]


def _origin(checkpoint: Path, name: str, digest: str) -> str:
    """Where a file that does not belong here comes from, if the manifests of this run's checkpoints know."""
    for sibling in sorted(checkpoint.parent.iterdir()):
        if not (sibling / MANIFEST).is_file():
            continue
        try:
            files = Manifest.read(sibling).files
        except CheckpointError:
            continue
        for other, record in files.items():
            if record.sha256 == digest and (sibling, other) != (checkpoint, name):
                return f"; it is {sibling.name}/{other}"
    return ""
