"""A deployment's values: as this version wants them, as the server has them, as an earlier version wrote them."""

from datetime import datetime, timedelta
from typing import Any

from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.utilities.callables import parameter_schema

from container_manager.conf import Settings
from container_manager.types import DeploymentRecord, ScheduleRecord
from flows.identity import TAG
from flows.late_runs import SCHEDULE_SLUG

from .definitions import Definition, definitions


def technical(definition: Definition, pool: str) -> dict[str, Any]:
    """Values that are always ours: how a worker on a pool loads the flow, and which work queue gets the runs."""
    return {
        "entrypoint": definition.entrypoint,
        "path": None,
        "pull_steps": None,
        "storage_document_id": None,
        "version": None,
        "parameter_openapi_schema": parameter_schema(definition.flow).model_dump(mode="json", exclude_unset=True),
        # Send these even if they are None: the server keeps fields that are not sent.
        "work_pool_name": pool or None,
        "work_queue_name": definition.runner if pool else None,
    }


def desired(definition: Definition) -> DeploymentRecord:
    seconds = definition.interval_seconds
    return DeploymentRecord(
        name=definition.full_name,
        description=definition.description,
        parameters=definition.parameters,
        tags=definition.tags,
        schedule=ScheduleRecord(interval_seconds=seconds, anchor=definition.anchor.isoformat()) if seconds else None,
    )


def present(deployment: DeploymentResponse, definition: Definition) -> DeploymentRecord:
    ours = our_schedule(deployment)
    return DeploymentRecord(
        name=definition.full_name,
        description=deployment.description or "",
        parameters=deployment.parameters,
        tags=tuple(deployment.tags),
        is_paused=deployment.paused,
        schedule=_record_of(ours.schedule) if ours else None,
    )


def earlier(definition: Definition, settings: Settings) -> list[DeploymentRecord]:
    """All that an earlier version, which kept no record, may have written with these settings or the defaults."""
    by_default = {other.flow.name: other for other in definitions(Settings(NAME=settings.NAME))}
    return [
        desired(candidate).model_copy(update={"description": description, "tags": (settings.named(TAG),)})
        for candidate in (definition, by_default[definition.flow.name])
        for description in (definition.earlier_description, definition.description)
    ]


def _record_of(schedule: Any) -> ScheduleRecord:
    if not isinstance(schedule, IntervalSchedule):
        # A person has chosen another kind of schedule, such as cron.
        return ScheduleRecord(interval_seconds=0, anchor=str(schedule))
    anchor = datetime.fromisoformat(str(schedule.anchor_date))
    return ScheduleRecord(
        interval_seconds=schedule.interval.total_seconds(),
        anchor=anchor.isoformat(),
        timezone=schedule.timezone or "UTC",
    )


def our_schedule(deployment: DeploymentResponse) -> DeploymentSchedule | None:
    return next((schedule for schedule in deployment.schedules if schedule.slug == SCHEDULE_SLUG), None)


def interval(schedule: ScheduleRecord) -> IntervalSchedule:
    return IntervalSchedule(
        interval=timedelta(seconds=schedule.interval_seconds),
        anchor_date=datetime.fromisoformat(schedule.anchor),
        timezone=schedule.timezone,
    )


def new_schedule(schedule: ScheduleRecord) -> dict[str, Any]:
    new = DeploymentScheduleCreate(schedule=interval(schedule), slug=SCHEDULE_SLUG)
    return new.model_dump(mode="json", exclude_unset=True)


def as_new(schedule: DeploymentSchedule) -> dict[str, Any]:
    """An existing schedule, in the form that creates it again."""
    return schedule.model_dump(mode="json", include={"schedule", "active", "slug", "parameters"})
