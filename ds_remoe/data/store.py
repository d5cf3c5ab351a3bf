"""The token store: each split's tokens in one flat memory-mapped array beside the table of its documents.

Flat .npy arrays are chosen because a window of tokens is then one slice of a memory map: O(1), no parsing, and all
ranks of a node share one copy in the page cache. The store knows nothing of seq_length.
"""

from __future__ import annotations

import json
import os
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ds_remoe.data.documents import DataError, Document
from ds_remoe.data.tokenizer import Tokenizer
from ds_remoe.data.tokenizer_training import text_hash

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")
_MAX_DOMAINS = np.iinfo(np.int16).max + 1


@dataclass(frozen=True)
class DomainSize:
    """How much one domain contributes to a split; `tokens` counts BOS and EOS, `num_bytes` is UTF-8 text alone."""

    domain: str
    documents: int
    tokens: int
    num_bytes: int


def held_out_documents(
    hashes: npt.NDArray[np.uint64], domains: npt.NDArray[np.int16], fraction: float
) -> npt.NDArray[np.bool_]:
    """Choose the validation documents by the hashes of their texts.

    A document is held out when its hash falls in the lowest `fraction` of the range; so a document keeps its side when
    others are added, and equal texts, in whatever domains, are on one side. Then a domain of two or more distinct texts
    of which all are held out gives one back (the highest hash), and one of which none is gives one up (the lowest).
    Only where domains share texts can the second correction undo the first.

    Args:
        hashes: uint64 [documents]. domains: domain ids, int16 [documents].

    Returns: bool [documents], True for validation.
    """
    held = hashes < np.uint64(fraction * 2.0**64)
    by_domain = [np.flatnonzero(domains == domain) for domain in np.unique(domains)]
    for documents in by_domain:
        if held[documents].all() and len(np.unique(hashes[documents])) > 1:
            held[hashes == hashes[documents].max()] = False
    for documents in by_domain:
        if not held[documents].any() and len(np.unique(hashes[documents])) > 1:
            held[hashes == hashes[documents].min()] = True
    return held


