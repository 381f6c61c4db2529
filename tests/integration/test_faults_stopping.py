"""What is stopped, by another pass, a person or a signal, while a pass is at work."""

import threading
from datetime import timedelta
from typing import Any

import pytest
from django.db import connections
from django.utils.timezone import now

from container_manager.models import ContainerJob, JobAttempt, Reason, Status
from container_manager.queue import QueueManager
from tests.fake_engine import FakeEngine, Fleet, launched, let_leases_end, one_round, queued, row

#: Procedures of one host under way at once, with the default LAUNCH_THREADS.
WIDTH = 8


@pytest.fixture
def host(fleet: Fleet) -> FakeEngine:
    return fleet.add_host(max_concurrent_jobs=100)


def let_timeouts_end() -> None:
    ContainerJob.objects.running().update(deadline_at=now() - timedelta(seconds=1))


def cancel_all() -> None:
    for job in ContainerJob.objects.running():
        QueueManager().cancel_job(job)


@pytest.mark.parametrize("retried", [[], [143]], ids=["", "retried"])
@pytest.mark.parametrize(
    ("stop", "status", "reason", "error"),
    [
        (cancel_all, Status.CANCELLED, Reason.CANCELLED, "cancelled while it ran"),
        (let_timeouts_end, Status.FAILED, Reason.TIMEOUT, "stopped after its timeout of 9 s"),
    ],
    ids=["cancelled", "timeout"],
)
def test_what_another_pass_stops_meanwhile_ends_as_stopped(
    fleet: Fleet, host: FakeEngine, retried: list[int], stop: Any, status: Status, reason: Reason, error: str
) -> None:
    manager = QueueManager(fleet)
    job = launched(manager, timeout_seconds=9, retry_exit_codes=retried)

    def meanwhile() -> None:
        # The first pass has read the rows, and not yet listed the containers.
        stop()
        assert one_round(QueueManager(fleet)).jobs_stopped == 1
        connections.close_all()

    host.before("list", meanwhile)

    one_round(manager)

    attempt = job.attempts.get()
    assert (row(job).status, row(job).reason, row(job).retry_count) == (status, reason, 0)
    assert (attempt.reason, attempt.exit_code, attempt.error) == (reason, 143, error)


def test_what_ends_by_itself_before_it_is_stopped_keeps_its_own_code(fleet: Fleet, host: FakeEngine) -> None:
    manager = QueueManager(fleet)
    job = launched(manager)
    let_timeouts_end()
    host.before("signal", lambda: host.end(job.container_id, 0))

    one_round(manager)
    one_round(manager)

    assert (row(job).status, row(job).reason, row(job).exit_code) == (Status.COMPLETED, Reason.EXIT_CODE, 0)


def test_what_another_pass_kills_before_the_first_signal_ends_as_stopped(fleet: Fleet, host: FakeEngine) -> None:
    manager = QueueManager(fleet)
    job = launched(manager, retry_exit_codes=[137])
    let_timeouts_end()

    def meanwhile() -> None:
        # The first pass has noted that it stops the job, and stalls for longer than the grace.
        ContainerJob.objects.update(stop_requested_at=now() - timedelta(minutes=1))
        assert one_round(QueueManager(fleet)).jobs_stopped == 1
        connections.close_all()

    host.before("signal", meanwhile)
    one_round(manager)

    one_round(manager)

    assert [subject.split()[0] for subject in host.subjects("signal")] == ["SIGTERM", "SIGKILL"]
    assert (row(job).status, row(job).reason, row(job).exit_code) == (Status.FAILED, Reason.TIMEOUT, 137)


def test_a_job_cancelled_before_its_retry_keeps_its_logs_and_says_so(fleet: Fleet, host: FakeEngine) -> None:
    manager = QueueManager(fleet)
    job = launched(manager, retry_exit_codes=[3])
    container = host.containers[job.container_id]
    container.stdout, container.stderr = b"half of it", b"and why"
    host.end(container.id, 3)
    manager.cancel_job(job)

    one_round(manager)

    attempt = job.attempts.get()
    assert (row(job).status, row(job).exit_code, attempt.exit_code) == (Status.CANCELLED, 3, 3)
    assert (attempt.stdout, attempt.stderr) == ("half of it", "and why")
    assert row(job).last_error == attempt.error == "cancelled before its retry; it exited with code 3"
    assert host.containers == {}


