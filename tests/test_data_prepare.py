"""Preparation: once, whole, by one process, and found again."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ds_remoe.config.schema import DataConfig, FilesSource, FileTokenizer, StdlibSource, TrainedTokenizer
from ds_remoe.data.documents import DataError
from ds_remoe.data.prepare import data_fingerprint, describe, prepare
from ds_remoe.data.store import SPLITS

# Runs in a process of its own; `hook` is put before the call and may change what the real preparation does.
CHILD = """
import os, signal, sys
from ds_remoe.config.schema import DataConfig
from ds_remoe.data import prepare, store
{hook}
done = prepare.prepare(DataConfig.model_validate_json(sys.argv[1]), 32, progress=False)
print(done.folder, len(done.train), int(done.train[0].sum()))
"""
COUNT_BUILDS = """
import time
build = prepare._build
def counted(*arguments):
    print("building", file=sys.stderr)
    time.sleep(1)  # so that the others do arrive meanwhile
    build(*arguments)
prepare._build = counted
"""
KILL = "def kill(*_): os.kill(os.getpid(), signal.SIGKILL)\n"


def configuration(tmp_path: Path, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "source": StdlibSource(max_bytes_per_domain=40_000),
        "tokenizer": TrainedTokenizer(vocab_size=600),
        "valid_fraction": 0.1,
        "cache_dir": str(tmp_path / "cache"),
    }
    return DataConfig(**settings | changes)


def small_configuration(tmp_path: Path) -> DataConfig:
    """A corpus that is prepared in a moment."""
    source = StdlibSource(max_bytes_per_domain=10_000)
    return configuration(tmp_path, source=source, tokenizer=TrainedTokenizer(vocab_size=512))


def start(config: DataConfig, hook: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(hook=hook), config.model_dump_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def folders(config: DataConfig) -> list[str]:
    return sorted(path.name for path in Path(config.cache_dir).iterdir() if path.is_dir())


def test_stdlib_is_prepared_end_to_end_and_found_again(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    prepared = prepare(config, 64, progress=True)
    assert prepared.domain_names == ["reference", "library", "headers", "encodings"]
    for split in SPLITS:
        assert all(size.documents > 0 and size.num_bytes > 0 for size in prepared.sizes[split])
    assert prepared.train[0].shape == (65,)
    assert prepared.train[0][0] == prepared.tokenizer.bos_id
    first = prepared.tokenizer.decode(prepared.train[0])
    assert len(first) > 64
    from pydoc_data.topics import topics

    assert any(text.startswith(first) for text in topics.values())

    console = Console(width=150, record=True, file=io.StringIO())
    console.print(describe(prepared))
    table = console.export_text()
    assert f"{sum(size.tokens for size in prepared.sizes['train']):,}" in table
    assert "encodings" in table

    files = {path: path.stat() for path in prepared.folder.iterdir()}
    again = prepare(config, 32, progress=False)
    assert {path: path.stat() for path in again.folder.iterdir()} == files
    assert again.fingerprint == prepared.fingerprint
    assert len(again.train) in (2 * len(prepared.train), 2 * len(prepared.train) + 1)
    assert not list(Path(config.cache_dir).glob("*.partial"))


def test_fingerprint_follows_all_that_the_tokens_depend_on(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one")
    config = configuration(tmp_path, source=FilesSource(type="text", paths=[str(text)]))
    first = data_fingerprint(config)
    assert data_fingerprint(config.model_copy(update={"cache_dir": "elsewhere"})) == first
    assert data_fingerprint(config.model_copy(update={"valid_fraction": 0.2})) != first
    assert data_fingerprint(config.model_copy(update={"tokenizer": TrainedTokenizer(vocab_size=700)})) != first
    text.write_text("another")
    assert data_fingerprint(config) != first


def test_an_existing_tokenizer_is_taken_and_kept_with_the_store(tmp_path: Path) -> None:
    trained = prepare(small_configuration(tmp_path), 64, progress=False)
    model = tmp_path / "own.model"
    model.write_bytes((trained.folder / "tokenizer.model").read_bytes())
    tokenizer = FileTokenizer(type="sentencepiece", path=str(model))
    config = small_configuration(tmp_path).model_copy(update={"tokenizer": tokenizer})
    prepared = prepare(config, 64, progress=False)
    assert prepared.folder != trained.folder
    assert prepared.tokenizer.fingerprint == trained.tokenizer.fingerprint
    np.testing.assert_array_equal(prepared.train.token_stream, trained.train.token_stream)


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(50)) + '{"text": 1}\n')
    config = configuration(tmp_path, source=FilesSource(type="jsonl", paths=[str(rows)]))
    with pytest.raises(DataError, match=r"rows\.jsonl, row 51"):
        prepare(config, 8, progress=False)
    assert folders(config) == []


@pytest.mark.parametrize("point", ["store.TokenStoreWriter.finish = kill", "os.rename = kill"])
def test_a_killed_preparation_leaves_no_store_and_is_done_again(tmp_path: Path, point: str) -> None:
    config = small_configuration(tmp_path)
    child = start(config, KILL + point)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, errors
    name = data_fingerprint(config)[:16]
    assert folders(config) == [f"{name}.partial"]
    prepared = prepare(config, 32, progress=False)
    assert len(prepared.train) > 0
    assert folders(config) == [name]


def test_processes_that_start_together_prepare_once(tmp_path: Path) -> None:
    config = small_configuration(tmp_path)
    children = [start(config, COUNT_BUILDS) for _ in range(3)]
    results = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], results
    assert len({output for output, _ in results}) == 1
    assert sum(errors.count("building") for _, errors in results) == 1
    assert folders(config) == [data_fingerprint(config)[:16]]
