"""The unit that every corpus yields, and the error that every part of this package raises."""

from __future__ import annotations

from dataclasses import dataclass


class DataError(ValueError):
    """The corpus, the tokenizer or the token store cannot be what the configuration asks for."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the domain it belongs to; `text` is valid Unicode (no lone surrogate)."""

    text: str
    domain: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode())
