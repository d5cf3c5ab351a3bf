"""The embedded corpus: the standard library of the Python that runs, so that a first run needs no download."""

from __future__ import annotations

import importlib
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from ds_remoe.config.schema import StdlibSource
from ds_remoe.data.documents import DataError, Document

# Tests are left out of "library": many hold deliberately broken text. pydoc_data and encodings are domains themselves.
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings"})


def read_stdlib(source: StdlibSource) -> Iterator[Document]:
    """Documents of the domains "reference", "library", "headers" and "encodings", one domain after another.

    "reference" is the prose of `pydoc_data.topics` (one document a topic), "library" the Python code, "headers" the C
    API's headers, "encodings" the codec tables. Within a domain the order is that of the sorted names. Files without
    text are left out.

    Warns: UserWarning: a domain is not installed on this machine and is left out; the message names the folder.
    Raises: DataError: the standard library's code is not readable as files.
    """
    for domain, texts in (
        ("reference", _reference_texts),
        ("library", _library_texts),
        ("headers", _header_texts),
        ("encodings", _encoding_texts),
    ):
        yield from _capped(domain, texts, source.max_bytes_per_domain)


def stdlib_files() -> list[Path]:
    """Every file that the corpus is read from, sorted; the same list on machines with the same installation."""
    topics = _stdlib_root() / "pydoc_data" / "topics.py"
    return sorted({*_library_files(), *_header_files(), *_encoding_files(), *([topics] if topics.is_file() else [])})


def _capped(domain: str, texts: Callable[[], Iterator[str]], max_bytes: int | None) -> Iterator[Document]:
    """Documents of one domain up to and including the one that reaches `max_bytes` UTF-8 bytes."""
    total = 0
    for text in texts():
        if not text:
            continue
        document = Document(text, domain)
        yield document
        total += document.num_bytes
        if max_bytes is not None and total >= max_bytes:
            return


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _library_files() -> list[Path]:
    files: list[Path] = []
    for folder, subfolders, names in os.walk(_stdlib_root()):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]  # site-packages may be huge
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def _header_files() -> list[Path]:
    return sorted(Path(sysconfig.get_path("include")).rglob("*.h"))


def _encoding_files() -> list[Path]:
    return sorted((_stdlib_root() / "encodings").glob("*.py"))


def _reference_texts() -> Iterator[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        _warn_absent("reference", "the package pydoc_data", _stdlib_root())
        return
    for name in sorted(topics):
        yield topics[name]


def _library_texts() -> Iterator[str]:
    files = _library_files()
    if not files:
        raise DataError(
            f'remoe.data.source.type is "stdlib", but {_stdlib_root()} holds no Python files; use a Python that is '
            'installed with its library as files, or another source, such as {"type": "text", "paths": [...]}'
        )
    yield from map(_read_python, files)


def _header_texts() -> Iterator[str]:
    files = _header_files()
    if not files:
        _warn_absent("headers", "Python's C headers (often packaged as python3-dev)", sysconfig.get_path("include"))
    for path in files:
        yield path.read_text(encoding="utf-8")


def _encoding_texts() -> Iterator[str]:
    files = _encoding_files()
    if not files:
        _warn_absent("encodings", "the sources of the package encodings", _stdlib_root() / "encodings")
    yield from map(_read_python, files)


def _read_python(path: Path) -> str:
    """The text of a Python file in the encoding that it declares."""
    with tokenize.open(path) as file:
        return file.read()


def _warn_absent(domain: str, what: str, folder: Path | str) -> None:
    warnings.warn(
        f'the stdlib corpus goes on without its domain "{domain}": {what} is not installed in {folder}', stacklevel=2
    )
