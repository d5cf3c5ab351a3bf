"""Sources to documents: what is read, in which order, and what every bad input is told."""

from __future__ import annotations

import gzip
import json
import socket
import sysconfig
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_remoe.config.schema import FilesSource, HubSource, StdlibSource
from ds_remoe.data.corpus import read_corpus, source_state
from ds_remoe.data.dataset_corpus import source_files
from ds_remoe.data.documents import DataError, Document

ROWS: list[dict[str, Any]] = [
    {"text": "one\r\nline\u2028", "set": "a", "meta": {"x": 1}},
    {"text": "", "set": "b"},
    {"text": "zw\u00f6lf \U0001f600", "set": "a", "meta": {"x": "mixed types elsewhere do no harm"}},
]
DOCUMENTS = [Document(row["text"], row["set"]) for row in ROWS]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files(kind: Any, *paths: Path | str, **options: Any) -> FilesSource:
    return FilesSource(type=kind, paths=[str(path) for path in paths], **options)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a local source reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_jsonl_parquet_and_text_yield_their_documents(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "rows[1].jsonl", ROWS)
    jsonl.write_text(jsonl.read_text() + "\n")
    assert list(read_corpus(files("jsonl", jsonl, domain_column="set"))) == DOCUMENTS
    marked = tmp_path / "marked.jsonl"
    marked.write_text(jsonl.read_text(), encoding="utf-8-sig")
    assert list(read_corpus(files("jsonl", marked, domain_column="set"))) == DOCUMENTS
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8-sig") as file:
        file.write(jsonl.read_text())
    assert list(read_corpus(files("jsonl", tmp_path / "rows.jsonl.gz", domain_column="set"))) == DOCUMENTS

    columns = {"body": [row["text"] for row in ROWS], "other": [1, 2, 3], "set": [row["set"] for row in ROWS]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet", row_group_size=2)
    parquet = files("parquet", tmp_path / "rows.parquet", text_column="body", domain_column="set")
    assert list(read_corpus(parquet)) == DOCUMENTS

    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"first line of {name}\n\n  second \n")
    texts = files("text", tmp_path / "sub" / "c.txt", f"{tmp_path}/**/*.txt")
    assert [document.text.split()[3] for document in read_corpus(texts)] == ["sub/c.txt", "a.txt", "b.txt"]
    assert {document.domain for document in read_corpus(texts)} == {"text"}
    assert next(iter(read_corpus(texts))).text.endswith("\n\n  second \n")


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        ('{"text": "a"}\n{"text": 3}\n', {}, ["rows.jsonl, row 2, column 'text'", "3", "int"]),
        ('{"text": null}\n', {}, ["row 1, column 'text'", "NoneType"]),
        ('{"text": "a"}\n\n{"body": "b"}\n', {}, ["row 3", "no column 'text'", "['body']", "text_column"]),
        ('{"text": "a", "set": ["x"]}\n', {"domain_column": "set"}, ["row 1, column 'set'", "list"]),
        ('{"text": "a"}\n', {"domain_column": "set"}, ["row 1", "no column 'set'"]),
        ('{"text": "a"}\n{"text": \n', {}, ["row 2", "JSON"]),
        ('["text"]\n', {}, ["row 1", "object"]),
        ('{"text": "a\\ud800"}\n', {}, ["row 1, column 'text'", "character 1", "surrogate"]),
        ('{"text": "a"}\r\n\n{"text": "b"}\n{"text": "\xff"}\n', {}, ["rows.jsonl, line 4: byte 0xff", "UTF-8"]),
        ('{"text": "a"}\n{"text": "\xc3', {}, ["rows.jsonl, line 2: byte 0xc3", "UTF-8"]),
        ('{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n', {}, ["rows.jsonl, row 2", "BOM"]),
    ],
)
def test_bad_jsonl_is_refused(tmp_path: Path, content: str, options: dict[str, str], told: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as error:
        list(read_corpus(files("jsonl", path, **options)))
    for part in told:
        assert part in str(error.value)


def test_bad_parquet_text_and_paths_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [b"bytes"], "id": [7]}), tmp_path / "rows.parquet")
    (tmp_path / "latin.txt").write_bytes(b"an\n\xe9t\xe9")
    (tmp_path / "latin.txt.gz").write_bytes(gzip.compress(b"an\n\xe9t\xe9"))
    cases = [
        (files("parquet", tmp_path / "rows.parquet"), r"rows\.parquet, row 1, column 'text'.*bytes"),
        (files("parquet", tmp_path / "rows.parquet", text_column="id"), "column 'id'.*7.*int"),
        (files("parquet", tmp_path / "rows.parquet", text_column="no"), r"rows\.parquet: there is no column 'no'"),
        (files("parquet", tmp_path / "latin.txt"), r"latin\.txt cannot be read"),
        (files("text", tmp_path / "latin.txt"), r"latin\.txt, line 2: byte 0xe9 is not UTF-8"),
        (files("text", tmp_path / "latin.txt.gz"), r"latin\.txt\.gz, line 2: byte 0xe9 is not UTF-8"),
        (files("text", tmp_path / "none.txt"), r"remoe\.data\.source\.paths.*none\.txt"),
        (files("text", f"{tmp_path}/*.md"), r"remoe\.data\.source\.paths.*\*\.md"),
        (files("text", tmp_path), r"remoe\.data\.source\.paths holds the folder"),
    ]
    for source, message in cases:
        with pytest.raises(DataError, match=message):
            list(read_corpus(source))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.usefixtures("no_network")
