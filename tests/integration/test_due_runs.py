"""Which scheduled runs are due: missed ones of ours only once, people's all, and one that can't be shown harms none."""

import json
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient

from container_manager.conf import get_settings
from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import QueueManager
from deployments.definitions import Definition, definitions
from deployments.due import DueRuns
from deployments.registering import check
from tests.conftest import wait_until

from .conftest import Serve
from .prefect_side import (
    DAILY,
    JOBS,
    NAMES,
    NEW_JOB,
    QUEUE,
    add_schedule,
    create_unreadable_run,
    make_due,
    nightly,
    poisoned,
    registered,
    run_now,
    runs_of,
    there,
)

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

SPEC = {"spec": {"image": "busybox", "command": ["true"]}}


def definition_of(name: str) -> Definition:
    return next(definition for definition in definitions(get_settings()) if definition.full_name == name)


def due(api: SyncPrefectClient, name: str) -> list[str]:
    """The ids, by their times."""
    found = DueRuns(there(name).id, definition_of(name)).find(api)
    return [str(run.id) for run in sorted(found, key=lambda run: run.expected_start_time)]


def by(schedule: str, name: str) -> list[str]:
    """The ids of the runs that are left of this schedule, by their times, up to now."""
    return [
        str(run.id)
        for run in runs_of(there(name).id)
        if run.created_by
        and run.created_by.display_value == schedule
        and run.expected_start_time <= datetime.now(UTC)
        and run.state.is_scheduled()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_of_what_was_missed_our_own_schedule_runs_once_and_each_of_a_persons_every_time(
    api: SyncPrefectClient, database: str, settings: Any, name: str
) -> None:
    settings.CONTAINER_MANAGER = {"POLL_INTERVAL_SECONDS": 30}
    registered(api)
    for minutes, slug in ((4, "first"), (3, "second")):
        add_schedule(api, name, nightly(minutes_ago=minutes), slug=slug, parameters=SPEC if name == NEW_JOB else {})
    add_schedule(api, name, nightly(minutes_ago=4), parameters=SPEC if name == NEW_JOB else {})
    make_due(api, there(name).id, datetime.now(UTC) - timedelta(minutes=6))
    by_hand = str(
        run_now(api, name, at=datetime.now(UTC) - timedelta(minutes=5), parameters=SPEC if name == NEW_JOB else {})
    )
    theirs = [*by("first", name), *by("second", name), *by("CronSchedule", name)]
    missed = by("poll", name)
    found = due(api, name)

    assert len(theirs) == 3
    assert (len(missed) > 5) is (name == QUEUE)
    left = [run for run in found if run not in theirs]
    assert set(theirs) <= set(found)
    assert left[0] == by_hand
    # The one before has ended meanwhile, if the machine is slow.
    assert len(left) <= 3
    assert not set(left) & set(missed[:-1])


def test_a_run_that_cannot_be_shown_keeps_no_other_from_being_found(
    api: SyncPrefectClient, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "container_manager")
    ids = registered(api)
    before = str(run_now(api, NEW_JOB, parameters=SPEC))
    poison = create_unreadable_run(api, NEW_JOB)
    after = str(run_now(api, NEW_JOB, parameters=SPEC))
    beside = str(run_now(api, JOBS))
    runs = DueRuns(ids[NEW_JOB], definition_of(NEW_JOB))
    found = {str(run.id) for run in runs.find(api)}
    runs._look_again_at = 0
    again = {str(run.id) for run in runs.find(api)}

    assert found == again == {before, after}
    assert due(api, JOBS) == [beside]
    told = [record.message for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith(f"{NEW_JOB}: the Prefect API answers HTTP 500 for its scheduled runs; ")
    assert f"flow run {poison}: `prefect flow-run delete` removes it" in told[0]


def test_a_deployment_that_cannot_be_shown_is_left_out_and_the_others_are_registered(
    api: SyncPrefectClient, database: str, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "container_manager")
    ids = registered(api)
    settings.CONTAINER_MANAGER = {"POLL_INTERVAL_SECONDS": 20}
    with poisoned(api, JOBS):
        found = registered(api)
        check(api, {pk: definition_of(name) for name, pk in ids.items()})

    assert found == {name: pk for name, pk in ids.items() if name != JOBS}
    assert there(QUEUE).schedules[0].schedule.interval == timedelta(seconds=20)
    assert [record.message.partition(": ")[0] for record in caplog.records] == [f"{JOBS} is not served"]


@pytest.mark.timeout(400)
def test_passes_and_other_jobs_go_on_beside_runs_and_deployments_that_cannot_be_shown(
    docker_host: DockerHost, manager: QueueManager, api: SyncPrefectClient, serve: Serve
) -> None:
    with serve() as served:
        wait_until(lambda: f"serving {DAILY}" in served.log.read_text(), 120)
        create_unreadable_run(api, NEW_JOB)
        with poisoned(api, JOBS):
            job = manager.queue_job(ContainerJob.objects.create_job(image="busybox", command=["true"]))
            beside = run_now(api, NEW_JOB, parameters=SPEC)
            wait_until(lambda: ContainerJob.objects.get(pk=job.pk).status == Status.COMPLETED, 120)
            wait_until(lambda: api.read_flow_run(beside).state.is_completed(), 120)

    log = served.log.read_text()
    assert log.count(f"{NEW_JOB}: the Prefect API answers HTTP 500 for its scheduled runs") == 1
    assert served.process.returncode == 0


@pytest.mark.timeout(400)
def test_where_there_is_one_place_runs_that_wait_for_it_are_kept(
    docker_host: DockerHost, api: SyncPrefectClient, serve: Serve
) -> None:
    settings = {"POLL_INTERVAL_SECONDS": 3, "WORK_SECONDS": 2, "JOB_RUNS": 1}
    with serve(CONTAINER_MANAGER=json.dumps(settings)) as served:
        wait_until(lambda: f"serving {DAILY}" in served.log.read_text(), 120)
        spec = {"spec": {"image": "busybox", "command": ["sleep", "5"]}}
        first = run_now(api, NEW_JOB, parameters=spec)
        for minutes in (3, 2, 1):
            add_schedule(api, NEW_JOB, nightly(minutes_ago=minutes), parameters=SPEC)
        make_due(api, there(NEW_JOB).id, datetime.now(UTC) - timedelta(minutes=5))
        theirs = by("CronSchedule", NEW_JOB)
        wait_until(lambda: all(api.read_flow_run(run).state.is_final() for run in (first, *theirs)), 240)

    assert len(theirs) == 3
    assert {api.read_flow_run(run).state.name for run in (first, *theirs)} == {"Completed"}
    assert f"{NEW_JOB}: deleted" not in served.log.read_text()
