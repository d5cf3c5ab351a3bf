"""What is wrong with a configuration, said so that it can be mended: the field, its value, the remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final


class _Missing:
    """Type of `MISSING`, the value of a field that does not stand in the file."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()


@dataclass(frozen=True)
class ConfigProblem:
    """One thing to mend.

    Attributes:
        field: dotted path from the top of the JSON file, for example "remoe.moe.k".
        value: what stands there, or MISSING.
        remedy: why it cannot be, and what would be right.
    """

    field: str
    value: Any
    remedy: str

    def __str__(self) -> str:
        if self.value is MISSING:
            return f"{self.field}: missing; {self.remedy}"
        return f"{self.field} = {_shorten(self.value)}: {self.remedy}"


class ConfigError(ValueError):
    """A configuration that must not start a run. `str()` is the whole message, one problem a line."""

    def __init__(self, source: str, problems: Sequence[ConfigProblem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        head = f"{source}: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''} in the configuration"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))


def unknown_key(prefix: str, key: str, value: Any, known: Iterable[str], where: str = "") -> ConfigProblem:
    """The problem for a key that nobody reads, with the nearest known name.

    Args:
        prefix: dotted path of the object that holds the key; "" for the top of the file.
        key: the unknown key.
        value: its value.
        known: names that may stand there.
        where: who knows the names, for example "DeepSpeed 0.19.8".
    """
    reader = f" to {where}" if where else ""
    return ConfigProblem(join(prefix, key), value, f"unknown key{reader}; {suggestion(key, known)}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "did you mean X?" when a known name is near, else the list of known names."""
    names = sorted(known)
    # Case is folded because JSON keys differ from what people type by case as often as by a letter.
    folded = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    near = near or [candidate for candidate in folded if candidate.startswith(name.lower())]
    if near:
        return f"did you mean {folded[near[0]]}?"
    return f"known here: {', '.join(names)}" if names else "remove it"


def join(prefix: str, key: str) -> str:
    """Dotted path of `key` in the object at `prefix`."""
    return f"{prefix}.{key}" if prefix else key


def _shorten(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
