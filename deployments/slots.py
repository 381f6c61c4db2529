"""Keeps the scheduled runs of a deployment when the deployment changes.

After any change Prefect deletes the runs that it has scheduled ahead. Its scheduler later creates new ones, counted
from that moment. A slot in between would be lost.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
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

from flows.api import PAGE, is_of_one, server_time


@contextmanager
def kept_slots(client: SyncPrefectClient, deployment_id: UUID) -> Iterator[None]:
    """Change the deployment or its schedules inside. Every slot since the start then has exactly one run.

    This holds even if the schedules have been replaced.
    """
    began = server_time(client.hello())
    yield
    deployment = _make_up(client, deployment_id, began)
    if deployment is not None:
        present = {schedule.id for schedule in deployment.schedules}
        made = _made_since(client, deployment_id, began)
        kept = [run for run in made if run.created_by and run.created_by.id not in present]
        _delete_twins(client, [run for run in made if run not in kept], kept)


def hand_over_slots(client: SyncPrefectClient, old_id: UUID, new_id: UUID, began: datetime, until: datetime) -> None:
    """Give the new deployment the slots since `began`, except those up to `until` that have a run on the old one."""
    if _make_up(client, new_id, began) is not None:
        kept = [run for run in _made_since(client, old_id, began) if (run.expected_start_time or until) <= until]
        _delete_twins(client, _made_since(client, new_id, began), kept)


def _make_up(client: SyncPrefectClient, deployment_id: UUID, began: datetime) -> DeploymentResponse | None:
    """Let the server create the missing runs since then. None if the deployment is paused: it needs none."""
    deployment = client.read_deployment(deployment_id)
    if deployment.paused:
        return None
    client.request(
        "POST", "/deployments/{id}/schedule", path_params={"id": deployment_id}, json={"start_time": began.isoformat()}
    )
    return deployment


def _made_since(client: SyncPrefectClient, deployment_id: UUID, began: datetime) -> list[FlowRun]:
    """The first runs that schedules have created for that time and later; no runs if the server can't list them."""
    moment: Any = began
    chosen = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]),
        # The API means `after` inclusively.
        expected_start_time=FlowRunFilterExpectedStartTime(after_=moment),
    )
    try:
        runs = client.read_flow_runs(flow_run_filter=chosen, limit=PAGE, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
    except httpx.HTTPStatusError as e:
        if not is_of_one(e):
            raise
        return []
    return [run for run in runs if run.auto_scheduled and run.created_by]


def _delete_twins(client: SyncPrefectClient, made: list[FlowRun], kept: list[FlowRun]) -> None:
    """Replaced schedules have new ids, so a slot whose old run was due or had begun now has a second run."""
    slots = [_slot(run) for run in kept]
    for run in made:
        if _slot(run) in slots:
            client.delete_flow_run(run.id)


def _slot(run: FlowRun) -> tuple[Any, ...]:
    """The time of a run, and what identifies its schedule apart from the id."""
    return run.expected_start_time, run.created_by.display_value if run.created_by else None, run.parameters
