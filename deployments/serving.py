"""Serve the deployments: register them, then run what is due of them, a process per flow run."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner
from prefect.schedules import Interval
from prefect.settings import PREFECT_API_URL
from prefect.types.entrypoint import EntrypointType

from .definitions import JOBS_RUNNER, QUEUE_RUNNER, SCHEDULE_SLUG, TAGS, Definition

logger = logging.getLogger("container_manager.deployments")

#: Flow runs at once, by runner: a pass that stays and the next one, and a third by hand; and flow runs that wait
#: for their jobs, each a process of some 110 MB.
PROCESS_LIMITS = {QUEUE_RUNNER: 3, JOBS_RUNNER: 5}
#: seconds; between two looks for runs that are due, and how long before that they are taken. Ten, which is
#: the default, would delay every schedule of ten by as much.
_QUERY_SECONDS, _PREFETCH_SECONDS = 2.0, 1.0
#: The API deletes no more at once.
_BULK = 50


class CannotServe(Exception):
    """The deployments can't be served here; the message says what to do."""


def require_api() -> str:
    """The URL of the Prefect API. Without one Prefect would start a server of its own, which schedules nothing."""
    url: str | None = PREFECT_API_URL.value()
    if not url:
        raise CannotServe(
            "no Prefect API is configured: run `prefect server start`, and set PREFECT_API_URL to the address it names"
        )
    return url


def serve(definitions: tuple[Definition, ...], *, take_over: bool) -> None:
    """Until SIGTERM or Ctrl+C. Raises `CannotServe` before it changes anything."""
    url = require_api()
    try:
        with get_client(sync_client=True) as client:
            present = {definition.full_name: _read(client, definition) for definition in definitions}
            _refuse_pooled(client, present, take_over=take_over)
            late = _delete_late_runs(client, definitions, present)
    except httpx.HTTPError as e:
        raise CannotServe(f"the Prefect API at {url} does not answer: {e}") from e
    if late:
        logger.warning("deleted %d scheduled runs that were missed while nothing was served", late)
    deployments = [_deployment(definition, present[definition.full_name]) for definition in definitions]
    asyncio.run(
        _run(
            {
                name: [
                    deployment
                    for definition, deployment in zip(definitions, deployments, strict=True)
                    if definition.runner == name
                ]
                for name in PROCESS_LIMITS
            }
        )
    )


async def _run(deployments: dict[str, list[RunnerDeployment]]) -> None:
    runners = []
    for name, served in deployments.items():
        runner = Runner(
            name=f"container-manager-{name}",
            query_seconds=_QUERY_SECONDS,
            prefetch_seconds=_PREFETCH_SECONDS,
            limit=PROCESS_LIMITS[name],
            # A restart must not leave a schedule paused behind.
            pause_on_shutdown=False,
        )
        for deployment in served:
            await runner.aadd_deployment(deployment)
        if served:
            runners.append(runner)
    await asyncio.gather(*(runner.start() for runner in runners))


def _deployment(definition: Definition, present: DeploymentResponse | None) -> RunnerDeployment:
    schedule = None
    if definition.interval_seconds is not None:
        # Registering would start a schedule again that somebody has paused in the UI.
        paused = {schedule.slug for schedule in present.schedules if not schedule.active} if present else set()
        schedule = Interval(
            timedelta(seconds=definition.interval_seconds),
            anchor_date=definition.anchor,
            timezone="UTC",
            slug=SCHEDULE_SLUG,
            active=SCHEDULE_SLUG not in paused,
        )
    deployment: RunnerDeployment = definition.flow.to_deployment(
        name=definition.name,
        description=definition.description,
        tags=list(TAGS),
        parameters=definition.parameters,
        schedules=[schedule] if schedule else [],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return deployment


def _read(client: SyncPrefectClient, definition: Definition) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(definition.full_name)
    except ObjectNotFound:
        return None


def _refuse_pooled(
    client: SyncPrefectClient, present: dict[str, DeploymentResponse | None], *, take_over: bool
) -> None:
    """A deployment is served or on a work pool, never both: its runs would be given to the wrong one."""
    for name, deployment in present.items():
        if deployment is None or not deployment.work_pool_name:
            continue
        if not take_over:
            raise CannotServe(
                f"{name} is deployed on the work pool {deployment.work_pool_name!r}: start a worker with "
                f"`prefect worker start --pool {deployment.work_pool_name}`, or serve it with --take-over"
            )
        client.delete_deployment(deployment.id)
        present[name] = None


def _delete_late_runs(
    client: SyncPrefectClient, definitions: tuple[Definition, ...], present: dict[str, DeploymentResponse | None]
) -> int:
    """Runs that nobody executed while they were due. Each would start a process, and find nothing to do."""
    deleted = 0
    for definition in definitions:
        deployment = present[definition.full_name]
        if deployment is not None and definition.interval_seconds is not None:
            deleted += _delete_before(
                client, deployment.id, datetime.now(UTC) - timedelta(seconds=definition.interval_seconds)
            )
    return deleted


def _delete_before(client: SyncPrefectClient, deployment_id: UUID, before: datetime) -> int:
    late = {
        "deployment_id": {"any_": [str(deployment_id)]},
        "state": {"type": {"any_": ["SCHEDULED"]}},
        "tags": {"all_": ["auto-scheduled"]},
        "expected_start_time": {"before_": before.isoformat()},
    }
    deleted = 0
    while True:
        answer = client.request(
            "POST",
            "/flow_runs/bulk_delete",  # type: ignore[arg-type] # the client's list of paths lacks it
            json={"flow_runs": late, "limit": _BULK},
        )
        count = len(answer.json()["deleted"])
        deleted += count
        if count < _BULK:
            return deleted
