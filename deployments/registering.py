"""The deployments on the server: registered as served, unless a work pool has them."""

from collections.abc import Iterable
from datetime import timedelta
from typing import cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Interval

from .definitions import SCHEDULE_SLUG, TAGS, Definition


class CannotServe(Exception):
    """The deployments can't be served here; the message says what to do."""


def register(
    client: SyncPrefectClient, definitions: Iterable[Definition], *, take_over: bool = False
) -> dict[UUID, Definition]:
    """Create or update them; by id. One that is on a work pool is taken over, with its past and its schedule, or
    `CannotServe` says how to, before anything is changed."""
    present = [(definition, _read(client, definition)) for definition in definitions]
    if not take_over:
        for definition, deployment in present:
            _refuse_pooled(definition, deployment)
    return {_apply(definition, deployment): definition for definition, deployment in present}


def check(client: SyncPrefectClient, registered: dict[UUID, Definition]) -> None:
    """`CannotServe` if somebody has put one of them on a work pool or removed it meanwhile."""
    for deployment_id, definition in registered.items():
        deployment = _read(client, definition)
        if deployment is None or deployment.id != deployment_id:
            raise CannotServe(f"{definition.full_name} was deleted from the Prefect server: start again to serve it")
        _refuse_pooled(definition, deployment)


def _refuse_pooled(definition: Definition, deployment: DeploymentResponse | None) -> None:
    """A deployment is served or on a work pool, never both: both would take its runs."""
    if deployment is None or not deployment.work_pool_name:
        return
    pool = deployment.work_pool_name
    raise CannotServe(
        f"{definition.full_name} is deployed on the work pool {pool!r}: start a worker with `prefect worker start "
        f"--pool {pool}`, or end all of its workers and serve it with `python -m deployments --take-over`"
    )


def _read(client: SyncPrefectClient, definition: Definition) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(definition.full_name)
    except ObjectNotFound:
        return None


def _apply(definition: Definition, present: DeploymentResponse | None) -> UUID:
    schedules = []
    if definition.interval_seconds is not None:
        # Registering would start a schedule again that somebody has paused in the UI.
        paused = {schedule.slug for schedule in present.schedules if not schedule.active} if present else set()
        schedules.append(
            Interval(
                timedelta(seconds=definition.interval_seconds),
                anchor_date=definition.anchor,
                timezone="UTC",
                slug=SCHEDULE_SLUG,
                active=SCHEDULE_SLUG not in paused,
            )
        )
    deployment: RunnerDeployment = definition.flow.to_deployment(
        name=definition.name,
        description=definition.description,
        tags=list(TAGS),
        parameters=definition.parameters,
        schedules=schedules,
    )
    deployment.entrypoint = definition.entrypoint
    # Set, though they are None already: what was never set is not sent, and a pool would be kept.
    deployment.work_pool_name = None
    deployment.work_queue_name = None
    try:
        return cast(UUID, deployment.apply())
    except DeploymentApplyError as e:
        if isinstance(e.__cause__, httpx.HTTPError):
            # As every other call to the API: it may pass.
            raise e.__cause__ from e
        raise
