"""A process that stalls in the middle of a call, while another does its work, and wakes: it changes nothing."""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, connections
from django.utils.timezone import now

from container_manager.exceptions import ContainerGone
from container_manager.models import ContainerJob, Reason, Status
from container_manager.queue import QueueManager
from tests.conftest import wait_until
from tests.fake_engine import FakeEngine, Fleet, launched, let_leases_end, one_round, queued, row


@pytest.fixture
def host(fleet: Fleet) -> FakeEngine:
    return fleet.add_host()


@pytest.fixture
def manager(fleet: Fleet) -> QueueManager:
    return QueueManager(fleet)


def at(host: FakeEngine, moment: str, do: Callable[[], Any]) -> None:
    """`do` happens while the next call of the step hangs: before or after its effect, as in `after create`."""
    when, step = moment.split()

    def meanwhile() -> None:
        do()
        connections.close_all()

    (host.before if when == "before" else host.after)(step, meanwhile)


def another_works(fleet: Fleet, rounds: int = 1) -> Callable[[], None]:
    """To everybody else the one that stalls looks dead."""

    def work() -> None:
        let_leases_end()
        for _ in range(rounds):
            one_round(QueueManager(fleet))

    return work


def left_by_a_dead_launcher(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    """Its container is created and recorded, and nobody knows whether it was started."""
    job = queued(manager)
    host.lose_answer("start", happens=False)
    manager.launch_next_batch()
    assert row(job).status == Status.STARTING
    let_leases_end()
    return job


@pytest.mark.parametrize(
    ("moment", "attempt"), [("before create", 2), ("after create", 2), ("before start", 2), ("after start", 1)]
)
def test_a_launcher_that_wakes_after_its_job_was_taken_over_changes_nothing(
    fleet: Fleet, host: FakeEngine, manager: QueueManager, moment: str, attempt: int
) -> None:
    job = queued(manager)
    seen: list[ContainerJob] = []
    at(host, moment, lambda: (another_works(fleet)(), seen.append(row(job))))

    batch = manager.launch_next_batch()

    assert (batch.launched, batch.failed_ids, len(host.starts)) == (0, (), 1)
    assert (row(job).status, row(job).attempt, row(job).retry_count) == (Status.RUNNING, attempt, 0)
    assert (row(job).container_id, row(job).claim_token) == (seen[0].container_id, seen[0].claim_token)


def test_a_container_that_is_created_too_late_is_collected_and_never_started(
    fleet: Fleet, host: FakeEngine, manager: QueueManager
) -> None:
    job = queued(manager)
    at(host, "before create", another_works(fleet))
    manager.launch_next_batch()
    assert sorted(container.state for container in host.containers.values()) == ["created", "running"]

    one_round(manager)

    assert list(host.containers) == [row(job).container_id]
    assert len(host.starts) == 1


@pytest.mark.parametrize("moment", ["before inspect", "after inspect", "before remove", "after remove"])
def test_a_recoverer_that_wakes_after_another_recovered_changes_nothing(
    fleet: Fleet, host: FakeEngine, manager: QueueManager, moment: str
) -> None:
    job = left_by_a_dead_launcher(host, manager)
    at(host, moment, another_works(fleet))

    one_round(manager)

    assert (row(job).status, row(job).attempt, row(job).launch_tries) == (Status.RUNNING, 2, 0)
    assert (list(host.containers), len(host.starts)) == ([row(job).container_id], 1)


@pytest.mark.parametrize("moment", ["before inspect", "after inspect", "before remove"])
def test_a_launcher_that_wakes_while_its_job_is_recovered_starts_it_once_and_it_is_adopted(
    host: FakeEngine, manager: QueueManager, moment: str
) -> None:
    job = left_by_a_dead_launcher(host, manager)
    container_id = row(job).container_id
    late = host.client()
    at(host, moment, lambda: late.start(container_id))

    one_round(manager)

    assert (row(job).status, row(job).attempt, row(job).container_id) == (Status.RUNNING, 1, container_id)
    assert (host.containers[container_id].state, len(host.starts)) == ("running", 1)


def test_the_last_look_at_a_container_and_its_removal_wait_for_no_other_jobs_row(
    fleet: Fleet, host: FakeEngine, manager: QueueManager
) -> None:
    jobs = [left_by_a_dead_launcher(host, QueueManager(fleet)) for _ in range(2)]
    late = host.client()
    slow: list[str] = []

    def be_slow_with_the_second(execute: Callable[..., Any], sql: str, params: Any, many: bool, context: Any) -> Any:
        if sql.startswith("UPDATE") and Status.RECOVERING in params[:1]:
            slow.append(sql)
            if len(slow) == 2:
                # The first one was looked at meanwhile; its launcher wakes, its program runs and ends.
                first = ContainerJob.objects.get(status=Status.RECOVERING)
                until = time.monotonic() + 2
                while not host.count("remove") and time.monotonic() < until:
                    time.sleep(0.01)
                with suppress(ContainerGone):
                    late.start(first.container_id)
                    host.end(first.container_id, 0)
        return execute(sql, params, many, context)

    with connection.execute_wrapper(be_slow_with_the_second):
        one_round(manager)

    assert len(slow) == 2
    assert [row(job).status for job in jobs] == [Status.RUNNING, Status.RUNNING]
    assert (len(host.starts), len(host.containers)) == (2, 2)


@pytest.mark.parametrize(("retried", "status"), [([], Status.FAILED), ([3], Status.RUNNING)], ids=["", "retried"])
@pytest.mark.parametrize(
    "moment", ["before inspect", "after inspect", "before read_log", "after read_log", "before remove"]
)
def test_two_harvesters_at_once_write_one_record(
    fleet: Fleet, host: FakeEngine, manager: QueueManager, moment: str, retried: list[int], status: Status
) -> None:
    job = launched(manager, retry_exit_codes=retried, max_retries=1)
    host.containers[job.container_id].stdout = b"once"
    host.end(job.container_id, 3)

    def another_harvests() -> None:
        one_round(QueueManager(fleet))
        if retried and moment != "before remove":
            # Its retry runs by the time that the first one wakes.
            ContainerJob.objects.scheduled().update(scheduled_for=now())
            one_round(QueueManager(fleet))

    at(host, moment, another_harvests)

    stats = one_round(manager)
    ContainerJob.objects.scheduled().update(scheduled_for=now())
    one_round(manager)

    first = job.attempts.get()
    assert (first.number, first.exit_code, first.stdout) == (1, 3, "once")
    assert (row(job).status, row(job).retry_count, stats.error_count) == (status, len(retried), 0)
    assert list(host.containers) == ([row(job).container_id] if retried else [])


def test_a_signal_that_comes_late_stops_no_later_attempt(fleet: Fleet, host: FakeEngine, manager: QueueManager) -> None:
    job = launched(manager)
    ContainerJob.objects.running().update(deadline_at=now() - timedelta(seconds=1))

    def it_ends_and_runs_anew() -> None:
        host.end(job.container_id, 0)
        one_round(QueueManager(fleet))
        manager.retry_job(row(job))
        one_round(QueueManager(fleet))

    at(host, "before signal", it_ends_and_runs_anew)

    one_round(manager)

    assert (row(job).status, row(job).attempt, row(job).stop_requested_at) == (Status.RUNNING, 2, None)
    assert host.containers[row(job).container_id].state == "running"


def resolve_slowly(reference: str) -> str:
    time.sleep(0.3)
    return "value"


@pytest.mark.parametrize(
    ("moment", "forbidden"), [("before create", "create"), ("before start", "start"), ("before remove", "remove")]
)
def test_whose_lease_is_nearly_over_causes_no_further_effect(
    host: FakeEngine, manager: QueueManager, settings: Any, moment: str, forbidden: str
) -> None:
    job = left_by_a_dead_launcher(host, manager) if forbidden == "remove" else queued(manager)
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {
        "LEASE_SECONDS": 0.2,
        "SECRET_RESOLVER": f"{__name__}.resolve_slowly",
    }
    before = host.count(forbidden)
    if forbidden == "create":
        ContainerJob.objects.update(secret_environment={"A": "reference"})
    else:
        # The call before it takes longer than the lease.
        host.after({"start": "create", "remove": "inspect"}[forbidden], lambda: time.sleep(0.3))

    one_round(manager)

    assert host.count(forbidden) == before
    assert row(job).status in (Status.LAUNCHING, Status.STARTING, Status.RECOVERING)

    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"LEASE_SECONDS": 90}
    wait_until(lambda: let_leases_end() or (one_round(manager) and row(job).status == Status.RUNNING))
    assert (len(host.starts), row(job).reason, row(job).retry_count) == (1, "", 0)


def test_a_late_word_of_an_attempt_that_is_over_is_not_believed(
    fleet: Fleet, host: FakeEngine, manager: QueueManager
) -> None:
    job = queued(manager)

    def it_is_lost_and_ends() -> None:
        another_works(fleet)()
        host.vanish(row(job).container_id)
        one_round(QueueManager(fleet))

    at(host, "after start", it_is_lost_and_ends)

    batch = manager.launch_next_batch()

    assert (batch.launched, row(job).status, row(job).reason) == (0, Status.FAILED, Reason.LOST)
    assert job.attempts.get().reason == Reason.LOST
