"""From a configured source to a stream of documents."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ds_remoe.config.schema import FilesSource, HubSource, Source, StdlibSource
from ds_remoe.data.dataset_corpus import read_files, read_hub, source_files
from ds_remoe.data.documents import Document
from ds_remoe.data.stdlib_corpus import read_stdlib, stdlib_files


def read_corpus(source: Source) -> Iterator[Document]:
    """The documents of `source`, in an order that depends on the source alone.

    Raises: DataError: the source is not readable; the message names the path, column or row.
    """
    if isinstance(source, StdlibSource):
        return read_stdlib(source)
    if isinstance(source, FilesSource):
        return read_files(source)
    return read_hub(source)


def source_state(source: Source) -> dict[str, str]:
    """What the documents depend on besides the configuration, as text for a fingerprint; cheap, reads no content.

    Local files enter with size and modification time; the standard library with Python's version and its files'
    sizes. A dataset of the hub has no state here: it is taken to be what it was when it was first prepared.
    """
    if isinstance(source, StdlibSource):
        # No modification times: nodes of a cluster that install the same Python agree on the fingerprint.
        return {"python": sys.version, "files": _digest(f"{path}:{path.stat().st_size}" for path in stdlib_files())}
    if isinstance(source, FilesSource):
        return {"files": _digest(map(_stamp, source_files(source)))}
    if isinstance(source, HubSource) and Path(source.name).is_dir():
        files = sorted(path for path in Path(source.name).rglob("*") if path.is_file())
        return {"files": _digest(map(_stamp, files))}
    return {}


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.absolute()}:{status.st_size}:{status.st_mtime_ns}"


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
