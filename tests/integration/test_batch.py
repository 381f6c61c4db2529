"""One batch: while jobs are launched, what ends is harvested and its slot taken again."""

from typing import Any

import pytest
from django.db import OperationalError, connection

from container_manager.models import ContainerJob, DockerHost, JobAttempt, Status
from container_manager.queue import QueueManager
from container_manager.types import BatchResult
from tests.conftest import wait_until
from tests.fake_engine import Fleet, Gate, in_background, one_round, queued, raising, row


@pytest.fixture
def manager(fleet: Fleet) -> QueueManager:
    return QueueManager(fleet)


class Launching:
    """The launching step of a pass, counted."""

    def __init__(self, manager: QueueManager) -> None:
        self._manager = manager
        self.batches: list[BatchResult] = []

    def __call__(self, max_concurrent: int, timeout: float) -> BatchResult:
        self.batches.append(self._manager.launch_next_batch(max_concurrent, timeout))
        return self.batches[-1]


def test_a_pass_that_stays_launches_many_short_jobs_in_few_batches(fleet: Fleet, manager: QueueManager) -> None:
    fleet.add_host()
    for _ in range(30):
        queued(manager, command=["true"])
    launching = Launching(manager)

    stats = manager.process_queue_continuous(3, 1, work_seconds=30, launch=launching)

    assert (stats.jobs_launched, stats.jobs_ended) == (30, 30)
    assert ContainerJob.objects.filter(status=Status.COMPLETED).count() == JobAttempt.objects.count() == 30
    assert len(launching.batches) < 10
    assert sum(len(batch.ended) for batch in launching.batches) > 15


def test_a_batch_never_has_more_alive_than_its_cap(fleet: Fleet, manager: QueueManager) -> None:
    host = fleet.add_host()
    for _ in range(20):
        queued(manager, command=["true"])
    most = 0

    def count() -> None:
        nonlocal most
        most = max(most, sum(container.state != "exited" for container in list(host.containers.values())))

    host.always("start", count)
    manager.process_queue_continuous(3, 1, work_seconds=30)

    assert 0 < most <= 3


def test_a_slow_launch_keeps_no_ended_job_waiting(fleet: Fleet, manager: QueueManager) -> None:
    host = fleet.add_host()
    slow, gate = queued(manager, priority=80), Gate()
    quick = queued(manager, command=["true"])
    host.before("create", gate)

    with in_background(lambda stop: manager.process_queue_continuous(5, 1, stop, work_seconds=30)):
        wait_until(lambda: row(quick).status == Status.COMPLETED)
        assert row(slow).status == Status.LAUNCHING
        gate.open()


def test_one_round_leaves_what_ends_to_the_next(fleet: Fleet, manager: QueueManager) -> None:
    fleet.add_host()
    job = queued(manager, command=["true"])

    stats = one_round(manager)

    assert (stats.jobs_launched, stats.jobs_ended, row(job).status) == (1, 0, Status.RUNNING)


def test_a_harvest_that_fails_in_a_batch_abandons_no_launch(fleet: Fleet, manager: QueueManager) -> None:
    host = fleet.add_host()
    ended = [queued(manager, command=["true"]) for _ in range(4)]
    others = [queued(manager) for _ in range(4)]
    host.always("read_log", raising(RuntimeError("a defect")))

    with pytest.raises(RuntimeError, match="a defect"):
        manager.process_queue_continuous(8, 1, work_seconds=30)

    assert {row(job).status for job in (*ended, *others)} == {Status.RUNNING}


def test_a_database_that_fails_in_a_batch_hides_nothing_that_was_launched(fleet: Fleet, manager: QueueManager) -> None:
    fleet.add_host(max_concurrent_jobs=100)
    for _ in range(20):
        queued(manager)
    claims = 0

    def fail_second_claim(execute: Any, sql: str, *rest: Any) -> Any:
        nonlocal claims
        claims += "AS arm" in sql
        if "AS arm" in sql and claims == 2:
            raise OperationalError("the server went away")
        return execute(sql, *rest)

    with connection.execute_wrapper(fail_second_claim):
        batch = manager.launch_next_batch(100)

    assert (batch.launched, batch.limit) == (16, "the database failed: the server went away")
    assert ContainerJob.objects.running().count() == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_concurrent": 0}, "max_concurrent must be at least 1"),
        ({"max_concurrent": -1}, "max_concurrent must be at least 1"),
        ({"timeout": 0}, "timeout must be more than 0"),
        ({"timeout": -1}, "timeout must be more than 0"),
    ],
)
def test_a_batch_without_room_or_time_is_refused_before_anything_is_claimed(
    fleet: Fleet, manager: QueueManager, arguments: dict[str, Any], message: str
) -> None:
    host, job = fleet.add_host(), queued(manager)

    with pytest.raises(ValueError, match=message):
        manager.launch_next_batch(**arguments)

    assert (row(job).status, host.calls) == (Status.QUEUED, [])


def test_any_number_may_be_alive_that_a_host_has_slots_for(fleet: Fleet, manager: QueueManager) -> None:
    fleet.add_host(max_concurrent_jobs=0)
    job = queued(manager)
    assert manager.launch_next_batch(10**6).limit == "limit reached: max_concurrent_jobs of host local, 0 of 0"

    DockerHost.objects.update(max_concurrent_jobs=10**6)

    assert manager.launch_next_batch(10**6).job_ids == (job.pk,)
