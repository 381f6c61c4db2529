"""Which installation a deployment and a flow run belong to, where several share a Prefect server."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.flow_engine import run_flow
from prefect.states import Scheduled

from container_manager.conf import get_settings
from container_manager.containers import INSTANCE_LABEL
from container_manager.models import ContainerJob, DockerHost, Installation
from container_manager.queue import queue_manager
from container_manager.types import LoopStats
from deployments.__main__ import main
from deployments.definitions import definitions
from deployments.due import DueRuns
from deployments.registering import CannotServe
from deployments.renaming import replaced
from flows.identity import OtherInstallation, our_deployment_ids
from flows.limits import settle
from flows.process_jobs import process_jobs
from flows.process_queue import process_queue
from flows.purge import purge
from flows.run_container_job import run_container_job
from flows.triggering import check_deployment, run_deployment

from .prefect_side import (
    DAILY,
    JOBS,
    NAMES,
    NEW_JOB,
    QUEUE,
    add_schedule,
    another_installation,
    make_due,
    nightly,
    patch,
    poisoned,
    registered,
    run_now,
    runs_of,
    schedules_of,
    there,
)

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


def named(name: str, prefix: str = "staging") -> str:
    flow_name, _, deployment = name.partition("/")
    return f"{flow_name}/{prefix}.{deployment}" if prefix else name


def limits(api: SyncPrefectClient) -> dict[str, int]:
    return {row.name: row.limit for row in api.read_global_concurrency_limits(limit=200)}


@pytest.mark.parametrize("arguments", [[], ["sync"], ["limits"], ["limits", "--reset"]], ids=" ".join)
def test_a_second_installation_is_refused_in_a_line_before_it_has_changed_anything(
    api: SyncPrefectClient, database: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    DockerHost.objects.create(name="one", base_url="unix:///nowhere", max_concurrent_jobs=3)
    registered(api)
    settle(api)
    before = limits(api), {name: there(name) for name in NAMES}
    with another_installation():
        DockerHost.objects.update(max_concurrent_jobs=8)
        code = main(arguments)
        mine = Installation.load().registered

    told = capsys.readouterr()
    assert (code, told.out, told.err.count("\n"), mine) == (1, "", 1, {})
    assert told.err.startswith(f"{QUEUE} on this Prefect server belongs to another installation, ")
    assert "CONTAINER_MANAGER['NAME']" in told.err
    assert (limits(api), {name: there(name) for name in NAMES}) == before


def test_with_a_name_everything_is_its_own(
    api: SyncPrefectClient, database: str, settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    DockerHost.objects.create(name="one", base_url="unix:///nowhere", max_concurrent_jobs=3)
    registered(api)
    settle(api)
    ours = {name: there(name) for name in NAMES}
    with another_installation() as other:
        settings.CONTAINER_MANAGER = {"NAME": "staging"}
        DockerHost.objects.update(max_concurrent_jobs=5)
        code = main(["sync"])
        found = [there(named(name)) for name in NAMES]

    assert code == 0
    assert {name: there(name) for name in NAMES} == ours
    assert [deployment.labels[INSTANCE_LABEL] for deployment in found] == [other] * 4
    assert {tag.split(".")[0] for deployment in found for tag in deployment.tags} == {"staging"}
    assert {"tag:container-job": 3, "tag:staging.container-job": 5}.items() <= limits(api).items()
    out = capsys.readouterr().out
    assert "registered process-queue/staging.scheduled, every 10 s" in out
    assert "tag staging.container-job" in out
    assert "tag container-job" not in out


def test_with_another_ones_deployments_a_name_and_take_over_are_the_ways_out(
    api: SyncPrefectClient, database: str
) -> None:
    with another_installation():
        registered(api)
        add_schedule(api, NEW_JOB, nightly())
        theirs = {name: (there(name).id, schedules_of(name)) for name in NAMES}
    with pytest.raises(CannotServe, match="belongs to another installation"):
        registered(api)
    registered(api, take_over=True)

    assert {name: (there(name).id, schedules_of(name)) for name in NAMES} == theirs
    assert {there(name).labels[INSTANCE_LABEL] for name in NAMES} == {Installation.load().instance_id}


def mine(name: str) -> list[tuple[Any, ...]]:
    """People's schedules."""
    return [entry for entry in schedules_of(name) if entry[2] != "poll"]


SPEC = {"spec": {"image": "busybox", "command": ["true"]}}


