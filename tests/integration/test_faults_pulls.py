"""Pulls: the queue goes on beside them, and a person's word counts more than theirs."""

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from django.utils.timezone import now

from container_manager.exceptions import HostUnavailable
from container_manager.models import ContainerJob, DockerHost, Reason, Status
from container_manager.queue import QueueManager
from tests.conftest import wait_until
from tests.fake_engine import (
    FakeEngine,
    Fleet,
    Gate,
    in_background,
    launched,
    one_round,
    queued,
    raising,
    row,
)


@pytest.fixture
def host(fleet: Fleet) -> FakeEngine:
    host = fleet.add_host()
    host.registry = {"big"}
    return host


@pytest.fixture
def manager(fleet: Fleet) -> QueueManager:
    return QueueManager(fleet)


@pytest.fixture
def gate(host: FakeEngine) -> Iterator[Gate]:
    """The next pull hangs here."""
    gate = Gate()
    host.before("pull", gate)
    yield gate
    gate.open()


def test_a_pass_that_waits_for_a_pull_goes_on_with_the_others_and_launches_what_was_pulled(
    host: FakeEngine, manager: QueueManager, gate: Gate
) -> None:
    ending, cancelled = launched(manager), launched(manager)
    job = queued(manager, image="big")

    with in_background(lambda stop: manager.process_queue_continuous(9, 1, stop, work_seconds=0)) as passing:
        assert gate.reached.wait(10)
        host.end(ending.container_id, 0)
        QueueManager().cancel_job(row(cancelled))
        wait_until(lambda: row(ending).status == Status.COMPLETED)
        wait_until(lambda: row(cancelled).status == Status.CANCELLED)
        assert not passing.done()
        gate.open()
        stats = passing.result(10)

    assert (row(job).status, stats.job_ids, host.count("pull")) == (Status.RUNNING, (job.pk,), 1)
    assert (row(job).retry_count, row(job).launch_tries, job.attempts.count()) == (0, 0, 0)


def test_a_pass_asks_the_host_no_more_often_while_a_pull_is_under_way(
    host: FakeEngine, manager: QueueManager, gate: Gate
) -> None:
    queued(manager, image="big")
    opener = threading.Timer(1.5, gate.open)
    opener.start()

    manager.process_queue_continuous(9, 10, work_seconds=0)
    opener.join()

    # The first round, one when it begins to listen, and one that launches what was pulled.
    assert 2 <= host.count("list") <= 3


def test_one_pull_serves_all_that_wait_for_its_image(host: FakeEngine, manager: QueueManager, gate: Gate) -> None:
    jobs = [queued(manager, image="big") for _ in range(3)]
    batch = manager.launch_next_batch()
    assert (batch.launched, batch.handed_back) == (0, 3)
    gate.open()

    one_round(manager)

    assert ([row(job).status for job in jobs], host.count("pull")) == ([Status.RUNNING] * 3, 1)


def test_launch_next_batch_alone_launches_what_was_pulled(host: FakeEngine, manager: QueueManager) -> None:
    job = queued(manager, image="big")

    wait_until(lambda: manager.launch_next_batch().launched)

    assert (row(job).status, row(job).retry_count, host.count("pull")) == (Status.RUNNING, 0, 1)


@pytest.mark.parametrize("retries", [0, 1])
def test_launch_next_batch_alone_charges_a_pull_that_failed(
    host: FakeEngine, manager: QueueManager, retries: int
) -> None:
    job = queued(manager, image="nowhere/to-be-found", max_retries=retries)

    def has_ended() -> bool:
        manager.launch_next_batch()
        return row(job).status == Status.FAILED

    wait_until(has_ended)

    assert (row(job).reason, row(job).retry_count, host.count("pull")) == (Reason.LAUNCH, retries, retries + 1)
    error = "pull: no registry has nowhere/to-be-found (image nowhere/to-be-found on host local)"
    assert [attempt.error for attempt in job.attempts.all()] == [error] * (retries + 1)


def test_a_pull_that_fails_with_its_host_is_not_charged(host: FakeEngine, manager: QueueManager) -> None:
    job = queued(manager, image="big")
    host.before("pull", raising(HostUnavailable()))

    one_round(manager)
    one_round(manager)

    assert (row(job).status, row(job).retry_count, job.attempts.count()) == (Status.RUNNING, 0, 0)


def test_an_image_is_pulled_on_each_host_that_a_job_runs_on_when_it_always_is(
    fleet: Fleet, host: FakeEngine, manager: QueueManager
) -> None:
    first = DockerHost.objects.get()
    job = queued(manager, pull_policy="always")
    manager.launch_next_batch()
    wait_until(lambda: host.count("pull") == 1)
    # Meanwhile another host comes, and the first one is closed to new jobs.
    other = fleet.add_host("other")
    DockerHost.objects.filter(pk=first.pk).update(is_active=False)

    one_round(manager)
    wait_until(lambda: one_round(manager).jobs_launched or row(job).status == Status.RUNNING)

    assert (row(job).slot_host.name, other.count("pull"), len(other.starts)) == ("other", 1, 1)
    assert host.starts == []


def cancel(manager: QueueManager, job: ContainerJob) -> None:
    manager.cancel_job(job)


def dequeue(manager: QueueManager, job: ContainerJob) -> None:
    manager.dequeue_job(job)


def reschedule(manager: QueueManager, job: ContainerJob) -> None:
    manager.dequeue_job(job)
    manager.queue_job(job, now() + timedelta(days=7))


def cancel_and_retry_in_a_week(manager: QueueManager, job: ContainerJob) -> None:
    manager.cancel_job(job)
    manager.retry_job(job, now() + timedelta(days=7))


@pytest.mark.parametrize("image", ["big", "nowhere/to-be-found"], ids=["pulled", "failed"])
@pytest.mark.parametrize("say", [cancel, dequeue, reschedule, cancel_and_retry_in_a_week])
def test_what_a_person_says_of_a_held_job_outlasts_its_pull(
    host: FakeEngine, manager: QueueManager, gate: Gate, say: Callable, image: str
) -> None:
    job = queued(manager, image=image)
    manager.launch_next_batch()
    say(QueueManager(), row(job))
    as_said = ContainerJob.objects.values().get(pk=job.pk)

    gate.open()
    one_round(manager)

    assert ContainerJob.objects.values().get(pk=job.pk) == as_said
    assert (host.count("pull"), host.starts) == (1, [])


def test_a_stop_does_not_wait_for_a_pull(host: FakeEngine, manager: QueueManager, gate: Gate) -> None:
    job = queued(manager, image="big")

    with in_background(lambda stop: manager.process_queue_continuous(9, 1, stop)) as loop:
        assert gate.reached.wait(10)

    assert loop.done()
    assert (row(job).status, row(job).slot_host) == (Status.SCHEDULED, None)
