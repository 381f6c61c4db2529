"""The processes of the served flow runs: what becomes of them when somebody stops them, or what serves them."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Scheduled

from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import QueueManager
from deployments.running import FlowRunner
from flows.api import child_environment
from flows.own_run import RESCHEDULED
from tests.conftest import PrefectServer, wait_until
from tests.integration.conftest import Serve, Served, children_of, flow_runs_of
from tests.integration.unguarded import unguarded

pytestmark = [pytest.mark.usefixtures("database"), pytest.mark.parametrize("database", ["sqlite"], indirect=True)]


def settings(**changes: Any) -> dict[str, str]:
    """A pass stays as long as there is a container to wait for, and none is scheduled meanwhile."""
    return {"CONTAINER_MANAGER": json.dumps({"POLL_INTERVAL_SECONDS": 3600, "WORK_SECONDS": 600} | changes)}


@pytest.fixture
def running_job(docker_host: DockerHost, manager: QueueManager) -> ContainerJob:
    return manager.queue_job(ContainerJob.objects.create_job(image="busybox", command=["sleep", "600"]))


def run_now(served: Served, name: str, **parameters: Any) -> UUID:
    wait_until(lambda: f"serving {name}" in served.log.read_text(), 90)
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(name)
        return client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id


def state_of(flow_run_id: UUID) -> State:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run_id).state


def wait_for(flow_run_id: UUID, name: str) -> None:
    wait_until(lambda: state_of(flow_run_id).name == name, 90)


def is_running(job: ContainerJob) -> bool:
    job.refresh_from_db()
    return bool(job.status == Status.RUNNING)


def test_what_serves_lets_the_pass_in_progress_finish_when_it_is_told_to_stop(
    running_job: ContainerJob, serve: Serve
) -> None:
    with serve(**settings()) as served:
        flow_run_id = run_now(served, "process-queue/scheduled")
        wait_until(lambda: is_running(running_job), 90)
        served.process.send_signal(signal.SIGTERM)
        code = served.process.wait(60)

    state = state_of(flow_run_id)
    assert (code, state.name, state.message.splitlines()[0]) == (0, "Completed", "launched 1")
    assert is_running(running_job)


def test_a_pass_that_is_cancelled_ends_and_its_containers_run_on(running_job: ContainerJob, serve: Serve) -> None:
    with serve(**settings()) as served:
        flow_run_id = run_now(served, "process-queue/scheduled")
        wait_until(lambda: is_running(running_job), 90)
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run_id, Cancelling())
        wait_for(flow_run_id, "Cancelled")
        left = flow_runs_of(served.process.pid)

    assert (left, is_running(running_job)) == ([], True)


def test_flow_runs_that_wait_for_their_jobs_hold_up_no_pass(docker_host: DockerHost, serve: Serve) -> None:
    spec = {"image": "busybox", "command": ["sleep", "600"]}
    with serve(**settings(JOB_RUNS=1)) as served:
        first = run_now(served, "run-container-job/on-demand", spec=spec)
        wait_for(first, "Running")
        second = run_now(served, "run-container-job/on-demand", spec=spec)
        beside = run_now(served, "process-jobs/on-demand")
        wait_for(beside, "Completed")
        states = [state_of(flow_run_id) for flow_run_id in (first, second)]

    assert (states[0].is_running(), states[1].is_scheduled()) == (True, True)


def test_what_serves_outlives_the_process_that_its_flow_runs_are_forked_from(
    running_job: ContainerJob, serve: Serve
) -> None:
    with serve(**settings()) as served:
        flow_run_id = run_now(served, "process-queue/scheduled")
        wait_until(lambda: is_running(running_job), 90)
        for child in children_of(served.process.pid):
            os.kill(child, signal.SIGKILL)
        wait_for(run_now(served, "process-jobs/on-demand"), "Completed")
        in_between = state_of(flow_run_id)
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run_id, Cancelling())
        wait_for(flow_run_id, "Cancelled")

    assert in_between.is_running()


@contextmanager
def unguarded_run(client: SyncPrefectClient) -> Iterator[tuple[FlowRunner, UUID]]:
    run = client.create_flow_run(unguarded, state=Scheduled())
    entrypoint = f"{unguarded.fn.__module__}:{unguarded.fn.__name__}"
    runner = FlowRunner(1, child_environment(), lambda run: entrypoint)
    runner.offer([client.read_flow_run(run.id)])
    runner.go_on(client)
    try:
        wait_for(run.id, "Running")
        yield runner, run.id
    finally:
        runner.kill()


@pytest.mark.parametrize("ended", [Completed(), Failed(), Crashed(), Cancelled()], ids=lambda state: state.name)
def test_a_run_that_has_ended_since_it_was_listed_is_not_run_again(prefect_api: str, ended: State) -> None:
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(unguarded, state=Scheduled())
        runner = FlowRunner(1, child_environment(), lambda run: f"{unguarded.fn.__module__}:{unguarded.fn.__name__}")
        runner.offer([client.read_flow_run(run.id)])
        client.set_flow_run_state(run.id, ended, force=True)

        runner.go_on(client)

        assert (runner.is_busy, state_of(run.id).type) == (False, ended.type)


def has_ended(runner: FlowRunner, client: SyncPrefectClient) -> bool:
    runner.go_on(client)
    return not runner.is_busy


def test_a_run_that_is_cut_off_outside_its_body_is_run_again_by_who_serves_next(prefect_api: PrefectServer) -> None:
    with get_client(sync_client=True) as client, unguarded_run(client) as (runner, flow_run_id):
        runner.stop()
        wait_until(lambda: has_ended(runner, client), 60)

        assert state_of(flow_run_id).name == RESCHEDULED


def test_a_run_that_is_cancelled_outside_its_body_is_cancelled(prefect_api: PrefectServer) -> None:
    with get_client(sync_client=True) as client, unguarded_run(client) as (runner, flow_run_id):
        client.set_flow_run_state(flow_run_id, Cancelling())
        runner.stop_cancelled(client)
        wait_until(lambda: has_ended(runner, client), 60)

        assert state_of(flow_run_id).is_cancelled()