class TokenStoreWriter:
    """Tokenises documents into a folder in one pass, then divides them in splits.

    Memory is 26 bytes a document; the tokens of all documents lie in the folder twice until `finish` returns.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self._all_tokens = folder / "all.tokens"
        self._file = self._all_tokens.open("wb")
        self._domain_ids: dict[str, int] = {}
        self._hashes, self._lengths = array("Q"), array("q")
        self._num_bytes, self._domains = array("q"), array("h")
        self._prefix = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def add(self, document: Document) -> None:
        """Append one document as [BOS] + tokens + [EOS]; without a BOS of its own, the tokenizer's EOS separates."""
        domain = self._domain_ids.setdefault(document.domain, len(self._domain_ids))
        if domain >= _MAX_DOMAINS:
            raise DataError(
                f"remoe.data.source.domain_column names more than {_MAX_DOMAINS} domains ({document.domain!r} is one "
                "more); choose a column of fewer values"
            )
        ids = [*self._prefix, *self._tokenizer.encode(document.text), self._tokenizer.eos_id]
        np.asarray(ids, dtype=self._dtype).tofile(self._file)
        self._hashes.append(text_hash(document.text))
        self._lengths.append(len(ids))
        self._num_bytes.append(document.num_bytes)
        self._domains.append(domain)

    def finish(self, valid_fraction: float) -> dict[Split, list[DomainSize]]:
        """Write both splits and their sizes, synced to the disk.

        Raises: DataError: naming remoe.data.source or remoe.data.valid_fraction, when a split would hold no document.
        """
        self._file.close()
        if not self._lengths:
            raise DataError("remoe.data.source yields no documents")
        lengths = np.frombuffer(self._lengths, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        domains = np.frombuffer(self._domains, dtype=np.int16)
        num_bytes = np.frombuffer(self._num_bytes, dtype=np.int64)
        held = held_out_documents(np.frombuffer(self._hashes, dtype=np.uint64), domains, valid_fraction)
        tokens = np.memmap(self._all_tokens, dtype=self._dtype, mode="r")
        sizes: dict[Split, list[DomainSize]] = {}
        for split in SPLITS:
            chosen = np.flatnonzero(held if split == "valid" else ~held)
            if not chosen.size:
                raise DataError(
                    f'the "{split}" split holds none of the {len(lengths)} documents that remoe.data.source yields: '
                    f"change remoe.data.valid_fraction ({valid_fraction}) or give the corpus as more than one document"
                )
            self._write_split(split, tokens, starts, chosen, domains[chosen])
            sizes[split] = [
                DomainSize(name, len(own), int(lengths[own].sum()), int(num_bytes[own].sum()))
                for name, domain in self._domain_ids.items()
                for own in [chosen[domains[chosen] == domain]]
            ]
        del tokens
        self._all_tokens.unlink()
        table = {split: [asdict(size) for size in sizes[split]] for split in SPLITS}
        (self._folder / "store.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
        for path in self._folder.iterdir():
            sync(path)
        return sizes

    def _write_split(
        self,
        split: Split,
        tokens: npt.NDArray[np.unsignedinteger],
        starts: npt.NDArray[np.int64],
        chosen: npt.NDArray[np.intp],
        domains: npt.NDArray[np.int16],
    ) -> None:
        offsets = np.concatenate([[0], np.cumsum(starts[chosen + 1] - starts[chosen])]).astype(np.int64)
        np.save(self._folder / f"{split}.offsets.npy", offsets)
        np.save(self._folder / f"{split}.domains.npy", domains)
        target = np.lib.format.open_memmap(
            self._folder / f"{split}.tokens.npy", mode="w+", dtype=self._dtype, shape=(int(offsets[-1]),)
        )
        position = 0
        for run in np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1):
            source = tokens[starts[run[0]] : starts[run[-1] + 1]]
            target[position : position + len(source)] = source
            position += len(source)
        target.flush()


def read_sizes(folder: Path) -> dict[Split, list[DomainSize]]:
    """Sizes of each split by domain, in the order of the domains' ids."""
    table = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    return {split: [DomainSize(**size) for size in table[split]] for split in SPLITS}


class PackedDataset:
    """One split of a store as samples of seq_length + 1 tokens at a stride of seq_length.

    Sample i is tokens i * seq_length ... (i + 1) * seq_length of the stream of documents, so each token but the first
    is the target of exactly one sample; the fewer than seq_length targets after the last whole sample are not used.
    Samples cross document borders. Lookups read memory-mapped files.

    Raises: DataError: naming remoe.data.valid_fraction and remoe.model.seq_length, when the split is shorter than one
        sample.
    """

    def __init__(self, folder: Path, split: Split, seq_length: int) -> None:
        self.split = split
        self.seq_length = seq_length
        self.domain_names = [size.domain for size in read_sizes(folder)[split]]
        self.token_stream: npt.NDArray[np.unsignedinteger] = _map(folder / f"{split}.tokens.npy")
        self._offsets: npt.NDArray[np.int64] = _map(folder / f"{split}.offsets.npy")
        self._domains: npt.NDArray[np.int16] = _map(folder / f"{split}.domains.npy")
        if self._offsets[-1] != len(self.token_stream) or len(self._domains) != len(self._offsets) - 1:
            raise ValueError(
                f"{split}: offsets end at {self._offsets[-1]} for {len(self.token_stream)} tokens, and there are "
                f"{len(self._domains)} domains for {len(self._offsets) - 1} documents"
            )
        if len(self) == 0:
            change = "raise" if split == "valid" else "lower"
            raise DataError(
                f'the "{split}" split holds {len(self.token_stream)} tokens in {len(self._domains)} documents, fewer '
                f"than one sample of remoe.model.seq_length + 1 = {seq_length + 1}: {change} "
                "remoe.data.valid_fraction, lower remoe.model.seq_length, or give more text in remoe.data.source"
            )

    def __len__(self) -> int:
        """Number of samples."""
        return max(len(self.token_stream) - 1, 0) // self.seq_length

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Tokens of a sample, int64 [seq_length + 1]: inputs are [:-1], targets [1:].

        Raises: IndexError: index is not in 0 ... len - 1.
        """
        start = self._start(index)
        return self.token_stream[start : start + self.seq_length + 1].astype(np.int64)

    def domains(self, index: int) -> npt.NDArray[np.int16]:
        """Domain of each token of a sample as an index into `domain_names`, int16 [seq_length + 1].

        The documents are found by bisection, O(log documents). Raises: IndexError: as for the tokens.
        """
        start = self._start(index)
        stop = start + self.seq_length + 1
        first, last = np.searchsorted(self._offsets, [start, stop - 1], side="right") - 1
        borders = np.clip(self._offsets[first : last + 2], start, stop)
        return np.repeat(self._domains[first : last + 1], np.diff(borders))

    def _start(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f'sample {index} of the "{self.split}" split, which has {len(self)}')
        return index * self.seq_length


def _map(path: Path) -> npt.NDArray[Any]:
    """A .npy file mapped into memory, as a plain array: slicing np.memmap itself costs several microseconds."""
    return np.load(path, mmap_mode="r").view(np.ndarray)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder (POSIX; elsewhere folders cannot be synced)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
