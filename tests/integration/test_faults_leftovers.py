"""Containers that vanish, and containers that stay when their attempts are over; a database that goes away."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils.timezone import now

from container_manager.exceptions import OutcomeUnknown
from container_manager.models import ContainerJob, DockerHost, Reason, Status
from container_manager.queue import QueueManager
from container_manager.services import JobService
from tests.conftest import free_port
from tests.fake_engine import FakeEngine, Fleet, launched, one_round, queued, raising, row


@pytest.fixture
def host(fleet: Fleet) -> FakeEngine:
    return fleet.add_host()


@pytest.fixture
def manager(fleet: Fleet) -> QueueManager:
    return QueueManager(fleet)


def test_one_by_one_as_in_a_pass_containers_that_vanish_together_are_held(
    host: FakeEngine, manager: QueueManager
) -> None:
    jobs = [launched(manager) for _ in range(4)]
    disk, host.containers = host.containers, {}

    results = [JobService(manager).process_job(row(job)) for job in jobs]

    assert [(result.success, result.message) for result in results] == [(True, "is running")] * 4
    assert all(row(job).missing_at for job in jobs)
    host.containers = disk
    for job in jobs:
        host.end(job.container_id, 0)
    assert one_round(manager).jobs_ended == 4
    assert {row(job).status for job in jobs} == {Status.COMPLETED}


def test_what_is_held_for_too_long_is_lost(host: FakeEngine, manager: QueueManager) -> None:
    jobs = [launched(manager) for _ in range(3)]
    host.containers = {}
    one_round(manager)
    ContainerJob.objects.update(missing_at=now() - timedelta(hours=1))

    one_round(manager)

    assert {(row(job).status, row(job).reason) for job in jobs} == {(Status.FAILED, Reason.LOST)}


def test_what_comes_back_is_held_no_more(host: FakeEngine, manager: QueueManager) -> None:
    jobs = [launched(manager) for _ in range(3)]
    disk, host.containers = host.containers, {}
    one_round(manager)
    host.containers = disk

    one_round(manager)

    assert [(row(job).status, row(job).missing_at) for job in jobs] == [(Status.RUNNING, None)] * 3


def test_a_container_that_vanishes_alone_is_lost(host: FakeEngine, manager: QueueManager) -> None:
    gone, stays = launched(manager), launched(manager)
    host.vanish(gone.container_id)

    JobService(manager).process_job(row(gone))

    assert (row(gone).reason, row(stays).status) == (Reason.LOST, Status.RUNNING)


def test_what_runs_on_after_its_host_was_declared_lost_is_stopped(host: FakeEngine, manager: QueueManager) -> None:
    job = launched(manager)
    manager.declare_host_lost(DockerHost.objects.get())
    DockerHost.objects.update(is_active=True)

    first = one_round(manager)
    second = one_round(manager)

    assert [anomaly.split(" ", 4)[4] for anomaly in first.anomalies] == ["ran on after its attempt was over; stopped"]
    assert host.subjects("signal") == [f"SIGKILL {job.container_id}"]
    assert (second.anomalies, host.containers, row(job).reason) == ((), {}, Reason.LOST)


def test_a_container_that_only_says_that_it_was_an_attempts_is_reported_and_left(
    host: FakeEngine, manager: QueueManager
) -> None:
    job = launched(manager)
    manager.declare_host_lost(DockerHost.objects.get())
    DockerHost.objects.update(is_active=True)
    real = host.vanish(job.container_id)
    real.id = "f" * 64
    host.containers[real.id] = real

    stats = one_round(manager)

    assert [anomaly.split(" ", 4)[4] for anomaly in stats.anomalies] == [
        "is running, its attempt is over; left as it is"
    ]
    assert (host.count("signal"), host.count("remove"), real.state) == (0, 0, "running")


def test_a_lost_job_that_runs_again_elsewhere_is_stopped_where_it_was(fleet: Fleet, manager: QueueManager) -> None:
    lost = fleet.add_host("lost")
    job = launched(manager, rerun_on_lost=True)
    manager.declare_host_lost(DockerHost.objects.get())
    other = fleet.add_host("other")
    ContainerJob.objects.update(scheduled_for=now())
    one_round(manager)
    assert (row(job).status, row(job).slot_host.name) == (Status.RUNNING, "other")

    DockerHost.objects.update(is_active=True)
    one_round(manager)

    assert lost.containers[job.container_id].state == "exited"
    assert other.containers[row(job).container_id].state == "running"


def test_a_removal_whose_answer_is_lost_is_repeated(host: FakeEngine, manager: QueueManager) -> None:
    job = launched(manager)
    host.end(job.container_id, 0)
    host.before("remove", raising(OutcomeUnknown()))

    one_round(manager)
    assert (row(job).status, len(host.containers)) == (Status.COMPLETED, 1)
    one_round(manager)

    assert (host.containers, job.attempts.count()) == ({}, 1)


@pytest.mark.parametrize("state", ["created", "paused", "restarting", "hibernated", ""])
def test_an_odd_state_is_reported_and_never_a_failure(host: FakeEngine, manager: QueueManager, state: str) -> None:
    job = launched(manager)
    host.containers[job.container_id].state = state

    stats = one_round(manager)

    assert stats.anomalies == (f"job {job.pk}: its container is {state}; left as it is",)
    assert (row(job).status, host.count("remove")) == (Status.RUNNING, 0)


@pytest.mark.parametrize(("state", "status"), [("removing", Status.RUNNING), ("dead", Status.FAILED)])
def test_what_is_on_its_way_out_is_waited_for_and_what_is_dead_has_ended(
    host: FakeEngine, manager: QueueManager, state: str, status: Status
) -> None:
    job = launched(manager)
    host.end(job.container_id, 3)
    host.containers[job.container_id].state = state

    stats = one_round(manager)

    assert (row(job).status, stats.anomalies, len(host.containers)) == (status, (), int(state == "removing"))


@pytest.mark.parametrize(("code", "oom", "status", "reason"), [
    (0, True, Status.COMPLETED, Reason.EXIT_CODE), (137, True, Status.FAILED, Reason.OOM),
    (137, False, Status.FAILED, Reason.EXIT_CODE),
])  # fmt: skip
def test_memory_that_ran_out_is_kept_beside_the_exit_code(
    host: FakeEngine, manager: QueueManager, code: int, oom: bool, status: Status, reason: Reason
) -> None:
    job = launched(manager)
    host.end(job.container_id, code, oom_killed=oom)

    one_round(manager)

    assert (row(job).status, row(job).reason, row(job).exit_code, row(job).oom_killed) == (status, reason, code, oom)


def test_a_loop_outlives_a_database_that_is_away_when_it_begins(
    host: FakeEngine, manager: QueueManager, database: str, caplog: Any
) -> None:
    job = queued(manager)
    usual = dict(connection.settings_dict)
    away = {"NAME": "/nowhere/at-all.sqlite3"} if database == "sqlite" else {"PORT": str(free_port())}
    connection.close()
    connection.settings_dict.update(away)

    class Stop:
        """Asked all the time: the database comes back once the loop has met its absence."""

        def is_set(self) -> bool:
            if "the database failed" in caplog.text:
                connection.settings_dict.update(usual)
            return "the database is back" in caplog.text

    try:
        stats = manager.process_queue_continuous(5, 0.1, Stop())
    finally:
        connection.settings_dict.update(usual)

    assert (stats.job_ids, row(job).status) == ((job.pk,), Status.RUNNING)
    assert caplog.text.count("the database failed") == 1
