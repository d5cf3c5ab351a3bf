"""The "remoe" section as typed objects, with pydantic's errors put in the words of `problems`."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ds_remoe.config.problems import MISSING, ConfigProblem, join, unknown_key
from ds_remoe.config.schema import ReMoEConfig, SparsityConfig


def parse_remoe(section: Any) -> tuple[ReMoEConfig | None, list[ConfigProblem]]:
    """Validate the "remoe" section.

    Args:
        section: the section as plain data.

    Returns:
        The typed section, or None with one problem for each fault in it.
    """
    try:
        return ReMoEConfig.model_validate(section), []
    except ValidationError as error:
        return None, [_problem(section, detail) for detail in error.errors(include_url=False)]


def parse_sparsity(values: Any) -> tuple[SparsityConfig | None, list[ConfigProblem]]:
    """Validate "remoe.sparsity" by itself, as `parse_remoe` does the whole section."""
    try:
        return SparsityConfig.model_validate(values), []
    except ValidationError as error:
        found = error.errors(include_url=False)
        within = [ErrorDetails({**detail, "loc": ("sparsity", *detail["loc"])}) for detail in found]
        return None, [_problem({"sparsity": values}, detail) for detail in within]


def _problem(section: Any, detail: ErrorDetails) -> ConfigProblem:
    path, model = _locate(section, detail["loc"])
    field = ".".join(["remoe", *path])
    context: Mapping[str, Any] = detail.get("ctx", {})
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = list(model.model_fields) if model else []
        return unknown_key(".".join(["remoe", *path[:-1]]), path[-1], detail["input"], known)
    description = model.model_fields[path[-1]].description if model and path[-1] in model.model_fields else None
    if kind == "missing":
        return ConfigProblem(field, MISSING, f"required: {_first_sentence(description) or 'give a value'}")
    if kind == "union_tag_not_found":
        tags = sorted(_tags(model, path[-1])) if model else []
        return ConfigProblem(join(field, "type"), MISSING, f"required: one of {', '.join(tags)}")
    if kind == "union_tag_invalid":
        return ConfigProblem(join(field, "type"), context["tag"], f"must be one of {context['expected_tags']}")
    remedy = _REMEDIES.get(kind, detail["msg"]).format(**context)
    if kind == "less_than_equal" and description:
        remedy += f" ({_first_sentence(description)})"
    return ConfigProblem(field, detail["input"], remedy)


_REMEDIES: Mapping[str, str] = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": 'must be a string "..."',
    "list_type": "must be a list [...]",
    "model_type": "must be an object {{...}}",
    "model_attributes_type": "must be an object {{...}}",
    "dict_type": "must be an object {{...}}",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} entry",
    "finite_number": "must be a finite number",
}


def _locate(section: Any, loc: Sequence[int | str]) -> tuple[list[str], type[BaseModel] | None]:
    """Turn pydantic's location into a path in the file.

    pydantic puts the tag of a discriminated union ("hub") into the location, where the file has no such level.

    Returns:
        The path below "remoe" and the model that holds its last name, if one does.
    """
    path: list[str] = []
    value = section
    model: type[BaseModel] | None = ReMoEConfig
    owner: type[BaseModel] | None = None
    options: list[type[BaseModel]] = []
    for step in loc:
        tagged = [option for option in options if step in _own_tags(option)]
        if tagged and isinstance(value, dict) and value.get("type") == step:
            model, options = tagged[0], []
            continue
        path.append(str(step))
        owner = model
        options = _models(model.model_fields[step].annotation) if model and step in model.model_fields else []
        model = options[0] if len(options) == 1 else None
        value = value.get(step) if isinstance(value, dict) else None
    return path, owner


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's annotation names."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for option in get_args(annotation) for model in _models(option)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _own_tags(model: type[BaseModel]) -> tuple[str, ...]:
    return get_args(model.model_fields["type"].annotation) if "type" in model.model_fields else ()


def _tags(owner: type[BaseModel], field: str) -> list[str]:
    return [tag for model in _models(owner.model_fields[field].annotation) for tag in _own_tags(model)]


def _first_sentence(description: str | None) -> str:
    return description.split("\n")[0].rstrip(".") if description else ""
