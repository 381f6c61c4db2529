"""What is wrong with input, in words that name the field and the fix. No value is repeated: it may be a secret."""

import json
from difflib import get_close_matches
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

#: Instead of pydantic's own words, by its names of errors. What is not here it says well enough.
_MUST_BE = {
    "tuple_type": "must be a list",
    "dict_type": "must be an object: names with their values",
    "model_type": "must be an object: names with their values",
    "string_type": "must be text",
    "string_pattern_mismatch": "must be of the right form",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
}


class Problem(NamedTuple):
    """Where it is, field first, and what."""

    where: tuple[int | str, ...]
    what: str


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """What pydantic has found in the input of a model. One that names what it denies has a dict `denied`."""
    return [
        Problem(details["loc"], _say(details, model))
        for details in error.errors(include_url=False, include_input=False)
    ]


def describe_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A sentence per problem, the field first."""
    return [f"{'.'.join(map(str, where))}: {what}" if where else what for where, what in problems_of(error, model)]


def _say(details: ErrorDetails, model: type[BaseModel]) -> str:
    *path, name = details["loc"] or ("",)
    owner = _owner(path, model)
    if details["type"] == "extra_forbidden":
        return _unknown(str(name), owner)
    if details["type"] in _MUST_BE:
        return _MUST_BE[details["type"]] + _example(name, owner)
    # Without the prefix that it gives to our own words.
    return details["msg"].removeprefix("Value error, ")


def _unknown(name: str, owner: type[BaseModel] | None) -> str:
    denied: dict[str, str] = getattr(owner, "denied", {})
    if name in denied:
        return f"denied: {denied[name]}"
    known = {field.lower(): field for field in owner.model_fields} if owner else {}
    close = get_close_matches(name.lower(), known, n=1)
    return "there is no such field" + (f"; did you mean `{known[close[0]]}`?" if close else "")


def _example(name: int | str, owner: type[BaseModel] | None) -> str:
    field = owner.model_fields.get(str(name)) if owner else None
    example = (field.examples or [field.default])[0] if field else None
    return (
        f", such as {json.dumps(example)}" if example and isinstance(example, list | dict | str | int | float) else ""
    )


def _owner(path: list[int | str], model: type[BaseModel]) -> type[BaseModel] | None:
    """The model that the path leads to; None: it leads to no model."""
    owner: type[BaseModel] | None = model
    for name in path:
        if isinstance(name, str):
            field = owner.model_fields.get(name) if owner else None
            owner = _model_in(field.annotation) if field else None
    return owner


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """In `tuple[Model, ...]`, `Model | None` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
