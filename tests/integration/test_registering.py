"""Registration on a real Prefect server: what is ours follows this version, what is a person's stays."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule

from container_manager.conf import Settings
from container_manager.models import Installation
from deployments.definitions import definitions
from deployments.registering import CannotServe
from flows.identity import labels

from .prefect_side import (
    DAILY,
    JOBS,
    NAMES,
    NEW_JOB,
    QUEUE,
    add_schedule,
    apply_as_before,
    changes_of,
    make_due,
    patch,
    registered,
    runs_of,
    schedules_of,
    there,
)

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

EUROPE = "Europe/Berlin"
SPEC = {"spec": {"image": "busybox", "command": ["true"]}}
SCHEDULES = {
    "cron": CronSchedule(cron="0 3 * * *", timezone=EUROPE),
    "interval": IntervalSchedule(interval=timedelta(hours=5)),
    "rrule": RRuleSchedule(rrule="FREQ=WEEKLY;BYDAY=MO", timezone=EUROPE),
}


@pytest.fixture
def pool(api: SyncPrefectClient) -> str:
    return api.create_work_pool(WorkPoolCreate(name="container-manager", type="process"), overwrite=True).name


def with_settings(settings: Any, **changes: Any) -> None:
    settings.CONTAINER_MANAGER = changes


def seen(name: str) -> dict[str, Any]:
    """All of a deployment, its schedules and the marks of time apart."""
    return there(name).model_dump(exclude={"schedules", "updated", "last_polled", "labels", "status", "updated_by"})


def test_a_second_registration_changes_nothing(api: SyncPrefectClient, database: str) -> None:
    first = changes_of(api)
    second = changes_of(api)

    assert "POST /deployments/" in first
    assert second == []


def test_what_is_registered_has_our_labels_and_says_what_it_is_for(api: SyncPrefectClient, database: str) -> None:
    registered(api)

    found = [there(name) for name in NAMES]
    assert all(labels().items() <= deployment.labels.items() for deployment in found)
    assert len({deployment.description for deployment in found}) == 4
    assert len({tuple(deployment.tags) for deployment in found}) == 4
    assert [deployment.pull_steps for deployment in found] == [None] * 4


def test_every_schedule_of_a_person_survives_registrations(
    api: SyncPrefectClient, database: str, settings: Any
) -> None:
    registered(api)
    for name in NAMES:
        parameters = SPEC if name == NEW_JOB else {}
        for kind, schedule in SCHEDULES.items():
            # The CLI gives it no slug.
            add_schedule(api, name, schedule, parameters=parameters)
            add_schedule(api, name, schedule, parameters=parameters, slug=kind, active=False)
    before = {name: schedules_of(name) for name in NAMES}
    registered(api)
    with_settings(settings, POLL_INTERVAL_SECONDS=20, MAX_CONCURRENT=7)
    registered(api)

    after = {name: schedules_of(name) for name in NAMES}
    assert {name: len(schedules) for name, schedules in before.items()} == {QUEUE: 7, JOBS: 6, NEW_JOB: 6, DAILY: 7}
    assert {name: schedules for name, schedules in after.items() if name != QUEUE} == {
        name: schedules for name, schedules in before.items() if name != QUEUE
    }
    assert [entry for entry in after[QUEUE] if entry[2] != "poll"] == [
        entry for entry in before[QUEUE] if entry[2] != "poll"
    ]


def test_a_changed_setting_reaches_the_deployment_and_its_schedule(
    api: SyncPrefectClient, database: str, settings: Any
) -> None:
    registered(api)
    with_settings(settings, POLL_INTERVAL_SECONDS=20, MAX_CONCURRENT=7)
    sent = changes_of(api)

    deployment = there(QUEUE)
    (schedule,) = deployment.schedules
    assert (deployment.parameters["max_concurrent"], schedule.schedule.interval) == (7, timedelta(seconds=20))
    assert [line for line in sent if line.startswith("POST /deployments/ ")] == []
    assert changes_of(api) == []


#: What a person may change of `process-queue/scheduled`, and what it then is, whatever else of it becomes another.
CHANGES: dict[str, tuple[dict[str, Any], Callable[[Any], Any], Any]] = {
    "a parameter": (
        {"parameters": {"max_concurrent": 3, "timeout": 30, "work_seconds": 8.0}},
        lambda deployment: deployment.parameters["max_concurrent"],
        3,
    ),
    "a parameter taken away": (
        {"parameters": {"max_concurrent": 100, "work_seconds": 8.0}},
        lambda deployment: "timeout" in deployment.parameters,
        False,
    ),
    "a tag": (
        {"tags": ["container-manager", "passes", "mine"]},
        lambda deployment: deployment.tags,
        ["container-manager", "passes", "mine"],
    ),
    "a tag taken away": ({"tags": ["container-manager"]}, lambda deployment: deployment.tags, ["container-manager"]),
    "the description": ({"description": "Mine."}, lambda deployment: deployment.description, "Mine."),
    "no description": ({"description": ""}, lambda deployment: deployment.description, ""),
    "a pause": ({"paused": True}, lambda deployment: deployment.paused, True),
    "a limit": (
        {"concurrency_limit": 2},
        lambda deployment: deployment.global_concurrency_limit and deployment.global_concurrency_limit.limit,
        2,
    ),
    "job variables": (
        {"job_variables": {"env": {"A": "b"}}},
        lambda deployment: deployment.job_variables,
        {"env": {"A": "b"}},
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_person_has_changed_stays(api: SyncPrefectClient, database: str, settings: Any, what: str) -> None:
    changes, look, expected = CHANGES[what]
    registered(api)
    patch(api, QUEUE, **changes)
    unchanged = changes_of(api)
    with_settings(settings, POLL_INTERVAL_SECONDS=20, WORK_SECONDS=17)
    registered(api)

    deployment = there(QUEUE)
    assert unchanged == []
    assert look(deployment) == expected
    # All else still follows the settings.
    assert deployment.parameters["work_seconds"] == 17
    assert deployment.schedules[0].schedule.interval == timedelta(seconds=20)


def test_a_schedule_of_ours_that_a_person_has_paused_changed_or_removed_stays_so(
    api: SyncPrefectClient, database: str, settings: Any
) -> None:
    registered(api)
    ours = {name: there(name).schedules[0] for name in (QUEUE, DAILY)}
    api.update_deployment_schedule(there(QUEUE).id, ours[QUEUE].id, active=False)
    api.update_deployment_schedule(there(DAILY).id, ours[DAILY].id, schedule=SCHEDULES["cron"])
    registered(api)
    with_settings(settings, POLL_INTERVAL_SECONDS=20)
    registered(api)
    paused, changed = there(QUEUE).schedules[0], there(DAILY).schedules[0]
    api.delete_deployment_schedule(there(QUEUE).id, paused.id)
    registered(api)

    assert (paused.active, paused.schedule.interval) == (False, timedelta(seconds=20))
    assert changed.schedule == SCHEDULES["cron"]
    assert there(QUEUE).schedules == []


def test_reset_sets_back_what_people_have_changed_and_leaves_what_they_have_added(
    api: SyncPrefectClient, database: str
) -> None:
    registered(api)
    as_made = seen(QUEUE)
    add_schedule(api, QUEUE, SCHEDULES["cron"])
    with_ours = schedules_of(QUEUE)
    patch(api, QUEUE, description="Mine.", parameters={"max_concurrent": 3}, tags=["mine"], paused=True)
    ours = next(schedule for schedule in there(QUEUE).schedules if schedule.slug == "poll")
    api.delete_deployment_schedule(there(QUEUE).id, ours.id)
    registered(api, reset=True)

    assert seen(QUEUE) == as_made
    assert schedules_of(QUEUE) == with_ours


@pytest.mark.parametrize("settled", [{}, {"POLL_INTERVAL_SECONDS": 3, "MAX_CONCURRENT": 7}], ids=["default", "set"])
def test_what_the_version_before_wrote_becomes_ours_once_and_then_follows(
    api: SyncPrefectClient, database: str, settings: Any, settled: dict[str, Any]
) -> None:
    apply_as_before(Settings(**settled))
    add_schedule(api, NEW_JOB, SCHEDULES["cron"], parameters=SPEC)
    add_schedule(api, QUEUE, SCHEDULES["rrule"], active=False)
    before = {name: (there(name).id, schedules_of(name)) for name in NAMES}
    with_settings(settings, **settled)
    sent = changes_of(api)
    after = {name: (there(name).id, schedules_of(name)) for name in NAMES}
    with_settings(settings, POLL_INTERVAL_SECONDS=30, MAX_CONCURRENT=5)
    later = changes_of(api)

    assert after == before
    # Once each; a server that is busy is asked again.
    assert sent.count("POST /deployments/") >= 4
    assert "POST /deployments/" not in later
    assert all(labels().items() <= there(name).labels.items() for name in NAMES)
    assert [there(definition.full_name).description for definition in definitions(Settings())] == [
        definition.description for definition in definitions(Settings())
    ]
    assert there(QUEUE).parameters["max_concurrent"] == 5
    assert changes_of(api) == []


def test_what_a_person_has_made_of_a_deployment_of_the_version_before_stays(
    api: SyncPrefectClient, database: str
) -> None:
    apply_as_before()
    changed = {
        "description": "Mine.",
        "tags": ["mine", "container-manager"],
        "parameters": {"max_concurrent": 3, "timeout": 30, "work_seconds": 8.0},
        "job_variables": {"env": {"A": "b"}},
        "paused": True,
        "concurrency_limit": 2,
        "enforce_parameter_schema": False,
    }
    patch(api, QUEUE, **changed)
    registered(api)

    deployment = there(QUEUE)
    del changed["tags"], changed["concurrency_limit"]
    assert {name: getattr(deployment, name) for name in changed} == changed
    assert deployment.global_concurrency_limit is not None
    assert deployment.global_concurrency_limit.limit == 2
    assert deployment.tags == ["mine", "container-manager", "passes"]


def test_a_deployment_moves_to_a_pool_and_back_with_what_people_have_made_of_it(
    api: SyncPrefectClient, database: str, pool: str
) -> None:
    registered(api)
    add_schedule(api, NEW_JOB, SCHEDULES["cron"], parameters=SPEC)
    patch(api, QUEUE, paused=True, parameters={"max_concurrent": 3})
    before = {name: (seen(name), schedules_of(name)) for name in NAMES}
    registered(api, pool=pool)
    queues = {name: (there(name).work_pool_name, there(name).work_queue_name) for name in NAMES}
    on_pool = {name: (there(name).id, schedules_of(name)) for name in NAMES}
    again = changes_of(api, pool=pool)
    with pytest.raises(CannotServe, match="is deployed on the work pool 'container-manager'"):
        registered(api)
    registered(api, take_over=True)

    assert queues == {name: (pool, "jobs" if name == NEW_JOB else "queue") for name in NAMES}
    assert on_pool == {name: (fields["id"], schedules) for name, (fields, schedules) in before.items()}
    assert again == []
    assert {name: (seen(name), schedules_of(name)) for name in NAMES} == before


EVERY_SECOND = IntervalSchedule(interval=timedelta(seconds=1), anchor_date=datetime(2024, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("before", "changes"),
    [(registered, {"MAX_CONCURRENT": 7}), (registered, {"POLL_INTERVAL_SECONDS": 20}), (apply_as_before, {})],
    ids=["a change", "another interval", "the labels"],
)
def test_every_slot_is_there_once_whatever_is_changed_meanwhile(
    api: SyncPrefectClient, database: str, settings: Any, before: Callable[..., object], changes: dict[str, Any]
) -> None:
    before(*([api] if before is registered else []))
    add_schedule(api, QUEUE, EVERY_SECOND, slug="mine")
    deployment_id = there(QUEUE).id
    began = datetime.now(UTC)
    make_due(api, deployment_id, began)
    with_settings(settings, **changes)
    sent = changes_of(api)
    ended = datetime.now(UTC)

    mine = [run for run in runs_of(deployment_id) if run.created_by and run.created_by.display_value == "mine"]
    slots = [run.expected_start_time for run in mine]
    seconds = range(1, int((ended - began).total_seconds()) + 2)
    assert sent
    assert len(slots) == len(set(slots))
    assert {began.replace(microsecond=0) + timedelta(seconds=second) for second in seconds} <= set(slots)


def test_a_slot_that_has_run_already_gets_no_twin(api: SyncPrefectClient, database: str) -> None:
    apply_as_before()
    add_schedule(api, JOBS, EVERY_SECOND, slug="mine")
    deployment_id = there(JOBS).id
    make_due(api, deployment_id, datetime.now(UTC) - timedelta(seconds=2))
    for run in runs_of(deployment_id):
        if run.expected_start_time <= datetime.now(UTC) + timedelta(seconds=1):
            api.request("POST", "/flow_runs/{id}/set_state", path_params={"id": run.id}, json={
                "state": {"type": "COMPLETED"}, "force": True,
            })  # fmt: skip
    registered(api)

    slots = [run.expected_start_time for run in runs_of(deployment_id)]
    assert len(slots) == len(set(slots))


def test_nothing_is_on_record_of_what_another_server_had(api: SyncPrefectClient, database: str) -> None:
    registered(api)
    recorded = Installation.load().registration.deployments

    assert {str(there(name).id) for name in NAMES} == set(recorded)