def test_hub_source_reads_what_load_dataset_takes_as_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": text, "set": "s", "id": 1} for text in "abc"])
    source = HubSource(type="hub", name=str(folder), streaming=streaming, domain_column="set", max_documents=2)
    assert list(read_corpus(source)) == [Document("a", "s"), Document("b", "s")]
    for change, message in (
        ({"split": "nope"}, r"remoe\.data\.source\.name.*nope"),
        ({"text_column": "body"}, r"no column 'body'"),
        ({"text_column": "id"}, r"row 1, column 'id'.*int"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_corpus(source.model_copy(update=change)))


def test_a_file_under_two_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    source = FilesSource(type="text", paths=["a.txt", str(tmp_path / "a.txt"), "*.txt"])
    assert source_files(source) == [Path("a.txt")]


def test_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"remoe\.data\.source\.name: the dataset no-such/corpus \(en\), split 'train'.*local"
    ):
        list(read_corpus(HubSource(type="hub", name="no-such/corpus", config="en", max_documents=1)))


def test_source_state_follows_the_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    source, folder = files("jsonl", path), HubSource(type="hub", name=str(tmp_path))
    before = source_state(source), source_state(folder)
    assert (source_state(source), source_state(folder)) == before
    write_jsonl(path, ROWS[:2])
    assert source_state(source) != before[0]
    assert source_state(folder) != before[1]
    assert source_state(StdlibSource()) == source_state(StdlibSource())


def test_stdlib_domains_are_capped_sorted_and_repeatable() -> None:
    limit = 40_000
    source = StdlibSource(max_bytes_per_domain=limit)
    documents = list(read_corpus(source))
    assert list(read_corpus(source)) == documents
    domains = list(dict.fromkeys(document.domain for document in documents))
    expected = ["reference", "library", "headers", "encodings"]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        expected.remove("headers")
    assert domains == expected
    for domain in domains:
        sizes = [document.num_bytes for document in documents if document.domain == domain]
        assert sum(sizes[:-1]) < limit <= sum(sizes)
        assert min(sizes) > 0
    first_library = next(document for document in documents if document.domain == "library")
    assert first_library.text == Path(sysconfig.get_path("stdlib"), "__future__.py").read_text()


def test_stdlib_goes_on_without_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "include" else real(name))
    with pytest.warns(UserWarning, match=f'"headers".*{tmp_path}'):
        domains = {document.domain for document in read_corpus(StdlibSource(max_bytes_per_domain=1000))}
    assert domains == {"reference", "library", "encodings"}


def test_stdlib_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=f"stdlib.*{tmp_path} holds no Python files"):
        list(read_corpus(StdlibSource(max_bytes_per_domain=1000)))
