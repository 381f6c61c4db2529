"""What is tried again, how often and when, and what is not."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connections
from django.db.models.functions import Now

from container_manager.containers import INSTANCE_LABEL
from container_manager.exceptions import EngineError, EngineFailed, HostUnavailable, OutcomeUnknown
from container_manager.models import ContainerJob, Installation, Status
from container_manager.queue import QueueManager
from tests.conftest import wait_until
from tests.fake_engine import (
    FakeEngine,
    Fleet,
    launched,
    let_leases_end,
    one_round,
    queued,
    raising,
    row,
)


@pytest.fixture
def host(fleet: Fleet) -> FakeEngine:
    return fleet.add_host(max_concurrent_jobs=100)


@pytest.fixture
def manager(fleet: Fleet) -> QueueManager:
    return QueueManager(fleet)


def seconds_left(job: ContainerJob) -> float:
    scheduled_for, now = ContainerJob.objects.filter(pk=job.pk).values_list("scheduled_for", Now()).get()
    return (scheduled_for - now).total_seconds()


def let_waits_end() -> None:
    ContainerJob.objects.scheduled().update(scheduled_for=Now())


@pytest.mark.parametrize(("retry_count", "usual"), [(0, 10), (1, 20), (3, 80), (9, 900)])
def test_a_retry_waits_twice_as_long_as_the_one_before_with_jitter_up_to_a_bound(
    host: FakeEngine, manager: QueueManager, settings: Any, retry_count: int, usual: float
) -> None:
    settings.CONTAINER_MANAGER = {"RETRY_BASE_SECONDS": 10, "RETRY_MAX_SECONDS": 900}
    host.always("create", raising(EngineFailed("create: no space left")))
    jobs = [queued(manager, max_retries=20) for _ in range(8)]
    ContainerJob.objects.update(retry_count=retry_count)

    manager.launch_next_batch(100)

    waits = [seconds_left(job) for job in jobs]
    assert 0.75 * usual - 5 < min(waits) < max(waits) <= 1.25 * usual
    # They failed together, and don't come back together.
    assert len({round(wait, 2) for wait in waits}) > 4
    assert {row(job).retry_count for job in jobs} == {retry_count + 1}


Fault = Callable[[FakeEngine, QueueManager, ContainerJob], None]


def can_not_be_created(host: FakeEngine, manager: QueueManager, job: ContainerJob) -> None:
    host.before("create", raising(EngineFailed("create: no space left")))
    one_round(manager)


def can_not_be_started(host: FakeEngine, manager: QueueManager, job: ContainerJob) -> None:
    host.break_start(128, EngineFailed("start: a port is taken"))
    one_round(manager)


def exits_with_a_retried_code(host: FakeEngine, manager: QueueManager, job: ContainerJob) -> None:
    one_round(manager)
    host.end(row(job).container_id, 75)
    one_round(manager)


def vanishes(host: FakeEngine, manager: QueueManager, job: ContainerJob) -> None:
    one_round(manager)
    host.vanish(row(job).container_id)
    one_round(manager)


def dies_with_its_engine(host: FakeEngine, manager: QueueManager, job: ContainerJob) -> None:
    one_round(manager)
    host.crash()
    one_round(manager)


CHARGED = [can_not_be_created, can_not_be_started, exits_with_a_retried_code, vanishes, dies_with_its_engine]


@pytest.mark.parametrize("fault", CHARGED)
@pytest.mark.parametrize("max_retries", [0, 2])
def test_a_job_gets_max_retries_tries_after_its_first_whatever_befalls_it(
    host: FakeEngine, manager: QueueManager, max_retries: int, fault: Fault
) -> None:
    job = queued(manager, max_retries=max_retries, retry_exit_codes=[75], rerun_on_lost=True)

    tries = 0
    while row(job).status != Status.FAILED:
        tries += 1
        fault(host, manager, job)
        let_waits_end()

    assert (tries, job.attempts.count(), row(job).retry_count) == (max_retries + 1, max_retries + 1, max_retries)
    assert row(job).reason == job.attempts.last().reason
    one_round(manager)
    assert (row(job).status, manager.get_ready_jobs()) == (Status.FAILED, [])


def test_an_explicit_retry_gives_all_tries_anew(host: FakeEngine, manager: QueueManager) -> None:
    job = queued(manager, max_retries=1)
    for _ in range(2):
        can_not_be_created(host, manager, job)
        let_waits_end()
    assert row(job).status == Status.FAILED

    manager.retry_job(job)
    can_not_be_created(host, manager, job)

    assert (row(job).status, row(job).retry_count, job.attempts.count()) == (Status.SCHEDULED, 1, 3)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("create", HostUnavailable("create: connection refused")),
        ("create", OutcomeUnknown("create: timed out")),
        ("start", OutcomeUnknown("start: 503")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_the_hosts_fault_costs_no_retry(
    host: FakeEngine, manager: QueueManager, step: str, error: EngineError
) -> None:
    job = queued(manager, max_retries=0)
    host.before(step, raising(error))
    one_round(manager)
    let_leases_end()

    wait_until(lambda: one_round(manager) and row(job).status == Status.RUNNING)

    assert (row(job).retry_count, row(job).launch_tries, row(job).last_error) == (0, 0, "")
    assert len(host.starts) == 1


@pytest.mark.parametrize(
    ("fields", "code", "oom_killed"),
    [({}, 1, False), ({}, 137, True), ({"retry_exit_codes": [75]}, 74, False), ({"retry_exit_codes": [75]}, 137, True)],
)
def test_a_program_that_fails_is_not_run_again_unless_its_code_is_named(
    host: FakeEngine, manager: QueueManager, fields: dict[str, Any], code: int, oom_killed: bool
) -> None:
    job = launched(manager, **fields)
    host.end(job.container_id, code, oom_killed=oom_killed)

    one_round(manager)

    assert (row(job).status, row(job).exit_code, row(job).retry_count) == (Status.FAILED, code, 0)


def test_a_start_that_fails_with_an_engine_that_then_says_nothing_is_left_to_recovery(
    host: FakeEngine, manager: QueueManager
) -> None:
    job = queued(manager, max_retries=0)
    host.before("start", raising(EngineFailed("start: internal error")))
    host.before("inspect", raising(EngineFailed("inspect: internal error")))

    batch = manager.launch_next_batch()

    assert (batch.failed_ids, row(job).status, row(job).retry_count) == ((), Status.STARTING, 0)
    let_leases_end()
    one_round(manager)
    assert (row(job).status, len(host.starts)) == (Status.RUNNING, 1)


def test_an_engine_that_starts_a_container_and_says_that_it_failed_is_not_believed(
    host: FakeEngine, manager: QueueManager
) -> None:
    job = queued(manager)
    host.after("start", raising(EngineFailed("start: internal error")))

    batch = manager.launch_next_batch()

    assert (batch.job_ids, row(job).status, len(host.starts)) == ((job.pk,), Status.RUNNING, 1)


def test_its_own_unstarted_container_of_that_name_is_used(host: FakeEngine, manager: QueueManager) -> None:
    job = queued(manager)

    def the_engine_has_done_it_already() -> None:
        [claimed] = ContainerJob.objects.filter(status=Status.LAUNCHING)
        instance_id = Installation.load().instance_id
        labels = {
            INSTANCE_LABEL: instance_id,
            "container-manager.job": str(claimed.pk),
            "container-manager.attempt": "1",
            "container-manager.token": claimed.claim_token,
        }
        host.create(f"cm-{instance_id}-{claimed.pk}-1", claimed.validated_spec(), {}, labels)
        connections.close_all()

    host.before("create", the_engine_has_done_it_already)

    batch = manager.launch_next_batch()

    assert (batch.job_ids, len(host.containers), len(host.starts)) == ((job.pk,), 1, 1)
