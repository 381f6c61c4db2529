"""What is on the Prefect server, and what others do there: people, an earlier version, another installation."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Interval
from prefect.states import Scheduled

from container_manager.conf import Settings, get_settings
from container_manager.models import Installation
from deployments.definitions import Definition, definitions
from deployments.registering import register
from flows.late_runs import ids_of_runs

QUEUE, JOBS = "process-queue/scheduled", "process-jobs/on-demand"
NEW_JOB, DAILY = "run-container-job/on-demand", "purge/daily"
NAMES = (QUEUE, JOBS, NEW_JOB, DAILY)

#: Asked by POST, and changing nothing.
_QUESTIONS = ("/filter", "/count", "/get_scheduled_flow_runs", "/history")


def read(name: str) -> DeploymentResponse | None:
    with get_client(sync_client=True) as client:
        try:
            return client.read_deployment_by_name(name)
        except ObjectNotFound:
            return None


def there(name: str) -> DeploymentResponse:
    """As `read`, of one that is there."""
    deployment = read(name)
    assert deployment is not None, name
    return deployment


def runs_of(deployment_id: UUID) -> list[FlowRun]:
    """The first two hundred, by their times."""
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]))
        return client.read_flow_runs(flow_run_filter=chosen, limit=200, sort=FlowRunSort.EXPECTED_START_TIME_ASC)


def registered(client: SyncPrefectClient, **options: Any) -> dict[str, UUID]:
    """Register all by the settings that hold now; the ids by the names."""
    found = register(client, definitions(get_settings()), **options)
    return {definition.full_name: pk for pk, definition in found.items()}


def changes_of(client: SyncPrefectClient, **options: Any) -> list[str]:
    """Register, and say what was sent that changes anything."""
    sent: list[str] = []

    def note(request: httpx.Request) -> None:
        path = request.url.path.removeprefix("/api")
        if request.method != "GET" and not path.endswith(_QUESTIONS):
            sent.append(f"{request.method} {path}")

    with get_client(sync_client=True, httpx_settings={"event_hooks": {"request": [note]}}) as noted:
        registered(noted, **options)
    return sent


def patch(client: SyncPrefectClient, name: str, **changes: Any) -> None:
    """Whatever the API takes, by a person or an attacker."""
    client.request("PATCH", "/deployments/{id}", path_params={"id": there(name).id}, json=changes)


def add_schedule(client: SyncPrefectClient, name: str, schedule: Any, **fields: Any) -> UUID:
    """As a person does, in the UI or by the CLI, which gives it no slug."""
    new = DeploymentScheduleCreate(schedule=schedule, **fields)
    return client.create_deployment_schedules(there(name).id, [new])[0].id


def schedules_of(name: str) -> list[tuple[Any, ...]]:
    """All that a person can see of them, in no order, the ids apart."""
    return sorted(
        (
            (str(entry.schedule), entry.active, entry.slug or "", str(entry.parameters))
            for entry in there(name).schedules
        ),
    )


def apply_as_before(settings: Settings | None = None, *, pool: str = "") -> None:
    """Register as the version before did, which kept no record and gave no labels."""
    for definition in definitions(settings or Settings()):
        schedules = (
            [
                Interval(
                    timedelta(seconds=definition.interval_seconds),
                    anchor_date=definition.anchor,
                    timezone="UTC",
                    slug="poll",
                    active=True,
                )
            ]
            if definition.interval_seconds
            else []
        )
        deployment = definition.flow.to_deployment(
            name=definition.name,
            description=_description_before(definition),
            tags=["container-manager"],
            parameters=definition.parameters,
            schedules=schedules,
        )
        deployment.entrypoint = definition.entrypoint
        deployment.work_pool_name = pool or None
        deployment.work_queue_name = definition.runner if pool else None
        deployment.apply()


def _description_before(definition: Definition) -> str:
    return {
        QUEUE: "Harvests what has ended and launches what is ready, again and again.",
        JOBS: "Does for single jobs, by id or by status, what their status asks for.",
        NEW_JOB: "Runs one job: what it writes and how it ends is the log and the end of the flow run.",
        DAILY: "Removes containers, logs, jobs and flow runs that were kept for long enough.",
    }[definition.full_name]


@contextmanager
def another_installation(instance_id: str = "feedc0de") -> Iterator[str]:
    """Within, this process has another installation's database, which has registered nothing yet."""
    ours = Installation.load()
    Installation.objects.update(instance_id=instance_id, registered={}, limits={})
    try:
        yield instance_id
    finally:
        Installation.objects.update(
            instance_id=ours.instance_id, registered=ours.registered, limits=ours.limits, protocol=ours.protocol
        )


def nightly(minutes_ago: float = 0) -> CronSchedule:
    """A person's schedule that was last due so long ago, in whole minutes; the next time is tomorrow."""
    due = datetime.now(UTC) - timedelta(minutes=minutes_ago)
    return CronSchedule(cron=f"{due.minute} {due.hour} * * *", timezone="UTC")


def make_due(client: SyncPrefectClient, deployment_id: UUID, since: datetime) -> None:
    """What Prefect's scheduler has made of the deployment's schedules from this time on."""
    body = {"start_time": since.isoformat()}
    client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment_id}, json=body)


def run_now(client: SyncPrefectClient, name: str, at: datetime | None = None, **fields: Any) -> UUID:
    """A flow run that somebody asks for."""
    state = Scheduled(scheduled_time=at or datetime.now(UTC))
    return client.create_flow_run_from_deployment(there(name).id, state=state, **fields).id


def create_unreadable_run(client: SyncPrefectClient, name: str, **fields: Any) -> UUID:
    """One with half a character in its parameters: the server takes it, and can show neither it nor its neighbours."""
    pk = there(name).id
    chosen = {"deployment_id": {"any_": [str(pk)]}}
    known = ids_of_runs(client, chosen)
    spec = {"image": "busybox", "command": ["echo", "\ud83d"]}
    # The answer is an error, too.
    with suppress(httpx.HTTPStatusError):
        client._client.post(
            f"/deployments/{pk}/create_flow_run",
            content=json.dumps({"parameters": {"spec": spec}, **fields}).encode(),
            headers={"Content-Type": "application/json"},
        )
    (made,) = set(ids_of_runs(client, chosen)) - set(known)
    return made


@contextmanager
def poisoned(api: SyncPrefectClient, name: str) -> Iterator[None]:
    """Within, the server answers 500 for everything in which this deployment would be shown."""
    schedule_id = add_schedule(api, name, nightly(), active=False)
    path = f"/deployments/{there(name).id}/schedules/{schedule_id}"
    poison = rb'{"parameters": {"a": "\ud83d"}}'
    api._client.patch(path, content=poison, headers={"Content-Type": "application/json"}).raise_for_status()
    try:
        yield
    finally:
        api._client.delete(path).raise_for_status()
