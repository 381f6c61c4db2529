"""The limits of Prefect's tags: created, shown, kept over processes, and freed where they leak."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import docker
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateName
from prefect.client.schemas.sorting import LogSort

from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import queue_manager
from flows.process_queue import process_queue
from tests.conftest import ROOT, database_url, wait_until
from tests.integration.conftest import Run, Serve, flow_runs_of

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize("database", ["postgres"], indirect=True)


def queue(count: int, **fields: Any) -> list[ContainerJob]:
    return queue_manager.queue_jobs([ContainerJob.objects.build(image="busybox", **fields) for _ in range(count)])


def set_limit(tag: str, limit: int) -> None:
    """As the UI does, over the API."""
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(f"tag:{tag}", limit)


def holders(tag: str) -> list[UUID]:
    with get_client(sync_client=True) as client:
        return client.read_concurrency_limit_by_tag(tag).active_slots


def status_of(job: ContainerJob) -> str:
    job.refresh_from_db()
    return str(job.status)


@contextmanager
def a_pass(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """One pass in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.process_queue"], cwd=ROOT, env=environment | {"DATABASE_URL": database_url()}
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@on_sqlite
def test_limits_creates_what_is_missing_leaves_what_was_set_by_hand_and_frees_what_nobody_holds(
    docker_host: DockerHost, run: Run
) -> None:
    set_limit("container-job", 7)
    first = run("deployments", "limits", DATABASE_URL=database_url())
    queue(2, command=["sleep", "60"])
    process_queue()
    set_limit("docker-host:local", 4)
    with get_client(sync_client=True) as client:
        leaked = GlobalConcurrencyLimitUpdate(active_slots=2)
        client.update_global_concurrency_limit("tag:container-launch", leaked)
    reset = run("deployments", "limits", "--reset", DATABASE_URL=database_url())

    assert first.stdout.splitlines() == [
        "set the limit of tag container-launch to 2",
        "tag container-job      limit 7   in use 0 (containers alive)",
        "tag docker-host:local  no limit  in use 0 (alive; the host allows 10)",
        "tag container-launch   limit 2   in use 0 (launch tasks in flight)",
    ], first.stderr
    assert reset.stdout.splitlines() == [
        "set the limit of tag container-job to 10",
        "set the limit of tag container-launch to 2",
        "freed 2 slots of tag container-launch: their task runs have ended",
        "tag container-job      limit 10  in use 2 (containers alive)",
        "tag docker-host:local  limit 4   in use 2 (alive; the host allows 10)",
        "tag container-launch   limit 2   in use 0 (launch tasks in flight)",
    ], reset.stderr


@on_postgres
def test_a_launch_in_another_process_holds_back_ours_and_nothing_else(
    docker_host: DockerHost, engine: docker.DockerClient, environment: dict[str, str]
) -> None:
    (running,) = queue(1, command=["sleep", "600"])
    process_queue()
    set_limit("container-launch", 1)
    queue(9, command=["sleep", "600"])
    with a_pass(environment) as other:
        wait_until(lambda: holders("container-launch"), 60)
        other.send_signal(signal.SIGSTOP)
        running.refresh_from_db()
        engine.containers.get(running.container_id).kill()
        wait_until(lambda: engine.containers.get(running.container_id).status == "exited")
        held_back = process_queue(max_concurrent=100, return_state=True)
        waiting = ContainerJob.objects.filter(status=Status.QUEUED).count()
        other.send_signal(signal.SIGCONT)
        assert other.wait(60) == 0
    process_queue(max_concurrent=100)

    assert held_back.message.splitlines()[0] == "ended 1, limit reached: tag container-launch, 1 of 1"
    assert status_of(running) == Status.FAILED
    assert waiting > 0
    assert ContainerJob.objects.filter(status=Status.QUEUED).count() == 0


@on_sqlite
def test_the_slot_of_a_launch_that_was_killed_is_freed_by_the_next_pass(docker_host: DockerHost, serve: Serve) -> None:
    set_limit("container-launch", 1)
    queue(9, command=["sleep", "600"])
    with serve() as served:
        wait_until(lambda: holders("container-launch"), 60)
        for child in flow_runs_of(served.process.pid):
            os.kill(child, signal.SIGKILL)
        (job,) = queue(1, command=["true"], priority=100)
        wait_until(lambda: status_of(job) == Status.COMPLETED, 90)
        with get_client(sync_client=True) as client:
            # Prefect itself would free it after a minute.
            wait_until(lambda: "tag container-launch: freed 1 slots of task runs that have ended" in told(client), 60)
            state = FlowRunFilterState(name=FlowRunFilterStateName(any_=["Crashed"]))
            crashed = client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state))

    assert "The process of the flow run ended with SIGKILL." in [run.state.message for run in crashed]


def told(client: SyncPrefectClient) -> list[str]:
    """The last log lines of all flow runs."""
    return [line.message for line in client.read_logs(sort=LogSort.TIMESTAMP_DESC)]
