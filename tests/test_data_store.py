"""The token store: split by document, packing without loss, the domain of every token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from ds_remoe.data.documents import DataError, Document
from ds_remoe.data.store import SPLITS, PackedDataset, TokenStoreWriter, held_out_documents, read_sizes
from ds_remoe.data.tokenizer import HuggingFaceTokenizer


def byte_tokenizer(*special: str) -> HuggingFaceTokenizer:
    """A tokenizer of single bytes, whose ids are easy to foretell."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({name: i for i, name in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return HuggingFaceTokenizer(backend.to_str(), None)


WITH_BOS, WITHOUT_BOS = byte_tokenizer("<s>", "</s>"), byte_tokenizer("<|endoftext|>")


@contextmanager
def written(documents: list[Document], fraction: float, tokenizer: HuggingFaceTokenizer = WITH_BOS) -> Iterator[Path]:
    with TemporaryDirectory() as name:
        writer = TokenStoreWriter(Path(name), tokenizer)
        for document in documents:
            writer.add(document)
        writer.finish(fraction)
        yield Path(name)


def corpus(num_documents: int = 60) -> list[Document]:
    return [Document(f"document {i} " + "é" * (i % 7), ("red", "green", "blue")[i % 3]) for i in range(num_documents)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3)), min_size=1, max_size=40),
    st.floats(0.001, 0.999),
)
def test_split_keeps_equal_texts_together_and_serves_every_domain(rows: list[tuple[int, int]], fraction: float) -> None:
    hashes = np.array([row[0] for row in rows], dtype=np.uint64)
    domains = np.array([row[1] for row in rows], dtype=np.int16)
    held = held_out_documents(hashes, domains, fraction)
    assert not set(hashes[held]) & set(hashes[~held])
    for domain in set(domains):
        own = domains == domain
        if len(set(hashes[own])) > 1:
            assert held[own].any()
            shared = set(hashes[own]) & set(hashes[~own])
            assert shared or not held[own].all()


def test_split_of_a_document_does_not_depend_on_the_others() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, size=5000, dtype=np.uint64)
    domains = np.zeros(5000, dtype=np.int16)
    held = held_out_documents(hashes, domains, 0.1)
    assert 0.08 < held.mean() < 0.12
    np.testing.assert_array_equal(held_out_documents(hashes[:2500], domains[:2500], 0.1), held[:2500])


@pytest.mark.parametrize("tokenizer", [WITH_BOS, WITHOUT_BOS])
def test_every_document_is_whole_in_exactly_one_split(tokenizer: HuggingFaceTokenizer) -> None:
    documents = corpus()
    with written(documents, 0.3, tokenizer) as folder:
        found: list[str] = []
        for split in SPLITS:
            stream = PackedDataset(folder, split, 8).token_stream.tolist()
            assert stream[-1] == tokenizer.eos_id
            start = 0
            for end in [i for i, token in enumerate(stream) if token == tokenizer.eos_id]:
                ids = stream[start:end]
                if tokenizer.bos_id is not None:
                    assert ids.pop(0) == tokenizer.bos_id
                found.append(tokenizer.decode(ids))
                start = end + 1
        assert sorted(found) == sorted(document.text for document in documents)
        sizes = read_sizes(folder)
        assert all(size.documents > 0 for split in SPLITS for size in sizes[split])
        assert sum(size.documents for split in SPLITS for size in sizes[split]) == len(documents)
        assert sum(s.num_bytes for split in SPLITS for s in sizes[split]) == sum(d.num_bytes for d in documents)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200))
def test_packing_predicts_every_token_once(seq_length: int) -> None:
    with written(corpus(), 0.3) as folder:
        dataset = PackedDataset(folder, "train", seq_length)
        samples = [dataset[i] for i in range(len(dataset))]
        stream = dataset.token_stream.astype(np.int64)
        targets = np.concatenate([sample[1:] for sample in samples])
        inputs = np.concatenate([sample[:-1] for sample in samples])
        np.testing.assert_array_equal(targets, stream[1 : 1 + len(targets)])
        np.testing.assert_array_equal(inputs, stream[: len(inputs)])
        assert len(stream) - 1 - len(targets) < seq_length
        assert {sample.shape for sample in samples} == {(seq_length + 1,)}
        assert {sample.dtype for sample in samples} == {np.dtype(np.int64)}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200))
def test_domains_are_those_of_the_documents(seq_length: int) -> None:
    domain_of = {document.text: document.domain for document in corpus()}
    with written(corpus(), 0.3) as folder:
        dataset = PackedDataset(folder, "train", seq_length)
        names: list[str] = []
        stream = dataset.token_stream.tolist()
        start = 0
        for end in [i for i, token in enumerate(stream) if token == WITH_BOS.eos_id]:
            names += [domain_of[WITH_BOS.decode(stream[start:end])]] * (end + 1 - start)
            start = end + 1
        for i in range(len(dataset)):
            ids = dataset.domains(i)
            assert ids.dtype == np.int16
            window = slice(i * seq_length, (i + 1) * seq_length + 1)
            assert [dataset.domain_names[j] for j in ids] == names[window]
        sizes = read_sizes(folder)["train"]
        assert {size.domain: size.tokens for size in sizes} == {name: names.count(name) for name in set(names)}


def test_large_vocabularies_are_stored_whole() -> None:
    special = ["<s>", "</s>", *(f"<extra {i}>" for i in range(2**16))]
    tokenizer = byte_tokenizer(*special)
    with written(corpus(), 0.3, tokenizer) as folder:
        dataset = PackedDataset(folder, "train", 8)
        assert dataset.token_stream.dtype == np.uint32
        assert dataset.token_stream.max() >= 2**16
    with written(corpus(), 0.3) as folder:
        assert PackedDataset(folder, "train", 8).token_stream.dtype == np.uint16


def test_samples_outside_of_the_split_are_refused() -> None:
    with written(corpus(), 0.3) as folder:
        dataset = PackedDataset(folder, "valid", 8)
        for index in (-1, len(dataset)):
            with pytest.raises(IndexError, match=f"sample {index}"):
                dataset[index]
            with pytest.raises(IndexError, match=f"sample {index}"):
                dataset.domains(index)


def test_too_little_text_is_an_error_that_names_the_fields(tmp_path: Path) -> None:
    with written(corpus(), 0.05) as folder:
        tokens = sum(size.tokens for size in read_sizes(folder)["valid"])
        assert len(PackedDataset(folder, "valid", tokens - 1)) == 1
        message = (
            rf'"valid" split holds {tokens} tokens.*remoe\.model\.seq_length \+ 1 = {tokens + 1}: '
            r"raise remoe\.data\.valid_fraction"
        )
        with pytest.raises(DataError, match=message):
            PackedDataset(folder, "valid", tokens)
    for documents, message in (
        ([], r"remoe\.data\.source yields no documents"),
        (
            [Document("alone", "text")],
            r'"valid" split holds none of the 1 documents.*change remoe\.data\.valid_fraction',
        ),
    ):
        writer = TokenStoreWriter(tmp_path, WITH_BOS)
        for document in documents:
            writer.add(document)
        with pytest.raises(DataError, match=message):
            writer.finish(1e-9)
