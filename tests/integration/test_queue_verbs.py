"""What people do with jobs: the verbs of the queue, each against the rows that it leaves."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils.timezone import now

from container_manager.exceptions import InvalidTransition
from container_manager.models import ALIVE, ENDED, ContainerJob, DockerHost, Installation, JobAttempt, Status
from container_manager.queue import QueueManager
from container_manager.types import Limits

WAITING = (Status.SCHEDULED, Status.QUEUED)
LATER = now() + timedelta(hours=1)
ALLOWED = {
    "queue_job": (Status.PENDING,),
    "dequeue_job": WAITING,
    "cancel_job": (Status.PENDING, *WAITING, *ALIVE),
    "retry_job": ENDED,
}
REFUSED: list[tuple[str, Status, dict[str, Any]]] = [
    (verb, status, {}) for verb, allowed in ALLOWED.items() for status in Status if status not in allowed
]
REFUSED += [(verb, status, {"schedule_for": LATER}) for verb, status, _ in REFUSED if verb == "retry_job"]
#: What the two verbs that take a time say besides the status.
HINTS = {"queue_job": "queued already.*retried", "retry_job": "only a job that has ended is retried"}


@pytest.fixture
def host(database: str) -> DockerHost:
    return DockerHost.objects.create(name="a")


def build(**fields: Any) -> ContainerJob:
    return ContainerJob.objects.build(**{"image": "busybox"} | fields)


def in_status(status: Status, host: DockerHost, **fields: Any) -> ContainerJob:
    """A job as a process with this status leaves it."""
    job = ContainerJob.objects.create_job(image="busybox")
    usual: dict[str, Any] = {"status": status}
    if status in ALIVE:
        usual |= {"slot_host": host, "attempt": 1, "claim_token": "token"}
    if status == Status.SCHEDULED:
        usual["scheduled_for"] = LATER
    ContainerJob.objects.filter(pk=job.pk).update(**usual | fields)
    job.refresh_from_db()
    return job


def values(job: ContainerJob) -> dict[str, Any]:
    return {field.attname: getattr(job, field.attname) for field in ContainerJob._meta.fields}


def row(job: ContainerJob) -> dict[str, Any]:
    return values(ContainerJob.objects.get(pk=job.pk))


def test_a_pending_job_is_queued(host: DockerHost, manager: QueueManager) -> None:
    job = ContainerJob.objects.create_job(image="busybox")

    assert manager.queue_job(job) is job

    assert (job.status, job.queued_at is not None, job.scheduled_for) == (Status.QUEUED, True, None)
    assert values(job) == row(job)


def test_a_new_job_is_saved_and_scheduled_with_the_priority_given(host: DockerHost, manager: QueueManager) -> None:
    job = manager.queue_job(build(priority=20), schedule_for=LATER, priority=80)

    assert (job.status, job.scheduled_for, job.queued_at, job.priority) == (Status.SCHEDULED, LATER, None, 80)
    assert values(job) == row(job)


@pytest.mark.parametrize(
    ("field", "value"), [("schedule_for", datetime(2030, 1, 1)), ("schedule_for", "2030-01-01"), ("priority", 101)]
)
def test_an_argument_that_is_wrong_is_refused_by_field(
    host: DockerHost, manager: QueueManager, field: str, value: object
) -> None:
    job = ContainerJob.objects.create_job(image="busybox")
    before = row(job)

    with pytest.raises(ValidationError) as refused:
        manager.queue_job(job, **{field: value})

    assert (list(refused.value.message_dict), row(job)) == ([field], before)


@pytest.mark.parametrize("is_read_again", [True, False])
@pytest.mark.parametrize(
    ("field", "value"), [("image", "BusyBox"), ("command", {"a": 1}), ("mounts", [{"type": "bind", "target": "/x"}])]
)
def test_a_row_that_was_tampered_with_is_refused(
    host: DockerHost, manager: QueueManager, field: str, value: object, is_read_again: bool
) -> None:
    job = ContainerJob.objects.create_job(image="busybox")
    ContainerJob.objects.update(**{field: value})

    with pytest.raises(ValidationError) as refused:
        manager.queue_job(ContainerJob.objects.get() if is_read_again else job)

    assert (list(refused.value.message_dict), row(job)["status"]) == ([field], Status.PENDING)


@pytest.mark.parametrize(("verb", "status", "options"), REFUSED)
def test_a_verb_is_refused_in_every_other_status(
    host: DockerHost, manager: QueueManager, verb: str, status: Status, options: dict[str, Any]
) -> None:
    job = in_status(status, host)
    before = row(job)

    with pytest.raises(InvalidTransition, match=rf"\b{status}\b.*{HINTS.get(verb, '')}"):
        getattr(manager, verb)(job, **options)

    assert row(job) == before


def test_a_job_that_was_queued_meanwhile_is_refused_with_a_hint(host: DockerHost, manager: QueueManager) -> None:
    job = ContainerJob.objects.create_job(image="busybox")
    manager.queue_job(ContainerJob.objects.get())

    with pytest.raises(InvalidTransition, match="queued already"):
        manager.queue_job(job)


def test_new_and_pending_jobs_are_queued_together(host: DockerHost, manager: QueueManager) -> None:
    jobs = [build(name="x"), ContainerJob.objects.create_job(image="busybox", name="y"), build(name="z")]

    assert manager.queue_jobs(jobs) == jobs

    rows = ContainerJob.objects.in_claim_order().values_list("name", "status")
    assert sorted(rows) == [("x", Status.QUEUED), ("y", Status.QUEUED), ("z", Status.QUEUED)]
    assert all(values(job) == row(job) for job in jobs)


def test_many_jobs_are_queued_all_or_none(host: DockerHost, manager: QueueManager) -> None:
    new, pending, settled = build(), in_status(Status.PENDING, host), in_status(Status.CANCELLED, host)

    with pytest.raises(InvalidTransition, match="1 of the jobs"):
        manager.queue_jobs([new, pending, settled])

    assert list(ContainerJob.objects.order_by("pk").values_list("status", flat=True)) == ["pending", "cancelled"]
    # So that the good ones can be queued after all.
    assert (new.pk, new.status, pending.status) == (None, Status.PENDING, Status.PENDING)


def test_one_job_that_is_not_allowed_keeps_all_from_the_queue(host: DockerHost, manager: QueueManager) -> None:
    bad = build()
    bad.image = "BusyBox"

    with pytest.raises(ValidationError, match="image"):
        manager.queue_jobs([build(), bad])

    assert not ContainerJob.objects.exists()


def test_ten_thousand_jobs_are_queued_in_few_statements_and_silence(
    database: str, manager: QueueManager, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = [build() for _ in range(10_000)]

    with CaptureQueriesContext(connection) as queries:
        manager.queue_jobs(jobs)

    inserts = sum(query["sql"].startswith("INSERT") for query in queries)
    # One for the Installation's row, since the database is new; SQLite takes 999 values in one statement.
    assert inserts <= 1 + (10 if database == "postgres" else 10_000 // (999 // len(ContainerJob._meta.fields)) + 1)
    assert (ContainerJob.objects.queued().count(), capfd.readouterr()) == (10_000, ("", ""))


@pytest.mark.parametrize("status", WAITING)
def test_a_job_that_waits_goes_back_to_pending(host: DockerHost, manager: QueueManager, status: Status) -> None:
    job = in_status(status, host, queued_at=now())

    manager.dequeue_job(job)

    assert (job.status, job.queued_at, job.scheduled_for) == (Status.PENDING, None, None)
    assert values(job) == row(job)


@pytest.mark.parametrize("status", [Status.PENDING, *WAITING])
def test_a_job_that_waits_is_cancelled_for_good(host: DockerHost, manager: QueueManager, status: Status) -> None:
    job = in_status(status, host)

    assert manager.cancel_job(job) == Status.CANCELLED

    assert (job.reason, job.finished_at is not None, job.scheduled_for) == ("cancelled", True, None)
    assert values(job) == row(job)


@pytest.mark.parametrize("status", ALIVE)
def test_an_alive_job_is_asked_to_stop_once(host: DockerHost, manager: QueueManager, status: Status) -> None:
    job = in_status(status, host)
    assert manager.cancel_job(job) == status
    asked_at = job.cancel_requested_at

    assert manager.cancel_job(job) == status

    assert asked_at is not None
    assert (row(job)["status"], row(job)["cancel_requested_at"]) == (status, asked_at)


@pytest.mark.parametrize("status", ENDED)
@pytest.mark.parametrize("wait", [None, timedelta(hours=1)])
def test_a_retry_begins_anew_and_keeps_the_attempts(
    host: DockerHost, manager: QueueManager, status: Status, wait: timedelta | None
) -> None:
    job = in_status(
        status, host, attempt=3, retry_count=2, launch_tries=1, exit_code=1, oom_killed=True, reason="oom",
        last_error="oh", container_id="c", launched_at=now(), finished_at=now(), deadline_at=now(),
        cancel_requested_at=now(), stop_requested_at=now(), stop_reason="timeout", pull_error="oh",
    )  # fmt: skip
    JobAttempt.objects.create(job=job, number=3, host=host, host_name=host.name, reason="oom", stdout="out")
    moment = wait and now() + wait

    manager.retry_job(job, moment)

    assert (job.status, job.scheduled_for) == (Status.SCHEDULED if wait else Status.QUEUED, moment)
    kept = ("id", "status", "queued_at", "scheduled_for", "attempt", "created_at", "updated_at")
    assert row(job) == values(build()) | {name: row(job)[name] for name in kept}
    assert (job.attempt, job.attempts.get().stdout) == (3, "out")


def test_ready_are_queued_and_due_jobs_in_claim_order_by_reading_alone(host: DockerHost, manager: QueueManager) -> None:
    old, new = (in_status(Status.QUEUED, host, queued_at=now() - timedelta(hours=hours)) for hours in (3, 1))
    due = in_status(Status.SCHEDULED, host, scheduled_for=now() - timedelta(hours=2))
    first = in_status(Status.SCHEDULED, host, scheduled_for=now(), priority=80)
    in_status(Status.SCHEDULED, host)
    before = list(ContainerJob.objects.values())

    assert manager.get_ready_jobs() == [first, old, due, new]
    assert manager.get_ready_jobs(limit=3) == [first, old, due]
    assert list(ContainerJob.objects.values()) == before


def test_the_metrics_count_each_status(host: DockerHost, manager: QueueManager) -> None:
    for status in Status:
        in_status(status, host, queued_at=now() - timedelta(minutes=1))
    in_status(Status.FAILED, host, reason="launch")

    metrics = manager.get_worker_metrics()

    counts = metrics.model_dump(exclude={"oldest_wait_seconds", "hosts"})
    assert counts == {
        "ready_now": 1, "scheduled_future": 1, "launching": 3, "running": 1, "failed": 2, "launch_failed": 1
    }  # fmt: skip
    assert [(load.name, load.alive) for load in metrics.hosts] == [("a", 4)]


@pytest.mark.parametrize(("status", "since"), [(Status.QUEUED, "queued_at"), (Status.SCHEDULED, "scheduled_for")])
def test_the_oldest_wait_is_the_longest(host: DockerHost, manager: QueueManager, status: Status, since: str) -> None:
    assert manager.get_worker_metrics().oldest_wait_seconds is None

    in_status(status, host, **{since: now() - timedelta(hours=1)})
    in_status(Status.QUEUED, host, queued_at=now())

    assert manager.get_worker_metrics().oldest_wait_seconds == pytest.approx(3600, abs=60)


@pytest.mark.parametrize(
    ("status", "fields", "end"),
    [
        (Status.LAUNCHING, {}, (Status.QUEUED, "", 0)),
        (Status.LAUNCHING, {"cancel_requested_at": now()}, (Status.CANCELLED, "cancelled", 1)),
        (Status.STARTING, {}, (Status.FAILED, "lost", 1)),
        (Status.RECOVERING, {"rerun_on_lost": True}, (Status.SCHEDULED, "", 1)),
        (Status.RUNNING, {}, (Status.FAILED, "lost", 1)),
        (Status.RUNNING, {"rerun_on_lost": True, "retry_count": 3}, (Status.FAILED, "lost", 1)),
        (Status.RUNNING, {"rerun_on_lost": True, "cancel_requested_at": now()}, (Status.CANCELLED, "cancelled", 1)),
    ],
)
def test_a_lost_hosts_jobs_end_each_in_its_way(
    host: DockerHost, manager: QueueManager, status: Status, fields: dict[str, Any], end: tuple[Status, str, int]
) -> None:
    job = in_status(status, host, **fields)

    [told] = manager.declare_host_lost(host)

    job.refresh_from_db()
    assert (job.status, job.reason, job.attempts.count()) == end
    assert (told.status, told.reason) == (job.status, job.reason or "lost")


def test_limits_are_written_only_when_they_change(database: str, manager: QueueManager) -> None:
    # PostgreSQL tells a row's last writer; SQLite, how many rows this connection has written.
    last_write = "xmin::text FROM container_manager_installation" if database == "postgres" else "total_changes()"
    limits, seen = Limits(total=3, hosts={"a": 1, "b": 0}), []

    for kept in (limits, limits, Limits(), Limits(), limits):
        manager.keep_limits(kept)
        with connection.cursor() as cursor:
            seen.append(cursor.execute(f"SELECT {last_write}").fetchone())

    assert (len(set(seen)), seen[0], seen[2]) == (3, seen[1], seen[3])
    assert Installation.load().tag_limits == limits
