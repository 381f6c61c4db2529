"""Replaces deployments after the installation's `NAME` has changed. Prefect can't rename a deployment.

The new deployment takes over people's schedules and changes. The old one is paused and keeps its history. Runs that
were waiting there are still executed.
"""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.responses import DeploymentResponse

from container_manager.models import Installation
from container_manager.types import DeploymentRecord
from flows.api import server_time
from flows.identity import our_deployments
from flows.late_runs import SCHEDULE_SLUG

from .definitions import Definition
from .slots import hand_over_slots


def find_earlier(
    client: SyncPrefectClient, definition: Definition, deployment: DeploymentResponse, *, is_new: bool
) -> DeploymentResponse | None:
    """This installation's deployment of the same flow under another name, unless it has been replaced already."""
    recorded = Installation.load().registration.deployments
    if not is_new and not any(_is_earlier(record, definition) for record in recorded.values()):
        return None
    for other in our_deployments(client):
        record = recorded.get(str(other.id))
        if (
            other.flow_id == deployment.flow_id
            and other.id != deployment.id
            and (record is None or not record.is_paused)
        ):
            return other
    return None


def take_the_place(client: SyncPrefectClient, new: DeploymentResponse, old: DeploymentResponse) -> None:
    """Copy people's schedules from `old` to `new`, and pause `old`. Can be repeated."""
    began = server_time(client.hello())
    recorded = Installation.load().registration.deployments
    _drop_copies(client, new, old, recorded.get(str(new.id)))
    for schedule in old.schedules:
        _take_schedule(client, new, schedule)
    # The endpoint for pausing would also delete runs that are due.
    client.request("PATCH", "/deployments/{id}", path_params={"id": old.id}, json={"paused": True})
    record = recorded.get(str(old.id), DeploymentRecord(name=f"{_flow_name(recorded, new)}/{old.name}"))
    replaced_at = datetime.now(UTC)
    hand_over_slots(client, old.id, new.id, began, replaced_at)
    left = {
        "is_paused": True,
        "replaced_at": replaced_at,
        "left_schedules": tuple(str(schedule.id) for schedule in old.schedules),
    }
    Installation.keep_registration(deployments={str(old.id): record.model_copy(update=left)})


def replaced(registered: dict[UUID, Definition]) -> dict[UUID, tuple[Definition, datetime | None]]:
    """The deployments that these have replaced, and when. Runs may still be waiting there."""
    found: dict[UUID, tuple[Definition, datetime | None]] = {}
    for pk, record in Installation.load().registration.deployments.items():
        if UUID(pk) not in registered and record.is_paused:
            of_same_flow = [ours for ours in registered.values() if _is_of_same_flow(record, ours)]
            found |= {UUID(pk): (ours, record.replaced_at) for ours in of_same_flow}
    return found


def _is_earlier(record: DeploymentRecord, definition: Definition) -> bool:
    return _is_of_same_flow(record, definition) and record.name != definition.full_name and not record.is_paused


def _is_of_same_flow(record: DeploymentRecord, definition: Definition) -> bool:
    return record.name.partition("/")[0] == str(definition.flow.name)


def _flow_name(recorded: dict[str, DeploymentRecord], new: DeploymentResponse) -> str:
    return recorded[str(new.id)].name.partition("/")[0]


def _drop_copies(
    client: SyncPrefectClient, new: DeploymentResponse, old: DeploymentResponse, record: DeploymentRecord | None
) -> None:
    """Delete schedules that `old` once got from `new`, if people have changed or deleted them on `old` since."""
    left = record.left_schedules if record else ()
    there = [_what(schedule) for schedule in old.schedules]
    for schedule in new.schedules:
        if str(schedule.id) in left and schedule.slug != SCHEDULE_SLUG and _what(schedule) not in there:
            client.delete_deployment_schedule(new.id, schedule.id)


def _take_schedule(client: SyncPrefectClient, new: DeploymentResponse, schedule: Any) -> None:
    if schedule.slug == SCHEDULE_SLUG:
        ours = next((own for own in new.schedules if own.slug == SCHEDULE_SLUG), None)
        if ours is not None and schedule.active != ours.active:
            client.update_deployment_schedule(new.id, ours.id, active=schedule.active)
        return
    if _what(schedule) not in [_what(own) for own in new.schedules]:
        fields = schedule.model_dump(include={"schedule", "active", "parameters", "slug"})
        client.create_deployment_schedules(new.id, [DeploymentScheduleCreate.model_validate(fields)])


def _what(schedule: Any) -> tuple[Any, ...]:
    return schedule.schedule, schedule.parameters, schedule.slug, schedule.active
