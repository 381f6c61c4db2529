"""The flow process-queue, recorded by a real Prefect server, with a real Engine below it."""

import json
import os
import subprocess
import sys

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State

from container_manager.models import ContainerJob, Installation, Status
from container_manager.queue import queue_manager
from container_manager.types import LoopStats
from flows.process_queue import process_queue
from tests.conftest import PrefectServer, wait_until
from tests.integration.conftest import most_alive

pytestmark = pytest.mark.usefixtures("prefect_api", "docker_host")


def prefect(*arguments: str, server: PrefectServer) -> None:
    """As a person types it."""
    subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        env=os.environ | server.client, check=True, capture_output=True,
    )  # fmt: skip


def queue(count: int, **fields: object) -> list[ContainerJob]:
    return queue_manager.queue_jobs([ContainerJob.objects.build(image="busybox", **fields) for _ in range(count)])


def task_runs(state: State) -> list[str]:
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        return [run.name for run in client.read_task_runs(flow_run_filter=chosen)]


def test_a_pass_launches_and_harvests_and_says_so_in_its_state(database: str) -> None:
    job = queue(1, command=["sh", "-c", "echo done"])[0]

    state = process_queue(work_seconds=20, return_state=True)

    job.refresh_from_db()
    summary, report = state.message.splitlines()
    assert (job.status, job.attempts.get().stdout) == (Status.COMPLETED, "done\n")
    assert (state.name, summary) == ("Completed", "launched 1, ended 1")
    assert LoopStats.model_validate(json.loads(report)).job_ids == (job.pk,)


def test_a_pass_with_nothing_to_do_is_idle_and_makes_no_task_run_and_no_artifact(database: str) -> None:
    state = process_queue(return_state=True)

    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["container-queue"])),
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id])),
        )
    assert (state.name, state.type.value, state.message.splitlines()[0]) == ("Idle", "COMPLETED", "nothing to do")
    assert task_runs(state) == []
    assert artifacts == []


def test_a_pass_that_did_something_leaves_the_queue_as_an_artifact(database: str) -> None:
    queue(1, command=["true"])

    state = process_queue(return_state=True)

    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        )
    assert [artifact.key for artifact in artifacts] == ["container-queue"]
    assert {"what": "running", "now": 1} in json.loads(artifacts[0].data)


@pytest.mark.parametrize("tag", ["container-job", "docker-host:local"])
def test_the_limit_of_a_tag_caps_the_containers_alive_and_raising_it_raises_that(
    database: str, prefect_api: PrefectServer, events: list[dict], tag: str
) -> None:
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(f"tag:{tag}", 3)
    queue(10, command=["sleep", "60"])

    passes = [process_queue(max_concurrent=100, return_state=True) for _ in range(2)]
    wait_until(lambda: len(events) >= 3)
    capped = most_alive(events)
    prefect("concurrency-limit", "create", tag, "5", server=prefect_api)
    process_queue(max_concurrent=100)
    wait_until(lambda: len(events) >= 5)

    assert capped == 3
    assert [f"limit reached: tag {tag}, 3 of 3" in state.message for state in passes] == [True, True]
    assert most_alive(events) == ContainerJob.objects.alive().count() == 5


def test_a_limit_that_is_lowered_stops_no_container_and_zero_pauses_the_queue(
    database: str, prefect_api: PrefectServer
) -> None:
    queue(2, command=["sleep", "60"])
    process_queue(max_concurrent=1)

    prefect("concurrency-limit", "create", "container-job", "0", server=prefect_api)
    state = process_queue(max_concurrent=100, return_state=True)

    assert "limit reached: tag container-job, 1 of 0" in state.message
    assert ContainerJob.objects.alive().count() == 1


def test_the_last_limits_hold_while_the_server_is_away(database: str, prefect_api: PrefectServer) -> None:
    prefect("concurrency-limit", "create", "container-job", "2", server=prefect_api)
    process_queue()

    queue(3, command=["sleep", "60"])
    process_queue(max_concurrent=100)
    limits = Installation.load().tag_limits

    assert limits.total == 2
    assert queue_manager.launch_next_batch(100).launched == 0
    assert ContainerJob.objects.alive().count() == 2


def test_launches_are_skipped_and_not_waited_for_while_the_launch_tag_is_full(
    database: str, prefect_api: PrefectServer
) -> None:
    prefect("concurrency-limit", "create", "container-launch", "0", server=prefect_api)
    job = queue(1, command=["true"])[0]

    state = process_queue(return_state=True)

    job.refresh_from_db()
    assert job.status == Status.QUEUED
    assert "limit reached: tag container-launch, 0 of 0" in state.message
    assert task_runs(state) == []


def test_a_slot_that_nobody_holds_any_more_is_freed(database: str, prefect_api: PrefectServer) -> None:
    prefect("concurrency-limit", "create", "container-launch", "1", server=prefect_api)
    prefect("gcl", "update", "tag:container-launch", "--active-slots", "1", server=prefect_api)
    job = queue(1, command=["true"])[0]

    process_queue(work_seconds=20)

    job.refresh_from_db()
    assert job.status == Status.COMPLETED
