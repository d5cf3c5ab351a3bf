"""JSON with nothing dropped: a key given twice and a number that is not finite are refused."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from ds_remoe.config.problems import ConfigProblem

FILE, NUMBER = "file", "number"
UNPLACED = (FILE, NUMBER)
"""Fields of problems whose place in the text the reader does not know."""


class RefusedJSONError(ValueError):
    """JSON that Python's reader accepts and a configuration must not hold."""

    def __init__(self, problem: ConfigProblem) -> None:
        self.problem = problem
        super().__init__(str(problem))


def parse_json(text: str) -> Any:
    """Parse `text`.

    Raises:
        json.JSONDecodeError: if it is not JSON.
        RefusedJSONError: for a key given twice in one object, NaN, Infinity, or a number beyond the float range.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_number, parse_float=_finite_float
        )
    except RecursionError:
        raise RefusedJSONError(ConfigProblem(FILE, text[:40], "nested too deeply; flatten it")) from None
    except (json.JSONDecodeError, RefusedJSONError):
        raise
    except ValueError as error:  # an integer of more digits than Python reads
        raise RefusedJSONError(ConfigProblem(NUMBER, text[:40], f"{error}; write a smaller one")) from None


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            remedy = f"given twice in one object, first as {json.dumps(entries[key])}; keep one"
            raise RefusedJSONError(ConfigProblem(key, value, remedy))
        entries[key] = value
    return entries


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise RefusedJSONError(ConfigProblem(NUMBER, text, "not a finite number; write one"))
