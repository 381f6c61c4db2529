"""Why a job does not run yet: one sentence, by what the database knows."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils.timezone import localtime, now

from container_manager.claiming import claim
from container_manager.leases import WorkLease
from container_manager.models import ALIVE, ENDED, ContainerJob, DockerHost, Installation, Status
from container_manager.outlook import MOST_BEFORE
from container_manager.queue import QueueManager
from container_manager.types import Limits
from tests.benchmarks import rows
from tests.fake_engine import Fleet, Gate, queued, row

READY = "ready for the next pass, unless its max_concurrent is reached"


@pytest.fixture
def host(database: str) -> DockerHost:
    """One that a pass has just reached."""
    return DockerHost.objects.create(name="a", max_concurrent_jobs=2, last_seen_at=now())


def in_status(status: Status, host: DockerHost | None = None, **fields: Any) -> ContainerJob:
    job = ContainerJob.objects.create_job(image="busybox")
    ContainerJob.objects.filter(pk=job.pk).update(
        status=status, slot_host=host if status in ALIVE else None, **{"queued_at": now()} | fields
    )
    job.refresh_from_db()
    return job


def change(host: DockerHost, **fields: Any) -> None:
    DockerHost.objects.filter(pk=host.pk).update(**fields)


def clock(at: Any) -> str:
    return f"{localtime(at):%Y-%m-%d %H:%M:%S}"


def test_a_job_that_waits_for_its_time_says_for_which(host: DockerHost, manager: QueueManager) -> None:
    later = now() + timedelta(hours=1)
    pending, scheduled = in_status(Status.PENDING), in_status(Status.SCHEDULED, scheduled_for=later)
    retry = in_status(Status.SCHEDULED, scheduled_for=later, last_error="exited with code 75")

    assert manager.why_waiting(pending) == "not queued yet"
    assert manager.why_waiting(scheduled) == f"scheduled for {clock(later)}"
    assert manager.why_waiting(retry) == f"waits until {clock(later)} for its next try: exited with code 75"


@pytest.mark.parametrize("status", [Status.RUNNING, *ENDED])
def test_a_job_that_runs_or_has_ended_waits_for_nothing(
    host: DockerHost, manager: QueueManager, status: Status
) -> None:
    assert manager.why_waiting(in_status(status, host, last_error="e")) == ""


def test_a_job_whose_image_is_pulled_is_not_said_to_have_been_tried(fleet: Fleet) -> None:
    manager, gate = QueueManager(fleet), Gate()
    machine = fleet.add_host("a")
    machine.images.clear()
    machine.before("pull", gate)
    job = queued(manager)

    manager.launch_next_batch(1)
    told = manager.why_waiting(row(job))
    gate.open()

    assert told == "waiting for host a to pull busybox"


def test_a_job_that_is_ready_is_said_to_be_ready(host: DockerHost, manager: QueueManager) -> None:
    due = in_status(Status.SCHEDULED, scheduled_for=now() - timedelta(seconds=1))
    ready = in_status(Status.QUEUED)

    assert manager.why_waiting(due) == "due: the next pass queues it"
    assert manager.why_waiting(ready) == f"first in line; {READY} (0 alive now)"


def test_a_job_that_was_given_back_says_what_its_last_try_met(host: DockerHost, manager: QueueManager) -> None:
    job = in_status(Status.QUEUED, last_error="create: refused")

    assert manager.why_waiting(job).endswith("; the last try: create: refused")


def test_the_limit_that_binds_is_named(host: DockerHost, manager: QueueManager) -> None:
    alive, job = in_status(Status.RUNNING, host), in_status(Status.QUEUED)
    manager.keep_limits(Limits(total=1))
    by_tag = manager.why_waiting(job)
    manager.keep_limits(Limits(hosts={"a": 1}))
    by_tag_of_host = manager.why_waiting(job)
    manager.keep_limits(Limits())
    change(host, max_concurrent_jobs=1)
    by_host = manager.why_waiting(job)

    assert alive.status == Status.RUNNING
    assert by_tag == "first in line; waits for a slot: limit reached: tag container-job, 1 of 1"
    assert by_tag_of_host == "first in line; waits for a slot: limit reached: tag docker-host:a, 1 of 1"
    assert by_host == "first in line; waits for a slot: limit reached: max_concurrent_jobs of host a, 1 of 1"


def test_a_pinned_job_is_told_what_is_with_its_host(host: DockerHost, manager: QueueManager) -> None:
    DockerHost.objects.create(name="b", last_seen_at=now())
    job, seen_at = in_status(Status.QUEUED, pinned_host=host), now() - timedelta(hours=2)

    change(host, is_active=False)
    drained = manager.why_waiting(job)
    change(host, is_active=True, max_concurrent_jobs=0)
    full = manager.why_waiting(job)
    change(host, last_error="connection refused", last_seen_at=seen_at)
    away = manager.why_waiting(job)

    assert drained == "first in line; waits for its host: host a is not active"
    assert full == "first in line; waits for its host: limit reached: max_concurrent_jobs of host a, 0 of 0"
    why = f"host a is not reachable, not seen since {clock(seen_at)}"
    assert away == f"first in line; waits for its host: {why}"


def test_a_queue_without_a_host_says_so(database: str, manager: QueueManager) -> None:
    assert "there is no Docker host: add one" in manager.why_waiting(in_status(Status.QUEUED))


def test_a_queue_that_no_pass_looks_after_says_so_until_one_is_at_work(host: DockerHost, manager: QueueManager) -> None:
    job, seen_at = in_status(Status.QUEUED), now() - timedelta(hours=1)

    change(host, last_seen_at=None)
    never = manager.why_waiting(job)
    change(host, last_seen_at=seen_at)
    long_ago = manager.why_waiting(job)
    WorkLease().acquire()
    at_work = manager.why_waiting(job)

    assert never.endswith("; no pass was ever seen")
    assert long_ago.endswith(f"; no pass has been seen since {clock(seen_at)}")
    assert at_work == f"first in line; {READY} (0 alive now)"


def test_the_place_in_line_is_the_claims_order(host: DockerHost, manager: QueueManager) -> None:
    other = DockerHost.objects.create(name="b", last_seen_at=now())
    old = now() - timedelta(hours=1)
    jobs = [
        in_status(Status.QUEUED, queued_at=queued_at, priority=priority, pinned_host=pinned)
        for queued_at in (now(), old, old)
        for priority in (20, 50)
        for pinned in (None, host, other)
    ]
    told = {job.pk: manager.why_waiting(job).split(";")[0] for job in jobs if job.pinned_host is None}

    change(host, max_concurrent_jobs=100)
    order = [job.pk for job in claim(1000, {host.pk, other.pk}).jobs]

    for pk, words in told.items():
        place = order.index(pk)
        assert words == ("first in line" if not place else f"{place} job{'' if place == 1 else 's'} before it")


def test_a_long_line_is_counted_no_further_than_it_matters(host: DockerHost, manager: QueueManager) -> None:
    rows.copies(MOST_BEFORE + 5, status="'queued'", queued_at=rows.moment("-n"))

    told = manager.why_waiting(in_status(Status.QUEUED))

    assert told.startswith(f"at least {MOST_BEFORE} jobs before it; ")


def test_jobs_that_are_pinned_elsewhere_stand_in_another_line(host: DockerHost, manager: QueueManager) -> None:
    other = DockerHost.objects.create(name="b", last_seen_at=now(), max_concurrent_jobs=0)
    for pinned in (host, other, other, None):
        in_status(Status.QUEUED, pinned_host=pinned)
    anywhere, pinned_there = in_status(Status.QUEUED), in_status(Status.QUEUED, pinned_host=other)

    assert manager.why_waiting(anywhere).startswith("2 jobs before it; waits for a slot")
    assert manager.why_waiting(pinned_there).startswith("4 jobs before it; waits for its host")


def test_only_as_many_are_ready_as_a_claim_would_take(host: DockerHost, manager: QueueManager) -> None:
    DockerHost.objects.create(name="b", last_seen_at=now(), max_concurrent_jobs=3)
    jobs = [in_status(Status.QUEUED, pinned_host=host if number % 2 else None) for number in range(12)]
    outlook = manager.outlook()

    ready = {job.pk for job in jobs if outlook.why(job).startswith("ready")}
    last = manager.why_waiting(jobs[-2])
    hosts = set(DockerHost.objects.values_list("pk", flat=True))

    assert last.startswith("10 jobs before it; waits for a slot: max_concurrent_jobs of host a, 2; max_concurrent_jobs")
    assert ready == {job.pk for job in claim(1000, hosts).jobs}


def test_a_pinned_job_waits_for_a_slot_of_its_host_while_others_have_some(
    host: DockerHost, manager: QueueManager
) -> None:
    DockerHost.objects.create(name="b", last_seen_at=now(), max_concurrent_jobs=9)
    manager.keep_limits(Limits(total=5))
    jobs = [in_status(Status.QUEUED, pinned_host=host) for _ in range(3)]

    assert manager.why_waiting(jobs[-1]) == "2 jobs before it; waits for a slot on host a"


def test_jobs_that_are_pinned_to_a_drained_host_are_before_no_other(host: DockerHost, manager: QueueManager) -> None:
    drained = DockerHost.objects.create(name="b", is_active=False)
    for pinned in (drained, drained, host):
        in_status(Status.QUEUED, pinned_host=pinned)
    manager.keep_limits(Limits(total=0))

    assert manager.why_waiting(in_status(Status.QUEUED)).startswith("1 job before it; waits for a slot")


def test_the_line_is_told_however_many_hosts_there_are(database: str, manager: QueueManager) -> None:
    hosts = DockerHost.objects.bulk_create(
        DockerHost(name=f"h{number}", last_seen_at=now(), max_concurrent_jobs=1) for number in range(600)
    )
    for number in (0, -1):
        in_status(Status.QUEUED, pinned_host=hosts[number])

    assert manager.why_waiting(in_status(Status.QUEUED)) == f"2 jobs before it; {READY} (0 alive now)"


def test_a_job_in_a_processs_hands_says_whose_and_when_another_takes_over(
    host: DockerHost, manager: QueueManager
) -> None:
    held = in_status(Status.LAUNCHING, host, claimed_by="w:1", claimed_until=now() + timedelta(minutes=1))
    until = now() - timedelta(minutes=1)
    left = in_status(Status.STARTING, host, claimed_by="w:2", claimed_until=until)

    assert manager.why_waiting(held) == "launching on host a, by process w:1"
    assert manager.why_waiting(left) == (
        f"starting on host a; process w:2 has not come back by {clock(until)}: the next pass that reaches the host"
        " takes over"
    )


def test_looking_writes_nothing_and_costs_the_same_for_many(host: DockerHost, manager: QueueManager) -> None:
    Installation.objects.all().delete()
    jobs = [in_status(Status.QUEUED) for _ in range(20)]

    with CaptureQueriesContext(connection) as queries:
        outlook = manager.outlook()
        told = [outlook.why(job) for job in jobs]

    assert told == [f"{READY} (0 alive now)"] * 2 + ["waits for a slot: max_concurrent_jobs of host a, 2"] * 18
    assert [query["sql"].split()[0] for query in queries] == ["SELECT"] * 4
    assert not Installation.objects.exists()
