"""`--set path=value`: changes to a configuration from the command line, applied before anything is checked."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from ds_remoe.config.json_text import UNPLACED, RefusedJSONError, parse_json
from ds_remoe.config.problems import MISSING, ConfigProblem, join, suggestion


class OverrideError(ValueError):
    """An override that cannot be applied."""

    def __init__(self, problem: ConfigProblem) -> None:
        self.problem = problem
        super().__init__(str(problem))


def apply_overrides(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `path=value` texts in order.

    The path is dotted from the top of the file ("remoe.moe.k", "zero_optimization.stage"); objects on the way that
    are not there are made. The value is JSON, and a plain string where it is not JSON. `null` takes the key out, so
    that its default holds.

    Args:
        config: the file's object; left as it is.
        overrides: the texts.

    Returns:
        A changed deep copy.

    Raises:
        OverrideError: for a text without "=", a path through something other than an object, or `null` for a key
            that is not there.
    """
    changed = copy.deepcopy(dict(config))
    for text in overrides:
        path, separator, value = text.partition("=")
        steps = path.split(".")
        if not separator or not all(steps):
            raise OverrideError(ConfigProblem("--set", text, "write it as PATH=VALUE, for example remoe.moe.k=2"))
        _apply(changed, steps, _parse(path, value))
    return changed


def _apply(config: dict[str, Any], steps: Sequence[str], value: Any) -> None:
    target: Any = config
    for depth, step in enumerate(steps[:-1]):
        if step not in target and value is None:
            _refuse_removal(target, steps[: depth + 1])
        target = target.setdefault(step, {})
        if not isinstance(target, dict):
            path = ".".join(steps[: depth + 1])
            remedy = f"not an object, so --set {'.'.join(steps)} cannot reach into it; set {path} itself"
            raise OverrideError(ConfigProblem(path, target, remedy))
    if value is not None:
        target[steps[-1]] = value
    elif steps[-1] in target:
        del target[steps[-1]]
    else:
        _refuse_removal(target, steps)


def _refuse_removal(target: Mapping[str, Any], steps: Sequence[str]) -> NoReturn:
    remedy = f"null takes a key out, but the file has none of this name; {suggestion(steps[-1], target)}"
    raise OverrideError(ConfigProblem(join(".".join(steps[:-1]), steps[-1]), MISSING, remedy))


def _parse(path: str, text: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        return text
    except RefusedJSONError as error:
        field = path if error.problem.field in UNPLACED else join(path, error.problem.field)
        raise OverrideError(replace(error.problem, field=field)) from None