def test_a_job_cancelled_before_its_retry_is_reported_as_cancelled(fleet: Fleet, host: FakeEngine) -> None:
    manager = QueueManager(fleet)
    job = launched(manager, retry_exit_codes=[3])
    host.end(job.container_id, 3)
    manager.cancel_job(job)

    [end] = one_round(manager).ended

    assert (end.status, end.reason, end.error) == (Status.CANCELLED, row(job).reason, row(job).last_error)


def test_a_job_that_is_cancelled_while_it_is_created_never_starts(fleet: Fleet, host: FakeEngine) -> None:
    manager = QueueManager(fleet)
    job = queued(manager)

    def meanwhile() -> None:
        manager.cancel_job(row(job))
        connections.close_all()

    host.after("create", meanwhile)

    batch = manager.launch_next_batch()

    assert (batch.launched, row(job).status, row(job).reason) == (0, Status.CANCELLED, Reason.CANCELLED)
    assert (host.starts, host.containers) == ([], {})


def test_a_job_that_is_cancelled_while_it_starts_is_stopped_by_a_pass(fleet: Fleet, host: FakeEngine) -> None:
    manager = QueueManager(fleet)
    job = queued(manager)

    def meanwhile() -> None:
        manager.cancel_job(row(job))
        connections.close_all()

    host.after("start", meanwhile)
    manager.launch_next_batch()
    assert row(job).status == Status.RUNNING

    one_round(manager)
    one_round(manager)

    assert (row(job).status, row(job).exit_code, host.containers) == (Status.CANCELLED, 143, {})


def test_only_so_many_harvests_are_under_way_as_fit_in_memory(fleet: Fleet, host: FakeEngine) -> None:
    manager = QueueManager(fleet)
    jobs = [queued(manager) for _ in range(3 * WIDTH)]
    manager.launch_next_batch(1000)
    for container_id in list(host.containers):
        host.end(container_id)
    under_way = []

    def count() -> None:
        # What was read of a container is in memory from its inspection until its removal.
        under_way.append(len(host.subjects("inspect")) - len(host.subjects("remove")))

    host.always("inspect", count)

    stats = one_round(manager)

    assert stats.jobs_ended == len(jobs) == len(under_way)
    assert 1 < max(under_way) <= WIDTH


def test_a_stop_is_noticed_between_two_harvests(fleet: Fleet, host: FakeEngine) -> None:
    manager = QueueManager(fleet)
    jobs = [queued(manager) for _ in range(3 * WIDTH)]
    manager.launch_next_batch(1000)
    for container_id in list(host.containers):
        host.end(container_id)
    asked = threading.Event()
    host.before("read_log", asked.set)

    manager.process_queue_continuous(1000, 1, asked)

    harvested = JobAttempt.objects.count()
    assert 1 <= harvested <= WIDTH
    assert one_round(manager).jobs_ended == len(jobs) - harvested


def test_a_job_that_is_adopted_past_its_deadline_is_stopped_by_the_next_pass(fleet: Fleet, host: FakeEngine) -> None:
    manager = QueueManager(fleet)
    job = queued(manager, timeout_seconds=60)
    host.lose_answer("start", happens=True)
    manager.launch_next_batch()
    let_leases_end()
    # Its launcher has been dead for longer than the job may run.
    ContainerJob.objects.update(deadline_at=now() - timedelta(seconds=1))

    one_round(manager)
    assert (row(job).status, host.count("signal")) == (Status.RUNNING, 0)
    one_round(manager)
    one_round(manager)

    assert (row(job).status, row(job).reason, row(job).attempt) == (Status.FAILED, Reason.TIMEOUT, 1)
