"""Tokenizers behind one small interface: SentencePiece models and Hugging Face tokenizer.json files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from ds_remoe.config.schema import FileTokenizer
from ds_remoe.data.documents import DataError

_SPACE_SYMBOL = "\u2581"  # ▁, by which SentencePiece writes a space
_SEGMENT_CHARACTERS = 1_000_000


class Tokenizer(Protocol):
    """What the token store needs of a tokenizer; ids are 0 ... vocab_size - 1."""

    @property
    def name(self) -> str:
        """Kind and file name, for people."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file, in hexadecimal."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""

    @property
    def bos_id(self) -> int | None:
        """Token that opens a document, or None when the tokenizer has none of its own."""

    @property
    def eos_id(self) -> int:
        """Token that closes a document."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens; text that spells a special token is ordinary text.

        Raises: DataError: the text holds a lone surrogate.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens contribute nothing."""

    def save(self, folder: Path) -> Path:
        """Write the tokenizer into `folder` as a file that `load_tokenizer` takes, and return its path."""


class SentencePieceTokenizer:
    """A SentencePiece model. One made by `train_sentencepiece` decodes what it encoded exactly, for every Unicode text.

    SentencePiece writes a space as U+2581, so a U+2581 in the text would come back as a space. Where the model has
    bytes to fall back on and leaves spaces as they are, that character is therefore emitted as its three UTF-8 bytes.
    """

    def __init__(self, model: bytes, name: str = "sentencepiece") -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise DataError(f"{name} is not a SentencePiece model: {error}") from error
        if self._processor.eos_id() < 0:
            raise DataError(f"{name} has no end-of-sentence piece; train the model with one (--eos_id)")
        self._model = model
        self.name = name
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int | None = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.eos_id: int = self._processor.eos_id()
        byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]
        spaced = " a  b "
        self._can_split = (
            all(map(self._processor.is_byte, byte_ids))
            and not self._processor.encode_as_pieces("a")[0].startswith(_SPACE_SYMBOL)
            and self._processor.decode(self._processor.encode(spaced)) == spaced
        )
        self._space_symbol_ids = byte_ids

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"character {error.start} of a text is a lone surrogate, not valid Unicode") from None
        if not self._can_split:
            return list(self._processor.encode(text))
        ids: list[int] = []
        for index, part in enumerate(text.split(_SPACE_SYMBOL)):
            if index:
                ids += self._space_symbol_ids
            for segment in _segments(part):
                ids += self._processor.encode(segment)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return str(self._processor.decode([int(i) for i in ids]))

    def save(self, folder: Path) -> Path:
        """See `Tokenizer.save`."""
        path = folder / "tokenizer.model"
        path.write_bytes(self._model)
        return path


class HuggingFaceTokenizer:
    """A `tokenizers` tokenizer.json, with its BOS and EOS from tokenizer_config.json beside it or from usual names.

    A file that names one token for both (as GPT-2's does) has that one as EOS and no BOS.
    """

    _BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<BOS>", "[BOS]", "<|bos|>", "<|startoftext|>", "[CLS]")
    _EOS = ("</s>", "<|end_of_text|>", "<eos>", "<EOS>", "[EOS]", "<|eos|>", "<|endoftext|>", "[SEP]")

    def __init__(self, content: str, special_tokens: dict[str, str | None] | None, name: str = "huggingface") -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(content)
        except Exception as error:  # the binding raises plain Exception
            raise DataError(f"{name} is not a Hugging Face tokenizer: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._content = content
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        named = special_tokens or {}
        bos = self._find(vocabulary, named, "bos_token", self._BOS, name)
        eos = self._find(vocabulary, named, "eos_token", self._EOS, name)
        if eos is None:
            raise DataError(
                f"{name} has no end-of-text token: none of {', '.join(self._EOS)} is in its vocabulary; name it as "
                'eos_token in a tokenizer_config.json beside tokenizer.json, such as {"eos_token": "<|end|>"}'
            )
        self._special_tokens = {"bos_token": None if bos is None else bos[0], "eos_token": eos[0]}
        self.name = name
        self.eos_id = eos[1]
        self.bos_id = None if bos is None or bos[1] == eos[1] else bos[1]
        self.vocab_size = max(vocabulary.values()) + 1
        digest = hashlib.sha256(content.encode())
        digest.update(json.dumps(self._special_tokens, sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def load(cls, path: Path, name: str) -> HuggingFaceTokenizer:
        """Read tokenizer.json and, where it stands beside it, tokenizer_config.json."""
        config_path = path.parent / "tokenizer_config.json"
        special_tokens: dict[str, str | None] = {}
        if config_path.is_file():
            config = json.loads(config_path.read_text(encoding="utf-8"))
            for key in ("bos_token", "eos_token"):
                if key in config:
                    value = config[key]
                    special_tokens[key] = value["content"] if isinstance(value, dict) else value
        return cls(path.read_text(encoding="utf-8"), special_tokens, name)

    @staticmethod
    def _find(
        vocabulary: dict[str, int], named: dict[str, str | None], key: str, usual: tuple[str, ...], name: str
    ) -> tuple[str, int] | None:
        """The special token and its id; what the tokenizer's own configuration says comes before the usual names."""
        if key in named:
            token = named[key]
            if token is None:
                return None
            if token not in vocabulary:
                raise DataError(f"{name}: tokenizer_config.json names {key} {token!r}, which is not in the vocabulary")
            return token, vocabulary[token]
        return next(((token, vocabulary[token]) for token in usual if token in vocabulary), None)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"a text is not valid Unicode: {error}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

    def save(self, folder: Path) -> Path:
        """See `Tokenizer.save`; the special tokens stand beside it in tokenizer_config.json."""
        path = folder / "tokenizer.json"
        path.write_text(self._content, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(self._special_tokens), encoding="utf-8")
        return path


def load_tokenizer(path: str | Path, kind: str) -> Tokenizer:
    """Read the tokenizer of a file.

    Args:
        path: a SentencePiece .model, or a tokenizer.json or the folder that holds one.
        kind: "sentencepiece" or "huggingface".

    Raises: DataError: naming remoe.data.tokenizer.path, when there is no such file or it is not such a tokenizer.
    """
    file = Path(path)
    if kind == "huggingface" and file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"remoe.data.tokenizer.path: there is no file {file} (read from {Path.cwd()})")
    if kind == "sentencepiece":
        return SentencePieceTokenizer(file.read_bytes(), f"sentencepiece ({file.name})")
    try:
        return HuggingFaceTokenizer.load(file, f"huggingface ({file})")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"remoe.data.tokenizer.path: {file.parent} is not readable as a tokenizer: {error}") from error


def configured_tokenizer(config: FileTokenizer) -> Tokenizer:
    """The tokenizer that the configuration names; `load_tokenizer` tells the errors."""
    return load_tokenizer(config.path, config.type)


def _segments(text: str) -> Iterator[str]:
    """Cut a long text, after a newline where there is one: SentencePiece holds some 40 bytes a character."""
    start = 0
    while start < len(text):
        stop = start + _SEGMENT_CHARACTERS
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop
