"""Retention, on both databases, a real Engine and a real Prefect server."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import docker
import psycopg
import pytest
from django.utils.timezone import now
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, LogCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from container_manager.containers import INSTANCE_LABEL, JOB_LABEL
from container_manager.models import ContainerJob, DockerHost, Installation, JobAttempt, Reason, Status
from container_manager.purging import BATCH
from container_manager.queue import QueueManager
from flows.identity import inline_tag
from flows.late_runs import ids_of_runs
from flows.process_jobs import process_jobs
from flows.process_queue import process_queue
from flows.purge import purge
from flows.run_container_job import run_container_job
from tests.conftest import database_url, wait_until

from .prefect_side import DAILY, NAMES, NEW_JOB, QUEUE, another_installation, create_unreadable_run, registered, there

on_postgres = pytest.mark.parametrize("database", ["postgres"], indirect=True)
on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


def ended_jobs(count: int = 1, days: float = 0, **fields: Any) -> list[ContainerJob]:
    """Jobs that ended so long ago, with an attempt each."""
    ended_at = now() - timedelta(days=days)
    fields = {"status": Status.COMPLETED, "finished_at": ended_at, "attempt": 1} | fields
    jobs = ContainerJob.objects.bulk_create([ContainerJob(image="busybox", **fields) for _ in range(count)])
    JobAttempt.objects.bulk_create(
        [
            JobAttempt(
                job=job, number=1, host_name="gone", ended_at=ended_at, reason=Reason.EXIT_CODE, stdout="o", stderr="e"
            )
            for job in jobs
        ]
    )
    return jobs


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
def test_jobs_that_ended_long_ago_go_with_their_attempts(database: str, manager: QueueManager, status: Status) -> None:
    ended_jobs(days=90.01, status=status)
    (kept,) = ended_jobs(days=89.99, status=status)

    report = manager.purge()

    assert report.jobs == 1
    assert list(ContainerJob.objects.all()) == [kept]
    assert [attempt.job for attempt in JobAttempt.objects.all()] == [kept]


def test_jobs_that_have_not_ended_stay_however_old_they_are(database: str, manager: QueueManager) -> None:
    long_ago = now() - timedelta(days=1000)
    host = DockerHost.objects.create(name="away", base_url="ssh://not.allowed", is_active=False)
    for fields in (
        {"status": Status.PENDING},
        {"status": Status.QUEUED, "queued_at": long_ago},
        {"status": Status.SCHEDULED, "scheduled_for": long_ago},
        {"status": Status.RUNNING, "slot_host": host, "launched_at": long_ago},
    ):
        ContainerJob.objects.create(image="busybox", created_at=long_ago, updated_at=long_ago, **fields)

    report = manager.purge()

    assert (report.jobs, ContainerJob.objects.count()) == (0, 4)


def test_logs_go_before_their_attempts(database: str, manager: QueueManager) -> None:
    (old,), (young,) = ended_jobs(days=14.01), ended_jobs(days=13.99)

    report = manager.purge()

    logs = {attempt.job_id: (attempt.stdout, attempt.stderr) for attempt in JobAttempt.objects.all()}
    assert (report.logs, report.jobs) == (1, 0)
    assert logs == {old.pk: ("", ""), young.pk: ("o", "e")}


def test_how_long_is_a_setting(database: str, manager: QueueManager, settings: Any) -> None:
    settings.CONTAINER_MANAGER = {"KEEP_LOGS_DAYS": 1, "KEEP_JOBS_DAYS": 2}
    ended_jobs(days=2.01)
    ended_jobs(days=1.01)

    report = manager.purge()

    assert (report.logs, report.jobs, ContainerJob.objects.count()) == (2, 1, 1)


def test_more_than_fits_into_one_transaction_is_purged_at_once(database: str, manager: QueueManager) -> None:
    ended_jobs(2 * BATCH + 1, days=100)

    report = manager.purge()

    assert (report.logs, report.jobs) == (2 * BATCH + 1, 2 * BATCH + 1)
    assert not ContainerJob.objects.exists()
    assert not JobAttempt.objects.exists()


def test_a_dry_run_only_counts(database: str, docker_host: DockerHost, manager: QueueManager, settings: Any) -> None:
    settings.CONTAINER_MANAGER = {"KEEP_FAILED_CONTAINERS_SECONDS": 60}
    failed = failed_with_container(manager)
    ended_jobs(days=100)
    let_pass(failed, seconds=61)

    report = manager.purge(dry_run=True)

    assert (report.dry_run, report.containers, report.logs, report.jobs) == (True, 1, 1, 1)
    assert ContainerJob.objects.count() == 2
    assert JobAttempt.objects.exclude(stdout="").count() == 1
    assert manager.purge() == report.model_copy(update={"dry_run": False})


def failed_with_container(manager: QueueManager) -> ContainerJob:
    job = manager.queue_job(ContainerJob.objects.create_job(image="busybox", command=["false"]))
    manager.process_queue_continuous(5, 1, work_seconds=20)
    job.refresh_from_db()
    assert job.status == Status.FAILED
    return job


def let_pass(job: ContainerJob, seconds: float) -> None:
    ContainerJob.objects.filter(pk=job.pk).update(finished_at=now() - timedelta(seconds=seconds))


def test_containers_of_failed_jobs_are_kept_for_a_look_and_then_removed(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = {"KEEP_FAILED_CONTAINERS_SECONDS": 60}
    job = failed_with_container(manager)
    # No pass looks at a host that is drained and has nothing to do.
    DockerHost.objects.update(is_active=False)

    early = manager.purge()
    let_pass(job, seconds=61)
    late = manager.purge()

    assert (early.containers, late.containers) == (0, 1)
    with pytest.raises(docker.errors.NotFound):
        engine.containers.get(job.container_id)


def test_the_job_of_a_container_that_is_kept_is_kept_too(
    docker_host: DockerHost, manager: QueueManager, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = {"KEEP_FAILED_CONTAINERS_SECONDS": 60, "KEEP_JOBS_DAYS": 0}
    job = failed_with_container(manager)

    early = manager.purge()
    let_pass(job, seconds=61)
    late = manager.purge()

    assert ((early.containers, early.jobs), (late.containers, late.jobs)) == ((0, 0), (1, 1))
    assert not late.anomalies


@on_sqlite
def test_a_container_without_a_job_is_only_reported(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    labels = {INSTANCE_LABEL: Installation.load().instance_id, JOB_LABEL: "123"}
    stray = engine.containers.create("busybox", ["true"], labels=labels)

    report = manager.purge()

    assert report.containers == 0
    assert [f"container {stray.name} belongs to no job" in anomaly for anomaly in report.anomalies] == [True]
    stray.reload()


@on_postgres
def test_a_job_that_is_just_being_run_anew_is_left_for_the_next_purge(database: str, manager: QueueManager) -> None:
    (job,) = ended_jobs(days=100)

    with psycopg.connect(database_url()) as other:
        other.execute("SELECT 1 FROM container_manager_containerjob WHERE id = %s FOR NO KEY UPDATE", [job.pk])
        held = manager.purge()
    free = manager.purge()

    assert (held.jobs, free.jobs) == (0, 1)


@flow(name="somebody-elses")
def somebody_elses() -> None:
    """Not ours to delete."""


def record(
    client: SyncPrefectClient,
    of: Any,
    state: State,
    *,
    deployment: str = "",
    inline: bool = True,
    with_artifact: bool = False,
) -> UUID:
    """A flow run as it is when it is over, with what it leaves; `inline`: the command's own, if of no deployment."""
    if deployment:
        parameters = {"spec": {"image": "busybox"}} if deployment == NEW_JOB else {}
        run_id = client.create_flow_run_from_deployment(there(deployment).id, state=state, parameters=parameters).id
    else:
        run_id = client.create_flow_run(of, state=state, tags=[inline_tag()] if inline else ["container-manager"]).id
    client.create_logs([LogCreate(name="test", level=20, message="text", timestamp=now(), flow_run_id=run_id)])
    if with_artifact:
        client.create_artifact(ArtifactCreate(key="container-queue", type="table", data="[]", flow_run_id=run_id))
    return run_id


