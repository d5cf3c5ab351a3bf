"""Checks of the DeepSpeed part of a file: its keys and the kinds of their values.

What hangs together across fields is checked in `checks`; nothing here looks at more than one section.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_remoe.config import deepspeed_keys as keys
from ds_remoe.config.problems import MISSING, ConfigProblem, join, suggestion, unknown_key

_KINDS: Mapping[keys.Kind, str] = {
    "bool": "true or false",
    "int": "a whole number",
    "size": "a whole number",
    "number": "a number",
    "string": "a string",
    "object": "an object {...}",
    "list": "a list [...]",
}


def check_sections(deepspeed: Mapping[str, Any]) -> tuple[dict[str, Any], list[ConfigProblem]]:
    """Check every key outside of "remoe" against what DeepSpeed reads.

    Args:
        deepspeed: the whole file's object, "remoe" included or not.

    Returns:
        A copy that holds only what is known and of the right kind, for the checks across fields, and the problems.
    """
    given = {key: value for key, value in deepspeed.items() if key != "remoe"}
    clean, problems = _check_object("", given, keys.TOP_LEVEL, {**keys.REFUSED, **keys.REMOVED})

    sections: list[tuple[str, Mapping[str, keys.Kind], Mapping[str, str]]] = [
        ("zero_optimization", keys.ZERO, keys.ZERO_REFUSED),
        ("bf16", keys.BF16, {}),
        ("fp16", keys.FP16, {}),
        ("checkpoint", keys.CHECKPOINT, keys.CHECKPOINT_REFUSED),
        *((name, known, {}) for name, known in keys.MONITORS.items()),
        ("timers", {"throughput": "object"}, {}),
        ("timers.throughput", {"enabled": "bool", "synchronized": "bool"}, {}),
        ("zero_optimization.offload_optimizer", keys.OFFLOAD_OPTIMIZER, keys.OFFLOAD_OPTIMIZER_REFUSED),
    ]
    for path, known, refused in sections:
        parent, name = _parent(clean, path)
        if name in parent:
            parent[name], found = _check_object(path, parent[name], known, refused)
            problems += found
    problems += _check_optimizer(clean)
    problems += _check_scheduler(clean)
    return clean, problems


def _check_object(
    prefix: str, given: Mapping[str, Any], known: Mapping[str, keys.Kind], refused: Mapping[str, str]
) -> tuple[dict[str, Any], list[ConfigProblem]]:
    """Keep the entries of `given` that are known and of the right kind; report the others."""
    clean: dict[str, Any] = {}
    problems: list[ConfigProblem] = []
    for key, value in given.items():
        path = join(prefix, key)
        if key in refused:
            problems.append(ConfigProblem(path, value, refused[key]))
        elif key not in known:
            names = {**known, "remoe": "object"} if not prefix else known
            problems.append(unknown_key(prefix, key, value, names, keys.RELEASE))
        elif value == "auto":
            problems.append(ConfigProblem(path, value, "only the Hugging Face Trainer fills this in; give the value"))
        elif not _is_kind(value, known[key]):
            problems.append(ConfigProblem(path, value, f"must be {_KINDS[known[key]]}"))
        else:
            clean[key] = value
    return clean, problems


def _is_kind(value: Any, kind: keys.Kind) -> bool:
    match kind:
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "size":
            # Bucket sizes are written as 5e8, which JSON reads as a float.
            return _is_kind(value, "int") or (isinstance(value, float) and value.is_integer())
        case "number":
            return not isinstance(value, bool) and isinstance(value, int | float)
        case "string":
            return isinstance(value, str)
        case "object":
            return isinstance(value, dict)
        case "list":
            return isinstance(value, list)


def _parent(root: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The object that holds the last name of a dotted path, an empty one if it is not there, and that name."""
    *parents, name = path.split(".")
    for parent in parents:
        root = root.get(parent, {})
    return root, name


def _check_optimizer(clean: dict[str, Any]) -> list[ConfigProblem]:
    """Check "optimizer", replacing it in `clean` by its valid part."""
    if "optimizer" not in clean:
        return []
    section, problems = _check_object("optimizer", clean["optimizer"], {"type": "string", "params": "object"}, {})
    clean["optimizer"] = section
    kind, params = section.get("type"), section.pop("params", {})  # what is right there depends on the type
    if kind is None:
        if not problems:
            problems.append(ConfigProblem("optimizer.type", MISSING, f"one of {', '.join(keys.OPTIMIZERS)}"))
        return problems
    if kind.lower() not in [name.lower() for name in keys.OPTIMIZERS]:
        remedy = f"not an optimizer of ds_remoe ({', '.join(keys.OPTIMIZERS)}); {suggestion(kind, keys.OPTIMIZERS)}"
        return [*problems, ConfigProblem("optimizer.type", kind, remedy)]
    offload = clean.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    known = keys.optimizer_params(torch_adam=params.get("torch_adam") is True, offload=offload)
    refused = {"max_grad_norm": "DeepSpeed reads the top-level gradient_clipping instead; move it there"}
    section["params"], found = _check_object("optimizer.params", params, known, refused)
    return problems + found


def _check_scheduler(clean: dict[str, Any]) -> list[ConfigProblem]:
    """Check "scheduler", replacing it in `clean` by its valid part."""
    if "scheduler" not in clean:
        return []
    given = clean["scheduler"]
    section, problems = _check_object("scheduler", given, {"type": "string", "params": "object"}, {})
    clean["scheduler"] = section
    kind = section.get("type")
    if kind is None:
        if not problems:
            problems.append(ConfigProblem("scheduler.type", MISSING, f"one of {', '.join(keys.SCHEDULERS)}"))
        return problems
    if kind not in keys.SCHEDULERS:
        remedy = f"not a schedule of {keys.RELEASE}; {suggestion(kind, keys.SCHEDULERS)}"
        return [*problems, ConfigProblem("scheduler.type", kind, remedy)]
    params = section.get("params", {})
    if "params" not in given:
        problems.append(ConfigProblem("scheduler.params", MISSING, "DeepSpeed fails without it; {} takes its defaults"))
    section["params"], found = _check_object("scheduler.params", params, keys.SCHEDULERS[kind], {})
    for name in keys.SCHEDULER_REQUIRED.get(kind, ()):
        if name not in params:
            found.append(ConfigProblem(f"scheduler.params.{name}", MISSING, f"{kind} needs it"))
    return problems + found
