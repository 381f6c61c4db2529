"""What becomes of a deployment's values: ours follow this version, a person's stay."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from container_manager.conf import Settings
from container_manager.types import DeploymentRecord, ScheduleRecord
from deployments.definitions import definitions
from deployments.merging import merged
from deployments.values import desired, earlier

MIDNIGHT = "2024-01-01T00:00:00+00:00"
TEN, TWENTY = (ScheduleRecord(interval_seconds=seconds, anchor=MIDNIGHT) for seconds in (10, 20))


def record(**fields: Any) -> DeploymentRecord:
    return DeploymentRecord(name="a/b", **fields)


#: What we wrote, what the server has, what this version wants, and what the server then gets.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "a description that nobody changed follows": (
        {"description": "old"}, {"description": "old"}, {"description": "new"}, {"description": "new"},
    ),
    "a person's description stays": (
        {"description": "old"}, {"description": "mine"}, {"description": "new"}, {"description": "mine"},
    ),
    "a description that a person has emptied stays empty": (
        {"description": "old"}, {"description": ""}, {"description": "new"}, {"description": ""},
    ),
    "each parameter is dealt with for itself": (
        {"parameters": {"a": 1, "b": 1}}, {"parameters": {"a": 2, "b": 1}}, {"parameters": {"a": 3, "b": 3}},
        {"parameters": {"a": 2, "b": 3}},
    ),
    "a parameter that a person has added stays": (
        {"parameters": {"a": 1}}, {"parameters": {"a": 1, "c": 5}}, {"parameters": {"a": 2}},
        {"parameters": {"a": 2, "c": 5}},
    ),
    "a parameter that a person has removed stays removed": (
        {"parameters": {"a": 1, "b": 1}}, {"parameters": {"a": 1}}, {"parameters": {"a": 1, "b": 2}},
        {"parameters": {"a": 1}},
    ),
    "a parameter that this version no longer has goes": (
        {"parameters": {"a": 1, "b": 1}}, {"parameters": {"a": 1, "b": 1}}, {"parameters": {"a": 1}},
        {"parameters": {"a": 1}},
    ),
    "one that it no longer has, and a person has changed, stays": (
        {"parameters": {"a": 1, "b": 1}}, {"parameters": {"a": 1, "b": 2}}, {"parameters": {"a": 1}},
        {"parameters": {"a": 1, "b": 2}},
    ),
    "a parameter that is new comes": (
        {"parameters": {"a": 1}}, {"parameters": {"a": 1}}, {"parameters": {"a": 1, "n": None}},
        {"parameters": {"a": 1, "n": None}},
    ),
    "a parameter that is nothing is not one that is not there": (
        {"parameters": {"a": None}}, {"parameters": {}}, {"parameters": {"a": None}}, {"parameters": {}},
    ),
    "a person's tag stays, and ours follow": (
        {"tags": ("a", "b")}, {"tags": ("a", "b", "mine")}, {"tags": ("a", "c")}, {"tags": ("a", "mine", "c")},
    ),
    "a tag that a person has removed stays removed": (
        {"tags": ("a", "b")}, {"tags": ("b",)}, {"tags": ("a", "b", "c")}, {"tags": ("b", "c")},
    ),
    "a person's order of tags stays": (
        {"tags": ("a", "b")}, {"tags": ("b", "a")}, {"tags": ("a", "b")}, {"tags": ("b", "a")},
    ),
    "a person's pause stays": ({}, {"is_paused": True}, {}, {"is_paused": True}),
    "a pause of ours is over when nothing asks for it": ({"is_paused": True}, {"is_paused": True}, {}, {}),
    "one of ours that a person has ended stays ended": ({"is_paused": True}, {}, {}, {}),
    "a schedule that nobody changed follows": (
        {"schedule": TEN}, {"schedule": TEN}, {"schedule": TWENTY}, {"schedule": TWENTY},
    ),
    "one in a time zone of a person's stays": (
        {"schedule": TEN}, {"schedule": TEN.model_copy(update={"timezone": "Europe/Berlin"})}, {"schedule": TWENTY},
        {"schedule": TEN.model_copy(update={"timezone": "Europe/Berlin"})},
    ),
    "a schedule that a person has removed stays removed": ({"schedule": TEN}, {}, {"schedule": TWENTY}, {}),
    "a schedule that is new comes": ({}, {}, {"schedule": TEN}, {"schedule": TEN}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_the_server_gets(case: str) -> None:
    written, server, wanted, expected = CASES[case]

    result, _ = merged(record(**server), record(**wanted), [record(**written)])

    assert result == record(**expected)


values = st.integers(0, 2) | st.none() | st.booleans() | st.lists(st.integers(0, 1), max_size=1)
tags = st.lists(st.sampled_from("abcd"), max_size=3, unique=True).map(tuple)
records = st.builds(
    DeploymentRecord,
    name=st.just("a/b"),
    description=st.sampled_from(["", "x", "y"]),
    parameters=st.dictionaries(st.sampled_from("pqr"), values, max_size=3),
    tags=tags,
    is_paused=st.booleans(),
    schedule=st.none() | st.sampled_from([TEN, TWENTY]),
)


@given(records, records, st.lists(records, min_size=1, max_size=3))
def test_a_second_time_changes_nothing(
    server: DeploymentRecord, wanted: DeploymentRecord, written: list[DeploymentRecord]
) -> None:
    result, kept = merged(server, wanted, written)

    assert merged(result, wanted, [kept]) == (result, kept)


@given(records, records)
def test_where_nobody_has_changed_anything_the_server_gets_what_we_want(
    before: DeploymentRecord, wanted: DeploymentRecord
) -> None:
    result, kept = merged(before, wanted, [before])

    assert result.model_copy(update={"tags": ()}) == wanted.model_copy(update={"tags": ()})
    assert set(result.tags) == set(wanted.tags)
    assert kept == wanted


@given(records, records, records)
def test_what_a_person_has_changed_is_never_changed(
    before: DeploymentRecord, server: DeploymentRecord, wanted: DeploymentRecord
) -> None:
    result, kept = merged(server, wanted, [before])
    later, _ = merged(result, record(parameters={"p": 9, "z": 9}, tags=("z",)), [kept])

    for mine in (result, later):
        assert {key: mine.parameters.get(key, "gone") for key in changed(before, server, wanted)} == {
            key: server.parameters.get(key, "gone") for key in changed(before, server, wanted)
        }
        assert set(server.tags) - set(before.tags) - set(wanted.tags) <= set(mine.tags)
        # A tag of ours that somebody has removed.
        assert not set(mine.tags) & (set(before.tags) & set(wanted.tags) - set(server.tags))


def changed(before: DeploymentRecord, server: DeploymentRecord, wanted: DeploymentRecord) -> set[str]:
    """The parameters that a person has changed to what nobody else wants."""
    keys = {*before.parameters, *server.parameters}
    theirs = {key for key in keys if before.parameters.get(key, "gone") != server.parameters.get(key, "gone")}
    return {key for key in theirs if server.parameters.get(key, "gone") not in (wanted.parameters.get(key, "gone"), 9)}


@pytest.mark.parametrize("settings", [{}, {"MAX_CONCURRENT": 7, "POLL_INTERVAL_SECONDS": 3}], ids=["default", "set"])
@pytest.mark.parametrize("wrote", [{}, {"MAX_CONCURRENT": 7, "POLL_INTERVAL_SECONDS": 3}], ids=["default", "set"])
@pytest.mark.parametrize("index", range(4))
def test_what_an_earlier_version_wrote_without_a_record_is_ours(
    settings: dict[str, Any], wrote: dict[str, Any], index: int
) -> None:
    definition, then = definitions(Settings(**settings))[index], definitions(Settings(**wrote))[index]
    server = desired(then).model_copy(update={"description": then.earlier_description, "tags": ("container-manager",)})

    result, kept = merged(server, desired(definition), earlier(definition, Settings(**settings)))

    # By the defaults, or by the settings as they are; only one of the four follows them.
    is_known = wrote in ({}, settings) or definition.flow.name != "process-queue"
    assert (result == kept == desired(definition)) is is_known
    assert result.tags == definition.tags
