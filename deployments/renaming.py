"""Replaces deployments after the installation's `NAME` has changed. Prefect can't rename a deployment.

The new deployment takes over people's schedules, pauses and waiting runs. The old one is paused and keeps its history.
"""

from datetime import UTC, datetime
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.states import Cancelled, Scheduled

from container_manager.models import Installation
from flows.api import PAGE
from flows.identity import is_ours, our_deployments
from flows.late_runs import SCHEDULE_SLUG, is_of_our_schedule


def find_earlier(client: SyncPrefectClient, new: DeploymentResponse) -> DeploymentResponse | None:
    """This installation's deployment of the same flow under another name, unless it has been replaced already."""
    for deployment in our_deployments(client):
        if deployment.flow_id == new.flow_id and deployment.id != new.id and is_ours(deployment.labels):
            known = Installation.load().registration.deployments.get(str(deployment.id))
            if known is None or not known.is_paused:
                return deployment
    return None


def take_the_place(client: SyncPrefectClient, new: DeploymentResponse, old: DeploymentResponse) -> None:
    """Move schedules, pauses and waiting runs from `old` to `new`, and pause `old`. Can be repeated."""
    for schedule in old.schedules:
        _take_schedule(client, new, schedule)
    if old.paused:
        _set_paused(client, new, paused=True)
    for run in _waiting(client, old):
        client.create_flow_run_from_deployment(
            new.id,
            parameters=run.parameters,
            name=run.name,
            state=Scheduled(scheduled_time=run.expected_start_time),
            idempotency_key=f"instead of {run.id}",
        )
        client.set_flow_run_state(run.id, Cancelled(message=f"it runs as a run of {new.name}"), force=True)
    # This also deletes all its scheduled runs.
    _set_paused(client, old, paused=True)
    record = Installation.load().registration.deployments.get(str(old.id))
    if record is not None:
        Installation.keep_registration(deployments={str(old.id): record.model_copy(update={"is_paused": True})})


def _take_schedule(client: SyncPrefectClient, new: DeploymentResponse, schedule: Any) -> None:
    ours = next((own for own in new.schedules if own.slug == SCHEDULE_SLUG), None)
    if schedule.slug == SCHEDULE_SLUG:
        if ours is not None and not schedule.active:
            client.update_deployment_schedule(new.id, ours.id, active=False)
        return
    known = [(own.schedule, own.parameters, own.slug) for own in new.schedules]
    if (schedule.schedule, schedule.parameters, schedule.slug) not in known:
        fields = schedule.model_dump(include={"schedule", "active", "parameters", "slug"})
        client.create_deployment_schedules(new.id, [DeploymentScheduleCreate.model_validate(fields)])


def _waiting(client: SyncPrefectClient, old: DeploymentResponse) -> list[FlowRun]:
    """Runs that people created, and due runs of people's schedules. Our own schedule creates its runs again."""
    chosen = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[old.id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
    )
    now = datetime.now(UTC)
    return [
        run
        for run in client.read_flow_runs(flow_run_filter=chosen, limit=PAGE)
        if not run.auto_scheduled
        or (not is_of_our_schedule(run) and run.expected_start_time and run.expected_start_time <= now)
    ]


def _set_paused(client: SyncPrefectClient, deployment: DeploymentResponse, *, paused: bool) -> None:
    path: Any = "/deployments/{id}/pause_deployment" if paused else "/deployments/{id}/resume_deployment"
    client.request("POST", path, path_params={"id": deployment.id})
