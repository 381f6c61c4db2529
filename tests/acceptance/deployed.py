"""Deployments of a test's own, and their flow runs."""

import json
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

from tests.conftest import wait_until


def using(deployment: str, **settings: Any) -> dict[str, str]:
    deployments = {"queue": deployment, "jobs": deployment}
    return {"CONTAINER_MANAGER": json.dumps({"DEPLOYMENTS": deployments, "PICKUP_SECONDS": 2} | settings)}


def deployed(client: SyncPrefectClient, name: str, **fields: Any) -> str:
    """A deployment that nobody runs."""
    client.create_deployment(client.create_flow_from_name("process-queue"), name, **fields)
    return f"process-queue/{name}"


def runs_of(client: SyncPrefectClient, name: str) -> list[FlowRun]:
    deployment_id = client.read_deployment_by_name(name).id
    return [run for run in client.read_flow_runs() if run.deployment_id == deployment_id]


def the_run(client: SyncPrefectClient, name: str) -> FlowRun:
    runs: list[FlowRun] = wait_until(lambda: runs_of(client, name))
    return runs[0]
