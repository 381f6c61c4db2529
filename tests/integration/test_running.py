"""The processes of the served flow runs: what becomes of them when somebody stops them, or what serves them."""

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateName
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling

from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import QueueManager
from tests.conftest import wait_until
from tests.integration.conftest import Serve, children_of

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

#: A pass stays as long as there is a container to wait for.
STAYING = {"CONTAINER_MANAGER": json.dumps({"POLL_INTERVAL_SECONDS": 3600, "WORK_SECONDS": 600})}


@pytest.fixture
def running_job(docker_host: DockerHost, manager: QueueManager) -> ContainerJob:
    return manager.queue_job(ContainerJob.objects.create_job(image="busybox", command=["sleep", "600"]))


def until(job: ContainerJob, status: Status) -> None:
    def has_come() -> bool:
        job.refresh_from_db()
        return bool(job.status == status)

    wait_until(has_come, 90)


def runs_in(*names: str) -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        state = FlowRunFilterState(name=FlowRunFilterStateName(any_=list(names)))
        return client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state))


def run_by_hand(run: Callable[..., Any]) -> None:
    run("prefect", "deployment", "run", "process-queue/scheduled")


def test_what_serves_lets_the_pass_in_progress_finish_when_it_is_told_to_stop(
    running_job: ContainerJob, serve: Serve, run: Callable[..., Any]
) -> None:
    with serve(**STAYING) as served:
        wait_until(lambda: "on demand" in served.log.read_text(), 90)
        run_by_hand(run)
        until(running_job, Status.RUNNING)
        (in_progress,) = runs_in("Running")
        served.process.send_signal(signal.SIGTERM)
        code = served.process.wait(60)

    with get_client(sync_client=True) as client:
        state = client.read_flow_run(in_progress.id).state
    running_job.refresh_from_db()
    assert (code, state.name, state.message.splitlines()[0]) == (0, "Completed", "launched 1")
    assert running_job.status == Status.RUNNING


def test_a_pass_that_is_cancelled_ends_and_its_containers_run_on(
    running_job: ContainerJob, serve: Serve, run: Callable[..., Any]
) -> None:
    with serve(**STAYING) as served:
        wait_until(lambda: "on demand" in served.log.read_text(), 90)
        run_by_hand(run)
        until(running_job, Status.RUNNING)
        (in_progress,) = runs_in("Running")
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(in_progress.id, Cancelling())
        wait_until(lambda: in_progress.id in [cancelled.id for cancelled in runs_in("Cancelled")], 90)
        left = children_of(served.process.pid)

    running_job.refresh_from_db()
    assert (left, running_job.status) == ([], Status.RUNNING)