def test_a_name_that_is_set_later_takes_along_what_people_have_made(
    api: SyncPrefectClient, database: str, settings: Any
) -> None:
    registered(api)
    add_schedule(api, NEW_JOB, nightly(), parameters=SPEC)
    add_schedule(api, QUEUE, nightly(), slug="mine", active=False)
    api.update_deployment_schedule(there(DAILY).id, there(DAILY).schedules[0].id, active=False)
    patch(api, JOBS, paused=True)
    patch(api, QUEUE, parameters=there(QUEUE).parameters | {"max_concurrent": 3}, description="Mine.", tags=["mine"])
    before = {name: schedules_of(name) for name in NAMES}
    settings.CONTAINER_MANAGER = {"NAME": "staging"}
    registered(api)
    registered(api)

    assert {name: schedules_of(named(name)) for name in NAMES} == before
    assert {name: there(named(name)).paused for name in NAMES} == {name: name == JOBS for name in NAMES}
    assert {there(name).paused for name in NAMES} == {True}
    queue = there(named(QUEUE))
    assert (queue.parameters["max_concurrent"], queue.parameters["timeout"], queue.description) == (3, 30, "Mine.")
    assert "mine" in queue.tags
    assert set(our_deployment_ids(api)) == {there(name).id for name in (*NAMES, *map(named, NAMES))}


def test_no_slot_of_a_persons_schedule_is_lost_or_doubled_when_a_name_is_set(
    api: SyncPrefectClient, database: str, settings: Any
) -> None:
    ids = registered(api)
    every_second = IntervalSchedule(interval=timedelta(seconds=1), anchor_date=datetime(2024, 1, 1, tzinfo=UTC))
    add_schedule(api, JOBS, every_second)
    began = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)
    make_due(api, ids[JOBS], began)

    settings.CONTAINER_MANAGER = {"NAME": "staging"}
    named_ids = registered(api)

    record = Installation.load().registration.deployments[str(ids[JOBS])]
    assert record.replaced_at is not None
    old = [run.expected_start_time for run in runs_of(ids[JOBS]) if run.expected_start_time <= record.replaced_at]
    new = [run.expected_start_time for run in runs_of(named_ids[named(JOBS)])]
    until = record.replaced_at + timedelta(seconds=5)
    slots = sorted(slot for slot in (*old, *new) if began <= slot <= until)
    count = int((until - began).total_seconds()) + 1
    assert slots == [began + timedelta(seconds=second) for second in range(count)]


def test_a_name_that_is_taken_away_again_brings_back_the_old_ones_as_people_have_made_the_new_ones(
    api: SyncPrefectClient, database: str, settings: Any
) -> None:
    registered(api)
    add_schedule(api, NEW_JOB, nightly(), slug="stays")
    changed = add_schedule(api, NEW_JOB, nightly(60), slug="changed")
    add_schedule(api, NEW_JOB, nightly(60), slug="goes")
    settings.CONTAINER_MANAGER = {"NAME": "staging"}
    registered(api)
    new = there(named(NEW_JOB))
    by_slug = {schedule.slug: schedule for schedule in new.schedules}
    assert changed not in [schedule.id for schedule in new.schedules]
    api.update_deployment_schedule(new.id, by_slug["changed"].id, schedule=nightly(120))
    api.delete_deployment_schedule(new.id, by_slug["goes"].id)
    add_schedule(api, named(NEW_JOB), nightly(180), slug="comes")
    patch(api, named(QUEUE), parameters=there(named(QUEUE)).parameters | {"max_concurrent": 3})
    wanted = mine(named(NEW_JOB))
    settings.CONTAINER_MANAGER = {}
    registered(api)

    assert mine(NEW_JOB) == wanted
    assert {name: there(name).paused for name in NAMES} == dict.fromkeys(NAMES, False)
    assert {there(named(name)).paused for name in NAMES} == {True}
    assert there(QUEUE).parameters["max_concurrent"] == 3


EVERY_SECOND = IntervalSchedule(interval=timedelta(seconds=1))


