"""Registers the deployments on the Prefect server without touching what people have changed there.

POST deletes all schedules of an existing deployment, so an existing one gets only PATCH requests, and only if one of
our values differs. The one exception: labels can't be patched, so a deployment without ours is posted once.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

from container_manager.conf import get_settings
from container_manager.models import Installation
from container_manager.types import ScheduleRecord
from flows.api import detail_of, is_of_one
from flows.identity import describe, is_foreign, is_ours, labels
from flows.late_runs import SCHEDULE_SLUG

from . import values
from .definitions import Definition
from .merging import merged
from .renaming import find_earlier, take_the_place
from .slots import kept_slots

logger = logging.getLogger("container_manager.deployments")


class CannotServe(Exception):
    """The deployments can't be served here; the message says what to do."""


def register(
    client: SyncPrefectClient,
    definitions: Iterable[Definition],
    *,
    take_over: bool = False,
    pool: str = "",
    reset: bool = False,
) -> dict[UUID, Definition]:
    """Create or update the deployments, for the workers of `pool` or to be served; returns them by id.

    Raises `CannotServe` before any change if a deployment is on another pool or belongs to another installation.
    `take_over` takes it over, with its history and schedules. `reset` sets back what people have changed. If the server
    answers with an error for a deployment, that one is logged and left out.
    """
    if pool:
        _refuse_missing(client, pool)
    registered: dict[UUID, Definition] = {}
    problems: list[httpx.HTTPStatusError] = []
    for definition, deployment in _present_ones(client, definitions, problems, take_over=take_over, pool=pool):
        with _for_itself(definition, problems):
            registered[_register(client, definition, deployment, pool, reset=reset)] = definition
    if problems and not registered:
        raise problems[0]
    return registered


def _present_ones(
    client: SyncPrefectClient,
    definitions: Iterable[Definition],
    problems: list[httpx.HTTPStatusError],
    *,
    take_over: bool,
    pool: str,
) -> list[tuple[Definition, DeploymentResponse | None]]:
    """Reads and checks all deployments before any is changed."""
    present: list[tuple[Definition, DeploymentResponse | None]] = []
    for definition in definitions:
        with _for_itself(definition, problems):
            deployment = _read(client, definition)
            if not take_over:
                _refuse_foreign(definition, deployment)
                _refuse_pooled(definition, deployment, pool)
            present.append((definition, deployment))
    return present


@contextmanager
def _for_itself(definition: Definition, problems: list[httpx.HTTPStatusError]) -> Iterator[None]:
    """A server error for this deployment does not stop the others."""
    try:
        yield
    except httpx.HTTPStatusError as e:
        if not is_of_one(e):
            raise
        problems.append(e)
        logger.warning(
            "%s is not served: the Prefect API answers HTTP %d for it: %s",
            *(definition.full_name, e.response.status_code, detail_of(e.response)),
        )


def _register(
    client: SyncPrefectClient, definition: Definition, present: DeploymentResponse | None, pool: str, *, reset: bool
) -> UUID:
    deployment = _ensure(client, definition, present, pool)
    earlier = find_earlier(client, definition, deployment, is_new=present is None)
    _update(client, definition, deployment, pool, reset=reset, like=earlier)
    if earlier:
        take_the_place(client, deployment, earlier)
    return deployment.id


def check(client: SyncPrefectClient, registered: dict[UUID, Definition]) -> None:
    """Raises `CannotServe` if one was deleted, moved to a work pool, or taken over by another installation."""
    ids = {definition.full_name: deployment_id for deployment_id, definition in registered.items()}
    for definition, deployment in _readable(client, registered.values()):
        if deployment is None or deployment.id != ids[definition.full_name]:
            raise CannotServe(f"{definition.full_name} was deleted from the Prefect server: start again to serve it")
        _refuse_foreign(definition, deployment)
        _refuse_pooled(definition, deployment)


def refuse_foreign(client: SyncPrefectClient, definitions: Iterable[Definition]) -> None:
    """Raises `CannotServe` if one of these names belongs to another installation."""
    for definition, deployment in _readable(client, definitions):
        _refuse_foreign(definition, deployment)


def _readable(
    client: SyncPrefectClient, definitions: Iterable[Definition]
) -> Iterator[tuple[Definition, DeploymentResponse | None]]:
    """Skips deployments that the server can't show: they may well be unchanged."""
    for definition in definitions:
        try:
            deployment = _read(client, definition)
        except httpx.HTTPStatusError as e:
            if not is_of_one(e):
                raise
        else:
            yield definition, deployment


def _refuse_missing(client: SyncPrefectClient, pool: str) -> None:
    try:
        client.read_work_pool(pool)
    except ObjectNotFound as e:
        raise CannotServe(
            f"the Prefect server has no work pool {pool!r}: create it with `prefect work-pool create {pool} --type "
            "process --base-job-template deployments/base-job-template.json`"
        ) from e


def _refuse_foreign(definition: Definition, deployment: DeploymentResponse | None) -> None:
    if deployment is None or not is_foreign(deployment.labels):
        return
    raise CannotServe(
        f"{definition.full_name} on this Prefect server belongs to another installation, {describe(deployment.labels)}:"
        " set CONTAINER_MANAGER['NAME'] to give this one a name of its own; or, if the other one no longer exists, take"
        " over its deployments with --take-over"
    )


