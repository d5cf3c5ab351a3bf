"""Train the byte-fallback BPE tokenizer on an even sample of the corpus."""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections.abc import Iterator

from ds_remoe.config.schema import TrainedTokenizer
from ds_remoe.data.documents import DataError, Document
from ds_remoe.data.tokenizer import SentencePieceTokenizer

# SentencePiece skips whole sentences that hold one of its own marks (tab, U+2581, U+2585) or NUL, so sentences are cut
# there and at newlines. None of these characters is in a piece then; in encoding, they are spelled in bytes.
_SENTENCE_ENDS = re.compile("[\n\t\0\u2581\u2585]+")
_SENTENCE_CHARACTERS = 16_384


def text_hash(text: str) -> int:
    """The first 64 bits of the text's BLAKE2b, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class TrainingSample:
    """At most `max_bytes` UTF-8 bytes of documents, spread evenly over the domains that were added.

    Each domain keeps the documents of lowest hash, which is a uniform draw that does not depend on their order. When
    the sample is over its size, the domain that holds most gives up its document of highest hash, or the end of it.
    So one pass is enough, small domains stay whole, and memory stays below `max_bytes` and one document.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._heaps: dict[str, list[tuple[int, int, str]]] = {}
        self._bytes: dict[str, int] = {}
        self._added = 0

    def add(self, document: Document) -> None:
        """Take the document in, and give up what is too much then."""
        heap = self._heaps.setdefault(document.domain, [])
        heapq.heappush(heap, (-text_hash(document.text), self._added, document.text))
        self._bytes[document.domain] = self._bytes.get(document.domain, 0) + document.num_bytes
        self._added += 1
        while (excess := sum(self._bytes.values()) - self.max_bytes) > 0:
            largest = max(self._bytes, key=lambda domain: self._bytes[domain])
            negative_hash, number, text = heapq.heappop(self._heaps[largest])
            encoded = text.encode()
            rest = encoded[: max(len(encoded) - excess, 0)].decode(errors="ignore")
            self._bytes[largest] += len(rest.encode()) - len(encoded)
            if rest:
                heapq.heappush(self._heaps[largest], (negative_hash, number, rest))

    @property
    def bytes_per_domain(self) -> dict[str, int]:
        """UTF-8 bytes that each domain contributes."""
        return dict(self._bytes)

    def sentences(self) -> Iterator[str]:
        """The sample in pieces that SentencePiece takes, in an order that depends on the documents alone."""
        for domain in sorted(self._heaps):
            for _, _, text in sorted(self._heaps[domain], reverse=True):
                for line in _SENTENCE_ENDS.split(text):
                    for start in range(0, len(line), _SENTENCE_CHARACTERS):
                        yield line[start : start + _SENTENCE_CHARACTERS]


def train_sentencepiece(config: TrainedTokenizer, sample: TrainingSample) -> SentencePieceTokenizer:
    """Train a BPE model with byte fallback; the same sample gives the same model, byte for byte.

    Raises: DataError: the sample is empty, or its text does not support remoe.data.tokenizer.vocab_size pieces.
    """
    from sentencepiece import SentencePieceTrainer

    sentences = sample.sentences()
    first = next(sentences, None)
    if first is None:
        raise DataError('remoe.data.tokenizer.type is "train", but remoe.data.source yields no text to train on')
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sample.sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _SENTENCE_CHARACTERS,  # bytes; a longer sentence would be skipped
            num_threads=1,  # the merges do not depend on it, but nothing promises that
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(error, config) from error
    return SentencePieceTokenizer(model.getvalue(), f"sentencepiece BPE ({config.vocab_size})")


def _explain(error: RuntimeError, config: TrainedTokenizer) -> DataError:
    message = str(error)
    if too_big := re.search(r"Please set it to a value <= (\d+)", message):
        if int(too_big[1]) < 512:  # the least that the field takes
            return DataError(
                f"remoe.data.source: the text is too short for a tokenizer; it supports {too_big[1]} pieces, and "
                "remoe.data.tokenizer.vocab_size is at least 512. Give more text"
            )
        return DataError(
            f"remoe.data.tokenizer.vocab_size is {config.vocab_size}, but the text supports at most {too_big[1]} "
            f"pieces; set it to {too_big[1]} or less, give more text, or raise remoe.data.tokenizer.max_training_bytes "
            f"({config.max_training_bytes})"
        )
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"remoe.data.tokenizer.vocab_size is {config.vocab_size}, but the characters of the text alone need "
            f"{too_small[1]} pieces; set it above {too_small[1]}"
        )
    return DataError(f"the tokenizer cannot be trained on this corpus: {message}")
