"""The times at which a deployment's schedules are due, kept over a change to the deployment.

Whatever is changed, Prefect deletes the runs that it has made ahead, and makes those that come after its next look:
a slot in between would be lost.
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
    """Within, the deployment or its schedules are changed; at the end the runs of slots since the beginning are there.

    Once each, also where the schedules are others by then.
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
    """The runs that its schedules have made, and when that was, by the server's clock. None if it can't show them."""
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
    """A slot whose run was due when the change was made has kept it, and has now got another one."""
    if not ahead:
        return
    ids = FlowRunFilter(id=FlowRunFilterId(any_=[run.id for run in ahead]))
    kept = {_slot(run) for run in client.read_flow_runs(flow_run_filter=ids, limit=PAGE)}
    _, now_ahead = _runs_ahead(client, deployment_id)
    for run in now_ahead:
        if _slot(run) in kept and run.id not in {known.id for known in ahead}:
            client.delete_flow_run(run.id)


def _slot(run: Any) -> tuple[datetime | None, str]:
    """When a run is due, and by which schedule: its slug, or of what kind it is."""
    return run.expected_start_time, (run.created_by.display_value or "") if run.created_by else ""


def server_time(response: httpx.Response) -> datetime:
    """By the server's clock, to the second; by ours if it does not say."""
    with suppress(KeyError, ValueError):
        return parsedate_to_datetime(response.headers["date"])
    return datetime.now(UTC)
