"""Tokenizers: exact round trips, reproducible training, foreign files, and the errors."""

from __future__ import annotations

import io
import json
import keyword
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from ds_remoe.config.schema import StdlibSource, TrainedTokenizer
from ds_remoe.data.corpus import read_corpus
from ds_remoe.data.documents import DataError, Document
from ds_remoe.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from ds_remoe.data.tokenizer_training import TrainingSample, train_sentencepiece

AWKWARD = ["▁", " ", "  ", "\n", "\t", "\r", "\0", "\ufeff", "\ufffd", "▅", "\x85", "\u2028", "\u0301", "😀", "\u200d"]
AWKWARD += ["<s>", "</s>", "<unk>", "<0xE2>", "<0x96>", "\ud7ff", "\ue000", "\U0010ffff", "a", "def "]


@cache
def sample() -> TrainingSample:
    result = TrainingSample(200_000)
    for document in read_corpus(StdlibSource(max_bytes_per_domain=60_000)):
        result.add(document)
    return result


@cache
def trained() -> SentencePieceTokenizer:
    return train_sentencepiece(TrainedTokenizer(vocab_size=600), sample())


def byte_level_bpe(*special: str) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet)
    backend.train_from_iterator(["hello world " * 20], trainer)
    return backend


@settings(max_examples=400, deadline=None)
@given(st.text() | st.lists(st.sampled_from(AWKWARD)).map("".join))
@example("".join(AWKWARD))
@example(" ▁ ▁▁ a▁")
def test_trained_tokenizer_gives_every_text_back(text: str) -> None:
    tokenizer = trained()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids


def test_long_texts_are_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained()
    text = "".join(document.text for document in read_corpus(StdlibSource(max_bytes_per_domain=5000)))
    whole = tokenizer.encode(text)
    monkeypatch.setattr("ds_remoe.data.tokenizer._SEGMENT_CHARACTERS", 1000)
    assert tokenizer.encode(text) == whole
    line = "no newline anywhere " * 300
    assert tokenizer.decode(tokenizer.encode(line)) == line


def test_training_is_reproducible_and_has_the_size_asked_for(tmp_path: Path) -> None:
    again = train_sentencepiece(TrainedTokenizer(vocab_size=600), sample())
    assert again.fingerprint == trained().fingerprint
    assert again.vocab_size == 600
    copy = load_tokenizer(trained().save(tmp_path), "sentencepiece")
    assert copy.fingerprint == trained().fingerprint
    assert copy.encode("import sys\n") == trained().encode("import sys\n")


def test_no_sentence_is_skipped_in_training() -> None:
    lines = ["▁▁first▅", "\0second\0" * 3, "\tthird", "fourth " * 20_000]
    own = TrainingSample(10**6)
    own.add(Document("\n".join(lines) + "".join(map(chr, range(33, 500))), "text"))
    tokenizer = train_sentencepiece(TrainedTokenizer(vocab_size=760), own)
    assert len(tokenizer.encode("fourth")) == 1
    assert len(tokenizer.encode("second")) < len("second")


def test_sample_is_even_bounded_and_independent_of_the_order() -> None:
    documents = [Document(f"{i} " + "x" * 98, "large") for i in range(500)]
    documents += [Document(f"{i} " + "é" * 49, "middle") for i in range(60)] + [Document("tiny", "small")]
    forward, backward = TrainingSample(9000), TrainingSample(9000)
    for document in documents:
        forward.add(document)
    for document in reversed(documents):
        backward.add(document)
    sizes = forward.bytes_per_domain
    assert sizes["small"] == 4
    assert abs(sizes["large"] - sizes["middle"]) <= 200
    assert 8800 <= sum(sizes.values()) <= 9000
    assert abs(backward.bytes_per_domain["large"] - sizes["large"]) <= 200
    assert len(set(forward.sentences()) & set(backward.sentences())) >= 80


def test_a_single_large_document_is_cut_between_characters() -> None:
    own = TrainingSample(1000)
    own.add(Document("€" * 5000, "text"))
    assert "".join(own.sentences()) == "€" * 333


