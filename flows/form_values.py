"""What Prefect's form for a schedule leaves in the parameters.

A field that is filled in as JSON is kept as `{"__prefect_kind": "json", "value": "…"}`. The server makes plain values
of these for a run that somebody asks for, but not for those that a schedule makes.
"""

import json
from typing import Any

_KIND = "__prefect_kind"
_NOTHING = object()


def plain(parameter: Any) -> Any:
    """The parameter as it was meant. What can't be read stays as it is, for whoever checks it to refuse."""
    value = _plain(parameter)
    return {} if value is _NOTHING else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        if _KIND in value:
            return _of_kind(value)
        fields = {key: _plain(field) for key, field in value.items()}
        return {key: field for key, field in fields.items() if field is not _NOTHING}
    if isinstance(value, list):
        return [item for item in map(_plain, value) if item is not _NOTHING]
    return value


def _of_kind(value: dict[str, Any]) -> Any:
    if value[_KIND] == "json":
        # Without a value it was left empty.
        text = value.get("value", _NOTHING)
        try:
            return json.loads(text) if isinstance(text, str) else text
        except ValueError:
            return value
    if value[_KIND] in (None, "none") and "value" in value:
        return _plain(value["value"])
    # A variable of the server, or a template: nothing that this product reads.
    return value
