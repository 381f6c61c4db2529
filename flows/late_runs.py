"""Scheduled runs that nobody executed while they were due: each would start a process, and find nothing to do."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import FlowRunResponse
from prefect.context import FlowRunContext

from .api import PAGE

logger = logging.getLogger("container_manager.flows")

#: The slug of the schedule that this app registers. It identifies the schedule when other values change.
SCHEDULE_SLUG = "poll"
#: What Prefect's scheduler tags its runs with.
AUTO_SCHEDULED = "auto-scheduled"
#: The API deletes no more at once.
_BULK = 50


def is_of_our_schedule(run: FlowRun | FlowRunResponse) -> bool:
    """Whether the schedule that this app registers created the run. Old servers do not name it: assume ours."""
    return AUTO_SCHEDULED in run.tags and (run.created_by is None or run.created_by.display_value == SCHEDULE_SLUG)


def delete_late_runs(client: SyncPrefectClient, deployment_id: UUID, before: datetime) -> int:
    """Delete the runs of our schedule that were due before this time and have not begun; how many.

    Keeps runs that people started, and runs of people's schedules.
    """
    late = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        tags=FlowRunFilterTags(all_=[AUTO_SCHEDULED]),
        # The API means `before` inclusively.
        expected_start_time=FlowRunFilterExpectedStartTime(before_=_datetime(before - timedelta(microseconds=1))),
    )
    deleted = kept = 0
    while page := client.read_flow_runs(flow_run_filter=late, limit=PAGE, offset=kept):
        ours = [str(run.id) for run in page if is_of_our_schedule(run)]
        # Keep a run that has begun since the page was read.
        still_waiting = {"id": {"any_": ours}, "state": {"type": {"any_": [StateType.SCHEDULED.value]}}}
        gone = bulk_delete(client, still_waiting) if ours else 0
        deleted += gone
        # Another process may delete some of them. Count only our own.
        kept += len(page) - gone
    return deleted


def bulk_delete(client: SyncPrefectClient, chosen: dict[str, Any]) -> int:
    """Delete the flow runs that the API's filter chooses; how many. Their states, task runs and logs go with them."""
    deleted = 0
    while True:
        answer = client.request(
            "POST",
            "/flow_runs/bulk_delete",  # type: ignore[arg-type] # the client's list of paths lacks it
            json={"flow_runs": chosen, "limit": _BULK},
        )
        count = len(answer.json()["deleted"])
        deleted += count
        if count < _BULK:
            return deleted


def ids_of_runs(client: SyncPrefectClient, chosen: dict[str, Any], flows: dict[str, Any] | None = None) -> list[UUID]:
    """The ids of at most `PAGE` runs that the API's filters choose, even if it can't show the runs themselves."""
    body = {"flow_runs": chosen, "flows": flows, "limit": PAGE}
    history = client.request("POST", "/ui/flow_runs/history", json=body).json()
    return [UUID(entry["id"]) for entry in history]


def delete_missed_runs(interval_seconds: float) -> None:
    """In a run of our schedule that is late by more than its interval, delete the others that were missed.

    The served deployments run none that is late in the first place.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None or run.expected_start_time is None or not is_of_our_schedule(run):
        return
    before = datetime.now(UTC) - timedelta(seconds=interval_seconds)
    if run.expected_start_time >= before:
        return
    try:
        with get_client(sync_client=True) as client:
            deleted = delete_late_runs(client, run.deployment_id, before)
    except httpx.HTTPError as e:
        logger.warning("the scheduled runs that were missed are still there: %s", e)
    else:
        logger.info("deleted %d scheduled runs that were missed", deleted)


def _datetime(moment: datetime) -> Any:
    """The client's filters declare a type of their own, but accept this one."""
    return moment
