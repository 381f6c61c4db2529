"""Where a flow run can run, and how one is run by a deployment. Each way to fail is an error of its own."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled

from container_manager import shutdown
from container_manager.exceptions import ShuttingDown
from container_manager.types import FlowRunReport, ReportT

from .api import FlowRunError, connected, detail_of, probe, server_time, translated
from .identity import OtherInstallation, describe, is_foreign, labels

#: seconds; a deployment that was polled longer ago has nobody who runs it.
POLLED_SECONDS = 30
#: seconds; between two looks at a flow run.
POLL_SECONDS = 0.5
#: seconds; of one call to the API, once it has answered a probe.
REQUEST_SECONDS = 10
#: seconds; how long the API may be away while a flow run is waited for.
PATIENCE_SECONDS = 60


class DeploymentMissing(FlowRunError):
    """The Prefect server has no such deployment."""


class DeploymentUnattended(FlowRunError):
    """Nothing runs the deployment at the moment."""


class ParameterRefused(FlowRunError):
    """The Prefect server refuses the parameters."""


class NotPickedUp(FlowRunError):
    """Nothing picked the flow run up."""


class FlowRunFailed(FlowRunError):
    """The flow run ended without a result."""

    def __init__(self, message: str, flow_run_id: str = "") -> None:
        super().__init__(message)
        self.flow_run_id = flow_run_id


def check_deployment(name: str) -> None:
    """Return if somebody is there who runs the deployment's flow runs; raises a `FlowRunError` otherwise."""
    probe(lambda client: _check_attended(client, name))


def how_to_start(deployment: DeploymentResponse | None) -> str:
    if deployment is not None and deployment.work_pool_name:
        return f"start one with `prefect worker start --pool {deployment.work_pool_name}`"
    return "start one with `python -m deployments`"


def run_deployment(
    name: str,
    parameters: dict[str, Any],
    report_type: type[ReportT],
    *,
    pickup_seconds: float,
    on_created: Callable[[str], None] = lambda description: None,
) -> FlowRunReport[ReportT]:
    """Create a flow run of the deployment and wait for its end.

    One that nobody picks up, within the time or before we are asked to stop, is cancelled: `NotPickedUp`,
    `ShuttingDown`. One that was picked up is waited for in any case. `on_created` is told its name and id.
    """
    with (
        translated(REQUEST_SECONDS),
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}),
        connected(REQUEST_SECONDS) as client,
    ):
        deployment, _ = _read_deployment(client, name)
        _refuse_foreign(deployment, name)
        flow_run = _create(client, deployment, name, parameters)
        on_created(f"{flow_run.name} ({flow_run.id})")
        flow_run = _wait_for_pickup(client, flow_run, deployment, name, pickup_seconds)
        return report_of(_wait_for_end(client, flow_run), "deployment", report_type)


def report_of(state: "State[Any]", via: Any, report_type: type[ReportT]) -> FlowRunReport[ReportT]:
    """What a flow run in this final state tells; `FlowRunFailed` if it is not `Completed`."""
    flow_run_id = str(state.state_details.flow_run_id or "")
    message = (state.message or "").strip()
    if not state.is_completed():
        why = message.splitlines()[0] if message else "without a message"
        raise FlowRunFailed(f"flow run {flow_run_id} ended as {state.name}: {why}", flow_run_id)
    try:
        report = report_type.model_validate_json(message.splitlines()[-1] if message else "")
    except ValueError as e:
        raise FlowRunFailed(
            f"flow run {flow_run_id} ended as {state.name} without a report: does it run another version?", flow_run_id
        ) from e
    return FlowRunReport(
        via=via, flow_run_id=flow_run_id, state_name=state.name or "", state_type=state.type.value, report=report
    )


def _create(
    client: SyncPrefectClient, deployment: DeploymentResponse, name: str, parameters: dict[str, Any]
) -> FlowRun:
    try:
        # The labels name the installation that may execute the run, even if the deployment has none.
        return client.create_flow_run_from_deployment(deployment.id, parameters=parameters, labels=dict(labels()))
    except httpx.HTTPStatusError as e:
        if e.response.status_code in (409, 422):
            raise ParameterRefused(f"deployment {name} refuses the parameters: {detail_of(e.response)}") from e
        raise