def left_of(client: SyncPrefectClient, run_ids: list[UUID]) -> tuple[int, int]:
    """How many runs, and how many of their logs."""
    runs = logs = 0
    for start in range(0, len(run_ids), 200):
        some = run_ids[start : start + 200]
        runs += len(client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=some)), limit=200))
        logs += len(client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=some)), limit=200))
    return runs, logs


def record_idle(client: SyncPrefectClient, count: int) -> list[UUID]:
    """As many passes of a deployment that had nothing to do, with a log and every hundredth with an artifact."""
    deployment_id = registered(client)[QUEUE]
    run_ids: list[UUID] = []
    while len(run_ids) < count:
        path = f"/deployments/{deployment_id}/create_flow_run/bulk"
        wanted = [{"state": {"type": "COMPLETED", "name": "Idle"}}] * min(100, count - len(run_ids))
        made = client.request("POST", path, json=wanted).json()["results"]
        # On SQLite the server may find its database locked.
        run_ids += [UUID(result["flow_run_id"]) for result in made if result["flow_run_id"]]
    for run_id in run_ids[::100]:
        client.create_artifact(ArtifactCreate(key="container-queue", type="table", data="[]", flow_run_id=run_id))
    logs = [LogCreate(name="test", level=20, message="text", timestamp=now(), flow_run_id=run) for run in run_ids]
    client.create_logs(logs)
    return run_ids