def test_what_waits_when_a_name_is_set_is_still_there_for_whoever_serves(
    api: SyncPrefectClient, database: str, settings: Any
) -> None:
    registered(api)
    add_schedule(api, NEW_JOB, nightly(minutes_ago=2), slug="mine", parameters=SPEC)
    old = there(NEW_JOB).id
    make_due(api, old, datetime.now(UTC) - timedelta(minutes=4))
    by_hand = run_now(api, NEW_JOB, parameters=SPEC)
    later = run_now(api, NEW_JOB, at=datetime.now(UTC) + timedelta(hours=1), parameters=SPEC)
    due = [run.id for run in runs_of(old) if run.expected_start_time <= datetime.now(UTC)]
    settings.CONTAINER_MANAGER = {"NAME": "staging"}
    ids = registered(api)
    served = replaced(
        {pk: of for of in definitions(get_settings()) for name, pk in ids.items() if name == of.full_name}
    )

    definition, since = served[old]
    # As Prefect's scheduler does where it is at it when the deployment is paused.
    patch(api, NEW_JOB, paused=False)
    add_schedule(api, NEW_JOB, EVERY_SECOND, slug="mine-too")
    make_due(api, old, datetime.now(UTC) + timedelta(seconds=1))
    time.sleep(2)
    found = DueRuns(old, definition, until=since).find(api)

    left = {run.id for run in runs_of(old) if run.state.is_scheduled()}
    assert len(due) == 2
    assert by_hand in due
    assert {*due, later} <= left
    assert {run.id for run in found} == set(due)
    assert definition.full_name == named(NEW_JOB)
    assert old not in ids.values()


FLOWS = (
    (process_queue, {"work_seconds": 0}),
    (process_jobs, {}),
    (purge, {}),
    (run_container_job, {"spec": {"image": "busybox", "command": ["true"]}}),
)


@pytest.mark.parametrize(("of", "parameters"), FLOWS, ids=lambda value: getattr(value, "name", ""))
def test_a_flow_run_that_is_meant_for_another_installation_fails_and_touches_nothing(
    api: SyncPrefectClient, database: str, of: Any, parameters: dict[str, Any]
) -> None:
    waiting = queue_manager.queue_job(ContainerJob.objects.create_job(image="busybox", command=["true"]))
    with another_installation() as other:
        registered(api)
    name = next(full_name for full_name in NAMES if full_name.startswith(of.name))
    run = api.create_flow_run_from_deployment(there(name).id, parameters=parameters, state=Scheduled())
    state: State[Any] = run_flow(of, flow_run=api.read_flow_run(run.id), return_type="state")

    (job,) = ContainerJob.objects.all()
    ours = Installation.load().instance_id
    assert (job.status, job.pk) == ("queued", waiting.pk)
    assert state.is_failed()
    assert state.message.startswith(
        f"this flow run is meant for installation {other}, and the database here is that of"
    )
    assert ours in state.message
    assert state.message.count("\n") == 0


def test_the_command_refuses_a_deployment_of_another_installation_before_it_has_triggered_anything(
    api: SyncPrefectClient, database: str
) -> None:
    with another_installation() as other:
        registered(api)
    said = f"deployment {QUEUE} belongs to installation {other}, and the database here to {Installation.load()}"
    with pytest.raises(OtherInstallation, match=said):
        check_deployment(QUEUE)
    with pytest.raises(OtherInstallation, match=said):
        run_deployment(QUEUE, {}, LoopStats, pickup_seconds=1)

    assert [run.id for run in runs_of(there(QUEUE).id) if not run.auto_scheduled] == []


def test_of_a_server_with_several_installations_only_our_own_deployments_are_ours(
    api: SyncPrefectClient, database: str, settings: Any
) -> None:
    @flow(name="purge")
    def somebody_elses() -> None: ...

    api.create_deployment(
        api.create_flow_from_name(somebody_elses.name),
        "nightly",
        tags=["container-manager"],
        entrypoint="cleaning/purge.py:purge",
    )
    ours = set(registered(api).values())
    with another_installation():
        settings.CONTAINER_MANAGER = {"NAME": "staging"}
        theirs = set(registered(api).values())
        found_by_them = set(our_deployment_ids(api))
    settings.CONTAINER_MANAGER = {}

    assert (set(our_deployment_ids(api)), found_by_them) == (ours, theirs)


def test_what_prefect_yaml_has_deployed_is_ours_without_a_label(api: SyncPrefectClient, database: str) -> None:
    deployed = api.create_deployment(
        api.create_flow_from_name("purge"), "daily", tags=["container-manager"], entrypoint="flows.purge:purge"
    )

    assert our_deployment_ids(api) == [deployed]


def test_those_on_record_are_ours_also_where_the_server_cannot_list_them_or_has_them_no_more(
    api: SyncPrefectClient, database: str
) -> None:
    ids = registered(api)
    api.delete_deployment(ids[DAILY])
    with poisoned(api, JOBS):
        assert set(our_deployment_ids(api)) == set(ids.values())
