"""Keeps the scheduled runs of a deployment when the deployment changes.

After any change Prefect deletes the runs that it has scheduled ahead. Its scheduler later creates new ones, counted
from that moment. A slot in between would be lost.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.responses import FlowRunResponse

from flows.api import PAGE, is_of_one


@contextmanager
def kept_slots(client: SyncPrefectClient, deployment_id: UUID) -> Iterator[None]:
    """Change the deployment or its schedules inside. Every slot since the start then has exactly one run.

    This holds even if the schedules have been replaced.
    """
    began, ahead = _runs_ahead(client, deployment_id)
    yield
    is_paused = client.read_deployment(deployment_id).paused
    if is_paused:
        return
    client.request(
        "POST", "/deployments/{id}/schedule", path_params={"id": deployment_id}, json={"start_time": began.isoformat()}
    )
    _delete_twins(client, deployment_id, ahead)


def _runs_ahead(client: SyncPrefectClient, deployment_id: UUID) -> tuple[datetime, list[FlowRunResponse]]:
    """The runs scheduled ahead, and the server's time. No runs if the server can't list them."""
    asked = {"deployment_ids": [str(deployment_id)], "limit": PAGE}
    try:
        response = client.request("POST", "/deployments/get_scheduled_flow_runs", json=asked)
    except httpx.HTTPStatusError as e:
        if not is_of_one(e):
            raise
        return server_time(e.response), []
    runs = FlowRunResponse.model_validate_list(response.json())
    return server_time(response), [run for run in runs if run.auto_scheduled]


def _delete_twins(client: SyncPrefectClient, deployment_id: UUID, ahead: list[FlowRunResponse]) -> None:
    """A run that was already due survives the change. If its schedule was replaced, its slot now has a second one."""
    if not ahead:
        return
    ids = FlowRunFilter(id=FlowRunFilterId(any_=[run.id for run in ahead]))
    kept = {_slot(run) for run in client.read_flow_runs(flow_run_filter=ids, limit=PAGE)}
    _, now_ahead = _runs_ahead(client, deployment_id)
    for run in now_ahead:
        if _slot(run) in kept and run.id not in {known.id for known in ahead}:
            client.delete_flow_run(run.id)


def _slot(run: Any) -> tuple[datetime | None, str]:
    """The time of a run, and its schedule: the slug, or the kind of schedule if there is no slug."""
    return run.expected_start_time, (run.created_by.display_value or "") if run.created_by else ""


def server_time(response: httpx.Response) -> datetime:
    """By the server's clock, to the second; by ours if the answer has no date."""
    with suppress(KeyError, ValueError):
        return parsedate_to_datetime(response.headers["date"])
    return datetime.now(UTC)
