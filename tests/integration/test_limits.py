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
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateName
from prefect.client.schemas.sorting import LogSort

from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import queue_manager
from flows import limits
from flows.limits import settle
from flows.process_queue import process_queue
from tests.conftest import ROOT, database_url, wait_until
from tests.integration.conftest import Run, Serve, flow_runs_of

from .prefect_side import another_installation

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


def limits_of(client: SyncPrefectClient) -> dict[str, int]:
    return {row.name.removeprefix("tag:"): row.limit for row in client.read_global_concurrency_limits(limit=200)}


@on_sqlite
def test_a_limit_that_nobody_has_set_follows_the_hosts_slots(database: str, api: SyncPrefectClient) -> None:
    settle(api)
    seen = [limits_of(api)]
    for name in ("one", "two"):
        DockerHost.objects.create(name=name, base_url="unix:///nowhere", max_concurrent_jobs=8)
        settle(api, create=False)
        seen.append(limits_of(api))
    set_limit("container-job", 5)
    DockerHost.objects.filter(name="two").delete()
    settle(api)
    seen.append(limits_of(api))
    settle(api, reset=True)
    seen.append(limits_of(api))

    assert seen == [{"container-job": limit, "container-launch": 2} for limit in (1, 8, 16, 5, 8)]


@on_sqlite
@pytest.mark.parametrize("limit", [3, 100])
def test_a_limit_that_was_set_before_anything_was_on_record_stays(
    database: str, api: SyncPrefectClient, limit: int
) -> None:
    set_limit("container-job", limit)
    set_limit("container-launch", 9)
    DockerHost.objects.create(name="one", base_url="unix:///nowhere", max_concurrent_jobs=8)
    settle(api)
    DockerHost.objects.update(max_concurrent_jobs=9)
    settle(api)

    assert limits_of(api) == {"container-job": limit, "container-launch": 9}


@on_sqlite
def test_a_limit_that_somebody_has_removed_is_made_again_only_at_a_start(database: str, api: SyncPrefectClient) -> None:
    settle(api)
    api.delete_global_concurrency_limit_by_name("tag:container-job")
    settle(api, create=False)
    meanwhile = limits_of(api)
    settle(api)

    assert (meanwhile, limits_of(api)) == (
        {"container-launch": 2},
        {"container-job": 1, "container-launch": 2},
    )


@on_sqlite
def test_the_limits_of_another_installation_are_left_alone(
    database: str, api: SyncPrefectClient, settings: Any
) -> None:
    settle(api)
    with another_installation():
        settings.CONTAINER_MANAGER = {"NAME": "staging"}
        DockerHost.objects.create(name="one", base_url="unix:///nowhere", max_concurrent_jobs=8)
        settle(api, reset=True)
        theirs = limits.read_rows(api)

    assert {tag: row.limit for tag, row in theirs.items()} == {"container-job": 8, "container-launch": 2}
    assert {"container-job": 1, "container-launch": 2}.items() <= limits_of(api).items()


@on_sqlite
def test_what_limits_a_named_installation_is_told_by_its_own_tag(
    docker_host: DockerHost, api: SyncPrefectClient, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = {"NAME": "staging"}
    set_limit("staging.container-job", 3)
    set_limit("container-job", 1)
    queue(4, command=["sleep", "600"])
    launched = process_queue(return_state=True).message.splitlines()[0]
    waits = process_queue(return_state=True).message.splitlines()[0]

    assert launched.startswith("launched 3")
    assert "limit reached: tag staging.container-job, 3 of 3" in (waits + launched)
    assert {artifact.key for artifact in api.read_artifacts()} >= {"staging-container-queue"}


@task(tags=["container-launch"], cache_policy=NO_CACHE)
def somebody_elses() -> dict[str, int]:
    """It has the tag of our launches, and takes longer than one of them."""
    with get_client(sync_client=True) as client:
        row = limits.read_rows(client)["container-launch"]
        return {
            "freed": limits.free_leaked(client, row),
            "taken": limits.read_rows(client)["container-launch"].active_slots,
        }


@flow
def of_somebody_else() -> dict[str, int]:
    return somebody_elses()


@on_sqlite
def test_a_task_of_somebody_elses_that_has_our_tag_keeps_its_slot(
    database: str, api: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_limit("container-launch", 1)
    monkeypatch.setattr(limits, "LAUNCH_SECONDS", 0)

    assert of_somebody_else() == {"freed": 0, "taken": 1}


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
