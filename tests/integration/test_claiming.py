"""The claim: which jobs start next, on which host, and what keeps more from it."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils.timezone import now

from container_manager.capacity import measure
from container_manager.claiming import claim, promote_due
from container_manager.exceptions import DatabaseBusy
from container_manager.models import ContainerJob, DockerHost, Installation, Reason, Status
from container_manager.queue import QueueManager
from container_manager.transitions import move
from container_manager.types import Limits
from tests.conftest import wait_until
from tests.integration.conftest import another_transaction


@pytest.fixture
def host(database: str) -> DockerHost:
    return DockerHost.objects.create(name="a")


def queue(count: int = 1, **fields: object) -> list[int]:
    jobs = [ContainerJob.objects.build(image="busybox", **fields) for _ in range(count)]
    return [job.pk for job in QueueManager().queue_jobs(jobs)]


def occupy(host: DockerHost, count: int) -> None:
    for _ in range(count):
        job = ContainerJob.objects.build(image="busybox")
        job.status, job.slot_host = Status.RUNNING, host
        job.save()


def claimed(max_concurrent: int, *hosts: DockerHost, **options: object) -> list[int]:
    return [job.pk for job in claim(max_concurrent, {host.pk for host in hosts}, **options).jobs]


@contextmanager
def another_holds_the_lock() -> Iterator[None]:
    """On PostgreSQL the Installation row, on SQLite, where transactions are IMMEDIATE, the database."""
    Installation.load()
    with another_transaction(lambda: Installation.objects.select_for_update(no_key=True).get(pk=1)):
        yield


@pytest.mark.parametrize("seed", range(4))
def test_jobs_are_taken_by_priority_then_queued_at_then_id(host: DockerHost, seed: int) -> None:
    dice = random.Random(seed)
    jobs = [ContainerJob.objects.build(image="busybox", priority=dice.choice([0, 50, 100])) for _ in range(40)]
    for job in jobs:
        job.status = Status.QUEUED
        job.queued_at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(microseconds=dice.randrange(5))
        job.pinned_host = dice.choice([None, host])
    ContainerJob.objects.bulk_create(jobs)
    DockerHost.objects.update(max_concurrent_jobs=100)

    ready = [job.pk for job in QueueManager().get_ready_jobs()]
    taken = [pk for most in range(7, 42, 7) for pk in claimed(most, host)]

    jobs.sort(key=lambda job: (-job.priority, job.queued_at, job.pk))
    assert ready == [job.pk for job in jobs]
    assert taken == ready[:35]


@pytest.mark.parametrize("seed", range(4))
def test_what_a_claim_would_take_is_what_it_takes(database: str, seed: int) -> None:
    dice, manager = random.Random(seed), QueueManager()
    hosts = [DockerHost.objects.create(name=f"h{most}", max_concurrent_jobs=most) for most in (0, 2, 5)]
    # More than ever fit are pinned to the full host, and are first.
    queue(600, priority=100, pinned_host=hosts[0])
    for _ in range(30):
        job = ContainerJob.objects.create_job(
            image="busybox", priority=dice.choice([0, 50]), pinned_host=dice.choice([None, *hosts])
        )
        manager.queue_job(job, schedule_for=dice.choice([None, now() - timedelta(seconds=dice.randrange(1, 100))]))
    capacity = measure(dice.choice([1, 3, 20]), Limits(), {host.pk for host in hosts})

    next_jobs = [job.pk for job in manager.next_jobs(capacity)]

    assert promote_due(time.monotonic() + 5)
    assert next_jobs == claimed(capacity.slots, *hosts)
    assert len(next_jobs) == capacity.slots


def test_a_job_goes_where_its_image_was_pulled_for_it_while_there_is_a_slot(database: str) -> None:
    small, large = (DockerHost.objects.create(name=f"h{most}", max_concurrent_jobs=most) for most in (1, 9))
    queue(2)
    ContainerJob.objects.update(pulled_host=small)

    taken = claim(9, {small.pk, large.pk}).jobs

    assert [job.slot_host_id for job in taken] == [small.pk, large.pk]


def test_a_scheduled_job_is_never_claimed_before_its_time(host: DockerHost) -> None:
    moment = now() + timedelta(seconds=0.3)
    job = QueueManager().queue_job(ContainerJob.objects.create_job(image="busybox"), schedule_for=moment)

    def claim_due() -> list[int]:
        promote_due(time.monotonic() + 5)
        return claimed(5, host)

    assert wait_until(claim_due) == [job.pk]
    job.refresh_from_db()
    assert now() >= moment
    assert (job.queued_at, job.scheduled_for) == (moment, None)


def test_a_due_job_has_waited_since_its_time_before_and_after_its_promotion(host: DockerHost) -> None:
    [queued] = queue()
    due = ContainerJob.objects.create_job(image="busybox")
    QueueManager().queue_job(due, schedule_for=now() - timedelta(days=1))
    ready = [job.pk for job in QueueManager().get_ready_jobs(limit=2)]

    assert promote_due(time.monotonic() + 5) == 1
    assert claimed(5, host) == ready == [due.pk, queued]


@pytest.mark.parametrize(
    ("max_concurrent", "limits", "most_on_host", "alive", "text"),
    [
        (2, {}, 10, 2, "limit reached: max_concurrent, 2 of 2"),
        (5, {"total": 3}, 10, 3, "limit reached: tag container-job, 3 of 3"),
        (3, {"total": 5}, 10, 3, "limit reached: max_concurrent, 3 of 3"),
        (5, {"total": 0}, 10, 0, "limit reached: tag container-job, 0 of 0"),
        (5, {}, 2, 2, "limit reached: max_concurrent_jobs of host a, 2 of 2"),
        (5, {"hosts": {"a": 1}}, 10, 1, "limit reached: tag docker-host:a, 1 of 1"),
        (5, {"hosts": {"a": 0}}, 10, 0, "limit reached: tag docker-host:a, 0 of 0"),
        (5, {"hosts": {"a": 5}}, 4, 4, "limit reached: max_concurrent_jobs of host a, 4 of 4"),
        (5, {"hosts": {"b": 0}}, 10, 5, "limit reached: max_concurrent, 5 of 5"),
    ],
)
def test_the_smallest_limit_binds_and_is_named(
    host: DockerHost, max_concurrent: int, limits: dict[str, object], most_on_host: int, alive: int, text: str
) -> None:
    DockerHost.objects.update(max_concurrent_jobs=most_on_host)
    QueueManager().keep_limits(Limits(**limits))
    queue(8)

    first, second = (claim(max_concurrent, {host.pk}) for _ in range(2))

    assert (len(first.jobs), first.limit) == (alive, text)
    assert (len(second.jobs), second.limit) == (0, text)


def test_no_limit_is_named_when_nothing_is_left_to_claim(host: DockerHost) -> None:
    queue(2)

    assert [claim(5, {host.pk}).limit for _ in range(2)] == ["", ""]


def test_several_full_hosts_are_all_named(host: DockerHost) -> None:
    other = DockerHost.objects.create(name="b", max_concurrent_jobs=1)
    QueueManager().keep_limits(Limits(hosts={"a": 2}))
    queue(5)

    first, second = (claim(9, {host.pk, other.pk}) for _ in range(2))

    full = "limit reached: tag docker-host:a, 2 of 2; limit reached: max_concurrent_jobs of host b, 1 of 1"
    assert (len(first.jobs), first.limit, second.limit) == (3, full, full)


def test_without_a_usable_host_the_claim_says_why(database: str) -> None:
    queue()
    reasons = [claim(5, set()).limit]
    host = DockerHost.objects.create(name="a")
    reasons.append(claim(5, set()).limit)
    DockerHost.objects.update(is_active=False)
    reasons.append(claim(5, {host.pk}).limit)

    assert reasons == ["there is no Docker host: add one", "host a is not reachable", "host a is not active"]


@pytest.mark.parametrize(
    "status", [Status.LAUNCHING, Status.STARTING, Status.RECOVERING, Status.RUNNING], ids=lambda status: status.value
)
def test_every_job_that_holds_a_slot_counts(host: DockerHost, status: Status) -> None:
    occupy(host, 2)
    ContainerJob.objects.update(status=status)
    queue(2)

    assert len(claimed(3, host)) == 1


@pytest.mark.parametrize(("silent_for", "count"), [(10, 1), (301, 3)])
def test_jobs_of_a_host_that_is_silent_for_long_stop_counting(host: DockerHost, silent_for: int, count: int) -> None:
    away = DockerHost.objects.create(name="b", last_seen_at=now() - timedelta(seconds=silent_for))
    occupy(away, 2)
    queue(5)

    assert len(claimed(3, host)) == count


def test_a_job_goes_to_the_host_that_it_is_pinned_to_or_nowhere(host: DockerHost) -> None:
    full = DockerHost.objects.create(name="b", max_concurrent_jobs=1)
    away = DockerHost.objects.create(name="c")
    queue(3, pinned_host=full, priority=80)
    queue(1, pinned_host=away, priority=80)
    free = queue(2)

    jobs = claim(9, {host.pk, full.pk}).jobs

    assert [(job.pinned_host, job.slot_host) for job in jobs] == [(full, full), (None, host), (None, host)]
    assert [job.pk for job in jobs[1:]] == free


def test_jobs_for_any_host_spread_to_where_most_is_free(host: DockerHost) -> None:
    DockerHost.objects.update(max_concurrent_jobs=4)
    small = DockerHost.objects.create(name="b", max_concurrent_jobs=2)
    occupy(host, 1)
    queue(4)

    jobs = claim(9, {host.pk, small.pk}).jobs

    assert [job.slot_host.name for job in jobs] == ["a", "a", "b", "a"]


def test_only_the_jobs_that_are_asked_for_are_claimed(host: DockerHost) -> None:
    first, second, third = queue(3)

    assert claimed(5, host, only=[third, second]) == [second, third]
    assert claimed(5, host, only=[]) == []
    assert claimed(5, host) == [first]


def test_a_claim_marks_its_jobs_with_one_token_an_attempt_and_a_lease(host: DockerHost) -> None:
    queue(2)

    taken = claim(5, {host.pk})

    assert taken.lease is not None
    for job in taken.jobs:
        assert (job.status, job.attempt, job.claim_token) == (Status.LAUNCHING, 1, taken.lease.token)
        assert now() + timedelta(seconds=85) < job.claimed_until < now() + timedelta(seconds=90)


@pytest.mark.parametrize("count", [1, 400])
def test_a_claim_takes_eight_queries_however_many_jobs_it_takes(host: DockerHost, count: int) -> None:
    other = DockerHost.objects.create(name="b", max_concurrent_jobs=400)
    Installation.load()
    queue(count + 10)

    with CaptureQueriesContext(connection) as queries:
        assert len(claimed(count, host, other)) == count

    # A PRAGMA reads and writes nothing: it sets how long SQLite waits for its lock.
    words = [query["sql"].split()[0] for query in queries]
    assert len([word for word in words if word not in ("BEGIN", "COMMIT", "SAVEPOINT", "RELEASE", "PRAGMA")]) <= 8


def test_a_lock_that_another_keeps_is_given_up_in_time(host: DockerHost) -> None:
    queue()
    with another_holds_the_lock():
        began = time.monotonic()
        with pytest.raises(DatabaseBusy, match=r"not free within 0\.5 s"):
            claim(5, {host.pk}, timeout=0.5)

        assert 0.4 < time.monotonic() - began < 3
    assert len(claimed(5, host)) == 1


def test_a_batch_names_the_lock_as_its_limit(docker_host: DockerHost, manager: QueueManager) -> None:
    queue()
    with another_holds_the_lock():
        began = time.monotonic()
        batch = manager.launch_next_batch(timeout=1)

        assert (batch.launched, batch.limit[:16]) == (0, "the queue's lock")
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_jobs_are_queued_while_a_claim_is_under_way(host: DockerHost) -> None:
    queue()
    with transaction.atomic():
        claimed(5, host)
        enqueuer = threading.Thread(target=lambda: (queue(pinned_host=host), connection.close()))
        enqueuer.start()
        enqueuer.join(5)

        assert not enqueuer.is_alive()
    assert ContainerJob.objects.queued().count() == 1


def test_eight_threads_never_exceed_the_cap_and_never_claim_twice(host: DockerHost) -> None:
    ids = queue(40)
    taken: list[int] = []
    most_alive: list[int] = []

    def work() -> None:
        while ContainerJob.objects.queued().exists():
            for job in claim(5, {host.pk}).jobs:
                most_alive.append(ContainerJob.objects.alive().count())
                taken.append(job.pk)
                assert move(job, Status.FAILED, reason=Reason.LAUNCH)
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(taken) == ids
    assert 1 <= max(most_alive) <= 5


def test_limits_that_can_not_be_written_within_two_seconds_wait_for_a_later_round(host: DockerHost) -> None:
    manager = QueueManager()
    manager.keep_limits(Limits(total=1))

    with another_holds_the_lock():
        begin = time.monotonic()
        manager.keep_limits(Limits(total=2))
        waited = time.monotonic() - begin
    held = Installation.load().tag_limits.total
    manager.keep_limits(Limits(total=2))

    assert waited < 5
    assert (held, Installation.load().tag_limits.total) == (1, 2)