def _wait_for_pickup(
    client: SyncPrefectClient, flow_run: FlowRun, deployment: DeploymentResponse, name: str, pickup_seconds: float
) -> FlowRun:
    until = time.monotonic() + pickup_seconds
    while _is_waiting(flow_run):
        is_late = time.monotonic() >= until
        if is_late or shutdown.is_stopping():
            flow_run = _cancel_waiting(client, flow_run)
            if not (flow_run.state and flow_run.state.is_cancelled()):
                # Picked up in the last moment.
                return flow_run
            if not is_late:
                raise ShuttingDown
            raise NotPickedUp(
                f"no worker picked up the flow run of {name} within {pickup_seconds:g} s, so it was cancelled; "
                + how_to_start(deployment)
            )
        time.sleep(POLL_SECONDS)
        flow_run = _read_patiently(client, flow_run.id)
    return flow_run


def _wait_for_end(client: SyncPrefectClient, flow_run: FlowRun) -> "State[Any]":
    while flow_run.state is None or not flow_run.state.is_final():
        time.sleep(POLL_SECONDS)
        flow_run = _read_patiently(client, flow_run.id)
    return flow_run.state


def _is_waiting(flow_run: FlowRun) -> bool:
    return flow_run.state is None or flow_run.state.is_scheduled() or flow_run.state.is_pending()


def _cancel_waiting(client: SyncPrefectClient, flow_run: FlowRun) -> FlowRun:
    """Cancel it unless it runs by now. A worker that has it as pending is refused by the server when it starts it."""
    flow_run = _read_patiently(client, flow_run.id)
    if _is_waiting(flow_run):
        client.set_flow_run_state(flow_run.id, Cancelled(message="nothing picked it up"))
        flow_run = _read_patiently(client, flow_run.id)
    return flow_run


def _read_patiently(client: SyncPrefectClient, flow_run_id: UUID) -> FlowRun:
    """The flow run, also if the API is away for a moment."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return client.read_flow_run(flow_run_id)
        except httpx.TransportError:
            if time.monotonic() >= until or shutdown.is_stopping():
                raise
            time.sleep(POLL_SECONDS)


def _check_attended(client: SyncPrefectClient, name: str) -> None:
    deployment, now = _read_deployment(client, name)
    _refuse_foreign(deployment, name)
    since = timedelta(seconds=POLLED_SECONDS)
    if deployment.last_polled is not None and now - deployment.last_polled <= since:
        return
    if deployment.work_pool_name:
        workers = client.read_workers_for_work_pool(deployment.work_pool_name)
        if any(worker.status == WorkerStatus.ONLINE for worker in workers):
            return
    raise DeploymentUnattended(f"no worker has asked for flow runs of {name} lately; {how_to_start(deployment)}")


def _refuse_foreign(deployment: DeploymentResponse, name: str) -> None:
    if is_foreign(deployment.labels):
        raise OtherInstallation(
            f"deployment {name} belongs to installation {describe(deployment.labels)}, and the database here to "
            f"{describe(labels())}: correct DATABASE_URL or PREFECT_API_URL, name the right deployments in "
            "CONTAINER_MANAGER['DEPLOYMENTS'], or use --via inline"
        )


def _read_deployment(client: SyncPrefectClient, name: str) -> tuple[DeploymentResponse, datetime]:
    """The deployment, and the time by the server's clock."""
    flow_name, _, deployment_name = name.partition("/")
    path: Any = "/deployments/name/{flow_name}/{deployment_name}"
    try:
        response = client.request("GET", path, path_params={"flow_name": flow_name, "deployment_name": deployment_name})
    except httpx.HTTPStatusError as e:
        if e.response.status_code == 404:
            raise DeploymentMissing(
                f"the Prefect server has no deployment {name}: serve it with `python -m deployments`"
            ) from e
        raise
    return DeploymentResponse.model_validate(response.json()), server_time(response)
