"""Documents from local files and from the Hugging Face hub, read through `datasets`.

`datasets` is imported when a source needs it: its import takes over a second. Local files go through its readers of
single formats (`IterableDataset.from_*`), which make no request to the hub, unlike `load_dataset`.
"""

from __future__ import annotations

import glob
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from ds_remoe.config.schema import FilesSource, HubSource
from ds_remoe.data.documents import DataError, Document

_DEFAULT_DOMAIN = "text"


def source_files(source: FilesSource) -> list[Path]:
    """The files that `source.paths` name, patterns in their order and the matches of each sorted; every file once.

    Raises: DataError: a path does not exist, a pattern matches no file, or a path is a folder.
    """
    found: dict[Path, Path] = {}
    for pattern in source.paths:
        if Path(pattern).is_dir():
            raise DataError(
                f"remoe.data.source.paths holds the folder {pattern!r}; name files or a pattern, such as "
                f"{os.path.join(pattern, '*')}"
            )
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise DataError(
                f"remoe.data.source.paths: {pattern!r} matches no file (read from {Path.cwd()}); correct or remove it"
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read_files(source: FilesSource) -> Iterator[Document]:
    """Documents of local files, in the order of `source_files` and of the rows in each.

    A text file is one document, its line ends read as "\\n". A JSONL file has one object a line; blank lines are no
    documents, and a byte order mark is read over. Compressed JSONL and text (.gz, .bz2, .xz, .zst) is unpacked while it
    is read.

    Raises: DataError: naming path, column and row, when a file cannot be decoded, lacks a column, or holds a text or
        domain that is not a string.
    """
    from datasets import IterableDataset

    with tempfile.TemporaryDirectory(prefix="ds-remoe-datasets-") as cache_dir:
        for path in source_files(source):
            # datasets takes every path for a pattern: a file named a[1].txt would otherwise silently match nothing.
            literal = glob.escape(str(path.absolute()))
            if source.type == "text":
                with _reading_text(path):
                    texts = [
                        row["text"]
                        for row in IterableDataset.from_text(literal, cache_dir=cache_dir, sample_by="document")
                    ]
                yield from (Document(text, _DEFAULT_DOMAIN) for text in texts)
                continue
            if source.type == "jsonl":
                with _reading(path):
                    lines = IterableDataset.from_text(literal, cache_dir=cache_dir)
                rows = _json_rows(path, lines)
            else:
                rows = _parquet_rows(path, literal, cache_dir, _columns(source))
            yield from _documents(rows, str(path), source)


def read_hub(source: HubSource) -> Iterator[Document]:
    """Documents of a dataset of the hub, or of a local folder that `datasets.load_dataset` takes as a name.

    With `streaming`, rows are fetched while they are read; at most `max_documents` are taken.

    Raises: DataError: naming remoe.data.source.name, when the dataset cannot be reached or lacks the split, the
        configuration or a column; naming the row when a text or domain is not a string.
    """
    from datasets import load_dataset

    label = source.name if source.config is None else f"{source.name} ({source.config})"
    with _reaching(source, label):
        dataset = load_dataset(source.name, source.config, split=source.split, streaming=source.streaming)
        columns = dataset.column_names
    if columns is not None:
        _require_columns(label, columns, _columns(source))
        dataset = dataset.select_columns(_columns(source))
    rows = islice(_hub_rows(source, label, dataset), source.max_documents)
    yield from _documents(rows, label, source)


def _columns(source: FilesSource | HubSource) -> list[str]:
    columns = [source.text_column]
    if source.domain_column is not None and source.domain_column != source.text_column:
        columns.append(source.domain_column)
    return columns


def _documents(
    rows: Iterable[tuple[int, dict[str, Any]]], label: str, source: FilesSource | HubSource
) -> Iterator[Document]:
    """Documents of numbered rows (counted from 1), each checked."""
    for number, row in rows:
        _require_columns(f"{label}, row {number}", row, _columns(source))
        values = [row[column] for column in _columns(source)]
        for column, value in zip(_columns(source), values, strict=True):
            _require_text(value, f"{label}, row {number}, column {column!r}")
        domain = _DEFAULT_DOMAIN if source.domain_column is None else values[-1]
        yield Document(values[0], domain)


def _require_columns(where: str, present: Iterable[str], wanted: list[str]) -> None:
    missing = [column for column in wanted if column not in present]
    if missing:
        raise DataError(
            f"{where}: there is no column {missing[0]!r}, only {sorted(present)}; set "
            "remoe.data.source.text_column and remoe.data.source.domain_column to columns that exist"
        )


def _require_text(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a string, found {value!r:.80} of type {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start} is a lone surrogate, which is not valid Unicode") from None


def _json_rows(path: Path, lines: Iterable[dict[str, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    # Read as lines and parsed here: the reader for JSON casts a column to the type of the first rows it saw.
    iterator = enumerate(lines, start=1)
    while True:
        with _reading_text(path):
            number, line = next(iterator, (0, {"text": ""}))
        if number == 0:
            return
        text = line["text"].removeprefix("\ufeff") if number == 1 else line["text"]
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, row {number}: not a line of JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected a JSON object, found {text!r:.80}")
        yield number, row


def _parquet_rows(path: Path, literal: str, cache_dir: str, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    from datasets import IterableDataset
    from pyarrow.parquet import ParquetFile

    with _reading(path):
        names = IterableDataset.from_parquet(literal, cache_dir=cache_dir).column_names
        _require_columns(str(path), names, columns)
        if ParquetFile(path).metadata.num_rows == 0:
            return  # `datasets` cannot make batches of a file without rows
        rows = enumerate(IterableDataset.from_parquet(literal, cache_dir=cache_dir, columns=columns), start=1)
    while True:
        with _reading(path):
            numbered = next(rows, None)
        if numbered is None:
            return
        yield numbered


def _hub_rows(source: HubSource, label: str, dataset: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = enumerate(dataset, start=1)
    while True:
        with _reaching(source, label):
            numbered = next(rows, None)
        if numbered is None:
            return
        yield numbered


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Give every failure of a reader the file's path."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, EOFError) as error:  # pyarrow's errors and UnicodeDecodeError are ValueErrors
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def _reading_text(path: Path) -> Iterator[None]:
    """As `_reading`, and name the line of a byte that is not UTF-8, where a reader knows its place in a chunk."""
    with _reading(path):
        try:
            yield
        except UnicodeDecodeError:
            _refuse_wrong_byte(path)
            raise


def _refuse_wrong_byte(path: Path) -> None:
    from fsspec import open as open_unpacked

    # Latin-1 keeps every byte and cuts lines where UTF-8 does.
    with open_unpacked(str(path.absolute()), "rt", compression="infer", encoding="latin-1") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.encode("latin-1").decode()
            except UnicodeDecodeError as error:
                wrong = error.object[error.start]
                raise DataError(
                    f"{path}, line {number}: byte {wrong:#04x} is not UTF-8; save the file as UTF-8"
                ) from None


@contextmanager
def _reaching(source: HubSource, label: str) -> Iterator[None]:
    """Turn the many ways in which a dataset cannot be had (network, name, split, format) into one error."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"remoe.data.source.name: the dataset {label}, split {source.split!r}, cannot be loaded: "
            f"{type(error).__name__}: {error}. Check name, config and split, that this machine reaches the hub and "
            "that it may read the dataset (HF_TOKEN); without a network, use a source of local files"
        ) from error