def _refuse_pooled(definition: Definition, deployment: DeploymentResponse | None, pool: str = "") -> None:
    there = deployment.work_pool_name if deployment else None
    if not there or there == pool:
        # A served deployment moves to the pool. The process that serves it notices and ends.
        return
    raise CannotServe(
        f"{definition.full_name} is deployed on the work pool {there!r}: start a worker with `prefect worker start "
        f"--pool {there}`, or end all of its workers and serve it with `python -m deployments --take-over`"
    )


def _read(client: SyncPrefectClient, definition: Definition) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(definition.full_name)
    except ObjectNotFound:
        return None


def _ensure(
    client: SyncPrefectClient, definition: Definition, deployment: DeploymentResponse | None, pool: str
) -> DeploymentResponse:
    """Create the deployment if it does not exist. Add our labels if it lacks them."""
    if deployment is None:
        return _create(client, definition, pool)
    if is_ours(deployment.labels):
        return deployment
    with kept_slots(client, deployment.id):
        # Read again, as late as possible: a person may have just added a schedule.
        deployment = client.read_deployment(deployment.id)
        _post(
            client,
            name=deployment.name,
            flow_id=str(deployment.flow_id),
            # Fields that are not sent are kept, except for these.
            parameters=deployment.parameters,
            parameter_openapi_schema=deployment.parameter_openapi_schema,
            enforce_parameter_schema=deployment.enforce_parameter_schema,
            labels={**deployment.labels, **labels()},
            schedules=[values.as_new(schedule) for schedule in deployment.schedules],
        )
    return client.read_deployment(deployment.id)


def _create(client: SyncPrefectClient, definition: Definition, pool: str) -> DeploymentResponse:
    desired = values.desired(definition)
    created = _post(
        client,
        name=definition.name,
        flow_id=str(client.create_flow_from_name(definition.flow.name)),
        description=desired.description,
        parameters=desired.parameters,
        tags=desired.tags,
        labels=labels(),
        schedules=[values.new_schedule(desired.schedule)] if desired.schedule else [],
        **values.technical(definition, pool),
    )
    Installation.keep_registration(deployments={str(created): desired})
    return client.read_deployment(created)


def _update(
    client: SyncPrefectClient,
    definition: Definition,
    deployment: DeploymentResponse,
    pool: str,
    *,
    reset: bool,
    like: DeploymentResponse | None = None,
) -> None:
    """Update the values that are ours to change, and record them.

    `like`: the deployment that this one replaces. People's changes to it are applied to this one.
    """
    source = like or deployment
    now, theirs, desired = (
        values.present(deployment, definition),
        values.present(source, definition),
        values.desired(definition),
    )
    recorded = Installation.load().registration.deployments
    known = recorded.get(str(source.id))
    written = [theirs] if reset else [known] if known else values.earlier(definition, get_settings())
    wanted, record = merged(theirs, desired, written)
    changes: dict[str, Any] = {
        field: value
        for field, value in values.technical(definition, pool).items()
        if (getattr(deployment, field) or None) != (value or None)
    }
    for field in ("description", "parameters", "tags"):
        if getattr(wanted, field) != getattr(now, field):
            changes[field] = getattr(wanted, field)
    if wanted.is_paused != now.is_paused:
        changes["paused"] = wanted.is_paused
    if like is not None and (limit := like.global_concurrency_limit) is not None:
        options = like.concurrency_options
        changes["concurrency_limit"] = limit.limit
        changes["concurrency_options"] = options.model_dump(mode="json") if options else None
    if changes:
        with kept_slots(client, deployment.id):
            client.request("PATCH", "/deployments/{id}", path_params={"id": deployment.id}, json=changes)
    if wanted.schedule != now.schedule:
        _write_schedule(client, deployment, wanted.schedule)
    if wanted.schedule is None and desired.schedule is not None:
        logger.warning(
            "%s has no schedule `%s`, which was removed by hand: `python -m deployments sync --reset` creates it again",
            definition.full_name,
            SCHEDULE_SLUG,
        )
    if mine := recorded.get(str(deployment.id)):
        record = record.model_copy(update={"left_schedules": mine.left_schedules})
    if record != mine:
        Installation.keep_registration(deployments={str(deployment.id): record})


def _write_schedule(client: SyncPrefectClient, deployment: DeploymentResponse, schedule: ScheduleRecord | None) -> None:
    """Uses the schedules' own endpoint, which leaves the other schedules alone."""
    present = values.our_schedule(deployment)
    if schedule is None:
        if present is not None:
            client.delete_deployment_schedule(deployment.id, present.id)
        return
    if present is None:
        new = DeploymentScheduleCreate.model_validate(values.new_schedule(schedule))
        client.create_deployment_schedules(deployment.id, [new])
        return
    with kept_slots(client, deployment.id):
        client.update_deployment_schedule(deployment.id, present.id, schedule=values.interval(schedule))


def _post(client: SyncPrefectClient, **fields: Any) -> UUID:
    return UUID(client.request("POST", "/deployments/", json=fields).json()["id"])
