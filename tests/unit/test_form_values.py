"""Parameters as Prefect's form for a schedule leaves them."""

from typing import Any

import pytest

from flows.form_values import plain


def as_json(*text: object) -> dict[str, Any]:
    """A field that was filled in as JSON; without a text: one that was left empty."""
    return {"__prefect_kind": "json"} | ({"value": text[0]} if text else {})


@pytest.mark.parametrize(
    ("left", "meant"),
    [
        ({"image": "busybox", "command": ["true"]}, {"image": "busybox", "command": ["true"]}),
        ({"image": "busybox", "labels": as_json("{}")}, {"image": "busybox", "labels": {}}),
        ({"labels": as_json('{"team": "data"}')}, {"labels": {"team": "data"}}),
        ({"labels": as_json({"team": "data"})}, {"labels": {"team": "data"}}),
        ({"image": "busybox", "labels": as_json()}, {"image": "busybox"}),
        ({"mounts": [as_json('{"target": "/x"}'), as_json()]}, {"mounts": [{"target": "/x"}]}),
        (as_json('{"image": "busybox"}'), {"image": "busybox"}),
        (as_json(), {}),
        ({"priority": {"__prefect_kind": "none", "value": 50}}, {"priority": 50}),
        ({"memory_limit_mib": None}, {"memory_limit_mib": None}),
        # What was written as text is text, whatever it looks like.
        ({"command": ['{"__prefect_kind": "json"}']}, {"command": ['{"__prefect_kind": "json"}']}),
    ],
)
def test_a_value_is_what_was_meant(left: object, meant: object) -> None:
    assert plain(left) == meant


@pytest.mark.parametrize(
    "left",
    [
        {"labels": as_json("{")},
        {"image": {"__prefect_kind": "jinja", "template": "{{ flow_run.name }}"}},
        {"image": {"__prefect_kind": "workspace_variable", "variable_name": "image"}},
        {"image": {"__prefect_kind": "none"}},
    ],
)
def test_what_can_not_be_read_is_left_to_be_refused(left: object) -> None:
    assert plain(left) == left
