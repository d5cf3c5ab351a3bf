"""From a data configuration to an open token store: built once, by one process, and found again by everyone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ds_remoe.config.schema import DataConfig, FileTokenizer
from ds_remoe.data.corpus import read_corpus, source_state
from ds_remoe.data.documents import DataError, Document
from ds_remoe.data.store import SPLITS, DomainSize, PackedDataset, Split, TokenStoreWriter, read_sizes, sync
from ds_remoe.data.tokenizer import Tokenizer, configured_tokenizer, load_tokenizer
from ds_remoe.data.tokenizer_training import TrainingSample, train_sentencepiece

_FORMAT = 1  # of the folder; raise it when its files change, and old folders are left alone


@dataclass(frozen=True)
class PreparedData:
    """An open token store."""

    folder: Path
    """Holds the tokenizer's file and the splits."""
    fingerprint: str
    """SHA-256 of all that the store depends on, in hexadecimal; equal fingerprints mean equal tokens."""
    tokenizer: Tokenizer
    train: PackedDataset
    valid: PackedDataset
    sizes: dict[Split, list[DomainSize]]
    """Documents, tokens and bytes of each split, by domain in the order of the domains' ids."""

    @property
    def domain_names(self) -> list[str]:
        """Names of the domains, at the index of their ids."""
        return self.train.domain_names


def prepare(data: DataConfig, seq_length: int, *, progress: bool) -> PreparedData:
    """Tokenise the corpus unless that was done before, and open the result.

    Call it on every rank: of all processes that share remoe.data.cache_dir, one prepares while the others wait for its
    file lock. The folder appears under its name when it is complete and on the disk, so a killed preparation leaves
    nothing but a ".partial" folder that the next one removes. A trained tokenizer makes it read the source twice.

    Args:
        seq_length: tokens of a sample less one; the store on the disk does not depend on it.
        progress: show a progress line on the process that prepares.

    Raises: DataError: source, tokenizer or split is not usable; the message names the field and the remedy.
    """
    fingerprint = data_fingerprint(data)
    cache_dir = Path(data.cache_dir)
    folder = cache_dir / fingerprint[:16]
    if not folder.is_dir():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise DataError(f"remoe.data.cache_dir = {data.cache_dir!r}: cannot be made ({error})") from error
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _build(data, folder, fingerprint, progress)
    try:
        return _open(folder, fingerprint, seq_length)
    except DataError:
        raise
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: damaged ({error}); remove it to have it prepared again") from error


def _open(folder: Path, fingerprint: str, seq_length: int) -> PreparedData:
    description = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    if description["fingerprint"] != fingerprint:
        raise DataError(f"{folder} belongs to another data configuration; remove it to have it prepared again")
    return PreparedData(
        folder=folder,
        fingerprint=fingerprint,
        tokenizer=load_tokenizer(folder / description["tokenizer"], description["tokenizer_type"]),
        train=PackedDataset(folder, "train", seq_length),
        valid=PackedDataset(folder, "valid", seq_length),
        sizes=read_sizes(folder),
    )


def data_fingerprint(data: DataConfig) -> str:
    """SHA-256 of the data configuration (less cache_dir) and of the state of the files that it names.

    Raises: DataError: a file that the configuration names is missing.
    """
    state: dict[str, Any] = {
        "format": _FORMAT,
        "config": data.model_dump(mode="json", exclude={"cache_dir"}),
        "source": source_state(data.source),
    }
    if isinstance(data.tokenizer, FileTokenizer):
        state["tokenizer"] = configured_tokenizer(data.tokenizer).fingerprint
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def describe(prepared: PreparedData) -> Table:
    """A table of documents, tokens, bytes and samples by split and domain."""
    title = f"{prepared.folder}: {prepared.tokenizer.name}, {prepared.tokenizer.vocab_size} tokens in the vocabulary"
    table = Table(title=title, title_justify="left")
    for heading in ("split", "domain"):
        table.add_column(heading)
    for heading in ("documents", "MB", "tokens", "bytes/token", "samples"):
        table.add_column(heading, justify="right")
    for split in SPLITS:
        sizes = prepared.sizes[split]
        total = DomainSize(
            "all", sum(s.documents for s in sizes), sum(s.tokens for s in sizes), sum(s.num_bytes for s in sizes)
        )
        samples = len(prepared.train if split == "train" else prepared.valid)
        for size in (*sizes, total):
            table.add_row(
                split,
                size.domain,
                f"{size.documents:,}",
                f"{size.num_bytes / 1e6:.2f}",
                f"{size.tokens:,}",
                f"{size.num_bytes / size.tokens:.2f}" if size.tokens else "-",
                f"{samples:,}" if size is total else "",
                end_section=size is total,
            )
    return table


def _build(data: DataConfig, folder: Path, fingerprint: str, progress: bool) -> None:
    """Build the store beside its final place and move it there. The caller holds the lock."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with _Reporter(progress) as reporter:
            tokenizer = _tokenizer(data, reporter)
            tokenizer_path = tokenizer.save(partial)
            writer = TokenStoreWriter(partial, tokenizer)
            for document in reporter.follow("tokenising", read_corpus(data.source)):
                writer.add(document)
            reporter.say("writing the splits")
            description = {
                "fingerprint": fingerprint,
                "tokenizer": tokenizer_path.name,
                "tokenizer_type": "huggingface" if tokenizer_path.suffix == ".json" else "sentencepiece",
                "config": data.model_dump(mode="json"),
            }
            (partial / "prepared.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
            writer.finish(data.valid_fraction)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(partial)
    os.rename(partial, folder)
    sync(folder.parent)


def _tokenizer(data: DataConfig, reporter: _Reporter) -> Tokenizer:
    if isinstance(data.tokenizer, FileTokenizer):
        return configured_tokenizer(data.tokenizer)
    sample = TrainingSample(data.tokenizer.max_training_bytes)
    for document in reporter.follow("reading a sample", read_corpus(data.source)):
        sample.add(document)
    reporter.say("training the tokenizer")
    return train_sentencepiece(data.tokenizer, sample)


class _Reporter:
    """One line that tells what the preparation is doing; silent when it is not shown."""

    def __init__(self, shown: bool) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, disable=not shown, transient=True)
        self._task = self._progress.add_task("")

    def __enter__(self) -> _Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, message: str) -> None:
        self._progress.update(self._task, description=f"data: {message}")

    def follow(self, message: str, documents: Iterable[Document]) -> Iterator[Document]:
        """Pass `documents` through, counting them and their bytes in the line."""
        num_bytes = 0
        for number, document in enumerate(documents, start=1):
            yield document
            num_bytes += document.num_bytes
            self.say(f"{message}: {number:,} documents, {num_bytes / 1e6:,.1f} MB")
