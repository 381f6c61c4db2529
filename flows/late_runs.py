"""Scheduled runs that nobody executed while they were due: each would start a process, and find nothing to do."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import FlowRunContext

from container_manager.conf import get_settings

logger = logging.getLogger("container_manager.flows")

#: What Prefect's scheduler tags its runs with.
AUTO_SCHEDULED = "auto-scheduled"
#: The API deletes no more at once.
_BULK = 50


def delete_late_runs(client: SyncPrefectClient, deployment_id: UUID, before: datetime) -> int:
    """Delete the schedule's runs that were due before this time and that nobody has begun; how many. None by hand."""
    late: dict[str, Any] = {
        "deployment_id": {"any_": [str(deployment_id)]},
        "state": {"type": {"any_": ["SCHEDULED"]}},
        "tags": {"all_": [AUTO_SCHEDULED]},
        # The API means `before` inclusively.
        "expected_start_time": {"before_": (before - timedelta(microseconds=1)).isoformat()},
    }
    return bulk_delete(client, late)


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


def delete_missed_runs() -> None:
    """In a scheduled pass that is late by more than an interval: the others that were missed. A worker runs all.

    The served deployments run none that is late in the first place.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None or AUTO_SCHEDULED not in run.tags or run.expected_start_time is None:
        return
    before = datetime.now(UTC) - timedelta(seconds=get_settings().POLL_INTERVAL_SECONDS)
    if run.expected_start_time >= before:
        return
    try:
        with get_client(sync_client=True) as client:
            deleted = delete_late_runs(client, run.deployment_id, before)
    except httpx.HTTPError as e:
        logger.warning("the scheduled runs that were missed are still there: %s", e)
    else:
        logger.info("deleted %d scheduled runs that were missed", deleted)
