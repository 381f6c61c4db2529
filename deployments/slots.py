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
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort

from flows.api import PAGE, is_of_one


@contextmanager
def kept_slots(client: SyncPrefectClient, deployment_id: UUID) -> Iterator[None]:
    """Change the deployment or its schedules inside. Every slot since the start then has exactly one run.

    This holds even if the schedules have been replaced.
    """
    began = server_time(client.hello())
    yield
    deployment = client.read_deployment(deployment_id)
    if deployment.paused:
        return
    client.request(
        "POST", "/deployments/{id}/schedule", path_params={"id": deployment_id}, json={"start_time": began.isoformat()}
    )
    _delete_twins(client, deployment, began)


def _delete_twins(client: SyncPrefectClient, deployment: DeploymentResponse, began: datetime) -> None:
    """Replaced schedules have new ids, so a slot whose old run was due or had begun now has a second run."""
    moment: Any = began
    chosen = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
        # The API means `after` inclusively.
        expected_start_time=FlowRunFilterExpectedStartTime(after_=moment),
    )
    try:
        runs = client.read_flow_runs(flow_run_filter=chosen, limit=PAGE, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
    except httpx.HTTPStatusError as e:
        if not is_of_one(e):
            raise
        # The server can't list them, so twins stay.
        return
    made = [run for run in runs if run.auto_scheduled and run.created_by]
    present = {schedule.id for schedule in deployment.schedules}
    kept = [_slot(run) for run in made if run.created_by and run.created_by.id not in present]
    for run in made:
        if run.created_by and run.created_by.id in present and _slot(run) in kept:
            client.delete_flow_run(run.id)


def _slot(run: FlowRun) -> tuple[Any, ...]:
    """The time of a run, and what identifies its schedule apart from the id."""
    return run.expected_start_time, run.created_by.display_value if run.created_by else None, run.parameters


def server_time(response: httpx.Response) -> datetime:
    """By the server's clock, to the second; by ours if the answer has no date."""
    with suppress(KeyError, ValueError):
        return parsedate_to_datetime(response.headers["date"])
    return datetime.now(UTC)