def test_vocabulary_size_errors_name_the_field_and_the_bound() -> None:
    tiny = TrainingSample(10**6)
    tiny.add(Document("a b c abc abc", "text"))
    with pytest.raises(DataError, match=r"remoe\.data\.source: the text is too short .* supports \d+ pieces"):
        train_sentencepiece(TrainedTokenizer(vocab_size=600), tiny)
    small = TrainingSample(10**6)
    small.add(Document(" ".join(f"{word}{word[::-1]}" for word in keyword.kwlist * 40 + dir(str) * 40), "text"))
    with pytest.raises(
        DataError, match=r"remoe\.data\.tokenizer\.vocab_size is 5000, but the text supports at most \d+"
    ):
        train_sentencepiece(TrainedTokenizer(vocab_size=5000), small)
    many = TrainingSample(10**6)
    many.add(Document("".join(map(chr, range(0x4E00, 0x5400))), "text"))
    with pytest.raises(DataError, match=r"remoe\.data\.tokenizer\.vocab_size is 600, but the characters .* need \d+"):
        train_sentencepiece(TrainedTokenizer(vocab_size=600), many)
    with pytest.raises(DataError, match=r"remoe\.data\.source yields no text"):
        train_sentencepiece(TrainedTokenizer(vocab_size=600), TrainingSample(1000))


def test_foreign_sentencepiece_model_is_used_as_it_is(tmp_path: Path) -> None:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=sample().sentences(), model_writer=model, vocab_size=600, model_type="bpe", byte_fallback=True
    )
    (tmp_path / "foreign.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "foreign.model", "sentencepiece")
    reference = SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("import sys", "a▁b  c", " lead"):
        assert tokenizer.encode(text) == reference.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    byte_level_bpe("<eos>").save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (trained(), load_tokenizer(tmp_path, "huggingface")):
        with pytest.raises(DataError, match="Unicode"):
            tokenizer.encode("a\ud800")


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_byte_level_huggingface_tokenizer_round_trips(text: str) -> None:
    tokenizer = huggingface()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@cache
def huggingface() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(byte_level_bpe("<s>", "</s>").to_str(), None)


def test_huggingface_tokenizer_keeps_its_special_tokens_out_of_texts(tmp_path: Path) -> None:
    backend = byte_level_bpe("<pad>", "<s>", "</s>")
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=50, pad_token="<pad>")
    backend.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(path, "huggingface")
        ids = tokenizer.encode("hello world</s>" * 3)
        assert tokenizer.decode(ids) == "hello world</s>" * 3
        assert not {0, 1, 2} & set(ids)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, backend.get_vocab_size())


def test_huggingface_special_tokens_come_from_the_configuration_beside(tmp_path: Path) -> None:
    byte_level_bpe("<|endoftext|>", "<|end|>").save(str(tmp_path / "tokenizer.json"))
    gpt = load_tokenizer(tmp_path, "huggingface")
    assert (gpt.bos_id, gpt.eos_id) == (None, 0)
    config = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = load_tokenizer(tmp_path, "huggingface")
    assert (named.bos_id, named.eos_id) == (0, 1)
    assert named.fingerprint != gpt.fingerprint
    (tmp_path / "copy").mkdir()
    copy = load_tokenizer(named.save(tmp_path / "copy"), "huggingface")
    assert (copy.bos_id, copy.eos_id, copy.fingerprint) == (0, 1, named.fingerprint)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}')
    assert load_tokenizer(tmp_path, "huggingface").bos_id is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|no|>"}')
    with pytest.raises(DataError, match=r"eos_token '<\|no\|>'"):
        load_tokenizer(tmp_path, "huggingface")


def test_unusable_tokenizer_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("{}")
    (tmp_path / "no-eos.json").write_text(byte_level_bpe().to_str())
    for kind, name, message in (
        ("sentencepiece", "none.model", r"remoe\.data\.tokenizer\.path: there is no file"),
        ("sentencepiece", "broken", "not a SentencePiece model"),
        ("huggingface", "broken", "not a Hugging Face tokenizer"),
        ("huggingface", "no-eos.json", "no end-of-text token"),
        ("huggingface", "", r"remoe\.data\.tokenizer\.path: there is no file .*tokenizer\.json"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / name, kind)
