"""A host that a person takes out of use, or that is away when something is due on it: what runs is looked after."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.utils.timezone import now

from container_manager.models import ContainerJob, DockerHost, Reason, Status
from container_manager.queue import QueueManager
from tests.fake_engine import FakeEngine, Fleet, launched, let_leases_end, one_round, queued, row


@pytest.fixture
def host(fleet: Fleet) -> FakeEngine:
    return fleet.add_host("old")


@pytest.fixture
def manager(fleet: Fleet) -> QueueManager:
    return QueueManager(fleet)


def drain() -> None:
    DockerHost.objects.filter(name="old").update(is_active=False)


def let_timeouts_end() -> None:
    ContainerJob.objects.update(deadline_at=now() - timedelta(seconds=1))


def run_out(host: FakeEngine, manager: QueueManager, job: ContainerJob) -> None:
    host.end(job.container_id, 0)


def be_cancelled(host: FakeEngine, manager: QueueManager, job: ContainerJob) -> None:
    manager.cancel_job(job)


def be_late(host: FakeEngine, manager: QueueManager, job: ContainerJob) -> None:
    let_timeouts_end()


def vanish(host: FakeEngine, manager: QueueManager, job: ContainerJob) -> None:
    host.vanish(job.container_id)


@pytest.mark.parametrize(
    ("befall", "status", "reason"),
    [
        (run_out, Status.COMPLETED, Reason.EXIT_CODE),
        (be_cancelled, Status.CANCELLED, Reason.CANCELLED),
        (be_late, Status.FAILED, Reason.TIMEOUT),
        (vanish, Status.FAILED, Reason.LOST),
    ],
)
def test_what_runs_on_a_drained_host_is_looked_after_to_its_end(
    host: FakeEngine, manager: QueueManager, befall: Callable[..., None], status: Status, reason: Reason
) -> None:
    job = launched(manager)
    drain()

    befall(host, manager, job)
    for _ in range(2):
        one_round(manager)

    assert (row(job).status, row(job).reason, host.containers) == (status, reason, {})


def test_a_drained_host_is_given_no_job_and_says_why_until_it_is_used_again(
    host: FakeEngine, manager: QueueManager
) -> None:
    running = launched(manager)
    drain()
    pinned, free = queued(manager, pinned_host=DockerHost.objects.get()), queued(manager)

    stats = one_round(manager)

    assert (stats.jobs_launched, stats.limit) == (0, "host old is not active")
    assert {row(job).status for job in (pinned, free)} == {Status.QUEUED}
    assert (row(running).status, len(host.starts)) == (Status.RUNNING, 1)
    DockerHost.objects.update(is_active=True)
    assert set(one_round(manager).job_ids) == {pinned.pk, free.pk}


def test_jobs_of_any_host_go_on_where_one_is_drained(fleet: Fleet, host: FakeEngine, manager: QueueManager) -> None:
    drain()
    fleet.add_host("new")
    jobs = [queued(manager) for _ in range(3)]

    one_round(manager)

    assert {row(job).slot_host.name for job in jobs} == {"new"}


def test_a_claim_that_was_left_on_a_drained_host_is_launched_elsewhere(
    fleet: Fleet, host: FakeEngine, manager: QueueManager
) -> None:
    job = queued(manager)
    host.lose_answer("start", happens=False)
    manager.launch_next_batch()
    drain()
    fleet.add_host("new")
    let_leases_end()

    one_round(manager)

    assert (row(job).status, row(job).slot_host.name, row(job).retry_count) == (Status.RUNNING, "new", 0)
    assert (host.starts, host.containers) == ([], {})


def test_a_drained_host_without_jobs_is_not_asked_for_anything(host: FakeEngine, manager: QueueManager) -> None:
    one_round(manager)
    drain()
    before = len(host.calls)

    one_round(manager)

    assert host.calls[before:] == []


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_what_is_to_be_stopped_on_a_host_that_is_away_is_stopped_once_it_is_back(
    host: FakeEngine, manager: QueueManager, is_cancelled: bool
) -> None:
    job = launched(manager)
    host.down()
    manager.cancel_job(job) if is_cancelled else let_timeouts_end()
    for _ in range(3):
        one_round(manager)
    assert (row(job).status, host.count("signal")) == (Status.RUNNING, 0)

    host.up()
    for _ in range(2):
        one_round(manager)

    end = (Status.CANCELLED, Reason.CANCELLED) if is_cancelled else (Status.FAILED, Reason.TIMEOUT)
    assert (row(job).status, row(job).reason, row(job).exit_code) == (*end, 143)


def test_jobs_for_any_host_are_spread_by_what_is_free_and_come_back_to_what_gets_free(
    fleet: Fleet, manager: QueueManager
) -> None:
    engines = {name: fleet.add_host(name, max_concurrent_jobs=slots) for name, slots in [("a", 4), ("b", 2), ("c", 1)]}
    jobs = [queued(manager) for _ in range(9)]

    one_round(manager)

    assert {name: len(engine.starts) for name, engine in engines.items()} == {"a": 4, "b": 2, "c": 1}
    engines["b"].end(next(iter(engines["b"].containers)), 0)
    one_round(manager)
    assert {name: len(engine.starts) for name, engine in engines.items()} == {"a": 4, "b": 3, "c": 1}
    assert [row(job).status for job in jobs][-1] == Status.QUEUED