@on_sqlite
def test_flow_runs_that_had_nothing_to_do_go_and_leave_nothing(
    database: str, api: SyncPrefectClient, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = {"KEEP_IDLE_RUNS_DAYS": 0}
    idle = record_idle(api, 300)
    kept = [
        record(api, process_queue, Completed(), deployment=QUEUE, with_artifact=True),
        record(api, process_queue, Running(name="Idle"), deployment=QUEUE),
        record(api, somebody_elses, Completed(name="Idle")),
    ]

    # A server that is slow may have made some of them twice.
    count = purge(dry_run=True).idle_runs

    state = purge(return_state=True)

    assert count >= 300
    assert (state.result().idle_runs, state.result().runs, state.result().artifacts) == (count, 0, 3)
    assert state.message.splitlines()[0] == f"removed {count} idle flow runs, 3 artifacts"
    # Their logs go in the background.
    wait_until(lambda: left_of(api, idle) == (0, 0))
    assert left_of(api, kept) == (3, 3)
    assert {artifact.flow_run_id for artifact in api.read_artifacts()} & {*idle, *kept} == {kept[0]}


def ended(client: SyncPrefectClient, **fields: Any) -> list[UUID]:
    return [
        record(client, of, state, **{key: names[of.name] for key, names in fields.items()})
        for of in (process_queue, process_jobs, run_container_job)
        for state in (Completed(), Failed(), Crashed(), Cancelled())
    ]


@on_sqlite
def test_all_flow_runs_of_ours_go_in_the_end(database: str, api: SyncPrefectClient, settings: Any) -> None:
    settings.CONTAINER_MANAGER = {"KEEP_RUNS_DAYS": 0}
    registered(api)
    names = {name.partition("/")[0]: name for name in NAMES}
    ours = [*ended(api), *ended(api, deployment=names)]
    # What the API can't show is no less ours.
    ours.append(create_unreadable_run(api, NEW_JOB, state={"type": "FAILED"}))
    deleted = record(api, purge, Completed(), deployment=DAILY)
    api.delete_deployment(there(DAILY).id)
    kept = [record(api, run_container_job, Running()), record(api, run_container_job, Running(), deployment=NEW_JOB)]

    counted = purge(dry_run=True)
    removed = purge()

    assert (counted.dry_run, counted.runs, removed.runs) == (True, len(ours) + 1, len(ours) + 1)
    assert ids_of_runs(api, {"id": {"any_": [str(run_id) for run_id in (*ours, deleted)]}}) == []
    assert left_of(api, kept)[0] == 2


@on_sqlite
def test_flow_runs_of_a_deployment_under_an_earlier_name_go_too(
    database: str, api: SyncPrefectClient, settings: Any
) -> None:
    registered(api)
    old = record(api, process_queue, Completed(), deployment=QUEUE)
    settings.CONTAINER_MANAGER = {"NAME": "staging", "KEEP_RUNS_DAYS": 0}
    registered(api)

    report = purge()

    assert (report.runs, left_of(api, [old])[0]) == (1, 0)


@flow(name="purge")
def somebody_elses_purge() -> None:
    """Called as ours is."""


@flow(name="somebodys-night")
def somebodys_night() -> State:
    return run_container_job({"image": "busybox", "command": ["true"], "host": "nowhere"}, return_state=True)


@on_sqlite
def test_flow_runs_of_others_stay_whatever_they_are_called(
    database: str, api: SyncPrefectClient, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = {"KEEP_RUNS_DAYS": 0, "KEEP_IDLE_RUNS_DAYS": 0}
    with another_installation():
        registered(api)
        theirs = [record(api, process_queue, Completed(name="Idle"), deployment=QUEUE), record(api, purge, Failed())]
    own_flow = api.create_flow_from_name("purge")
    own = [api.create_deployment(own_flow, name, tags=tags) for name, tags in (("a", []), ("b", ["container-manager"]))]
    peoples = [
        *(api.create_flow_run_from_deployment(deployment, state=Completed()).id for deployment in own),
        record(api, somebody_elses_purge, Completed(), inline=False),
        record(api, process_queue, Completed(name="Idle"), inline=False),
    ]
    somebodys_night(return_state=True)
    inner = [run.id for run in api.read_flow_runs(limit=200) if run.parent_task_run_id]

    report = purge()

    assert (report.runs, report.idle_runs) == (0, 0)
    kept = [*theirs, *peoples, *inner]
    assert inner
    assert left_of(api, kept)[0] == len(kept)


@on_sqlite
def test_flow_runs_are_kept_for_as_long_as_the_settings_say(database: str, api: SyncPrefectClient) -> None:
    registered(api)
    young = [
        record(api, process_queue, Completed(name="Idle"), deployment=QUEUE),
        record(api, process_queue, Failed()),
    ]

    report = purge()

    assert (report.idle_runs, report.runs, left_of(api, young)) == (0, 0, (2, 2))
