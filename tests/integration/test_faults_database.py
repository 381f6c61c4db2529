"""A database that ends connections, goes away or keeps its lock in the middle of a pass: the next one repairs it."""

import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from django.db import OperationalError, connection, connections
from django.db.utils import Error as DatabaseError
from django.utils.timezone import now

from container_manager.models import ContainerJob, DockerHost, Installation, Status
from container_manager.queue import QueueManager
from tests.conftest import free_port, wait_until
from tests.fake_engine import (
    FakeEngine,
    Fleet,
    in_background,
    launched,
    let_leases_end,
    one_round,
    queued,
    row,
)
from tests.integration.conftest import another_transaction

on_postgres = pytest.mark.parametrize("database", ["postgres"], indirect=True)


@pytest.fixture
def host(fleet: Fleet) -> FakeEngine:
    return fleet.add_host()


@pytest.fixture
def manager(fleet: Fleet) -> QueueManager:
    return QueueManager(fleet)


def end_connections() -> None:
    """The server ends all that there are to the tests' database, which is nobody else's."""
    with connection.cursor() as cursor:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        cursor.execute(f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {others}")
        assert cursor.fetchone()[0] >= 1
    connections.close_all()


@on_postgres
@pytest.mark.parametrize("step", ["identify", "list", "create", "start", "inspect", "read_log", "remove"])
def test_a_connection_that_the_server_ends_within_a_pass_costs_no_job_and_the_next_pass_works(
    host: FakeEngine, manager: QueueManager, step: str
) -> None:
    ended, waiting = launched(manager), queued(manager)
    host.containers[ended.container_id].stdout = b"kept"
    host.end(ended.container_id, 3)
    host.before(step, end_connections)

    with suppress(DatabaseError):
        one_round(manager)
    one_round(manager)
    let_leases_end()
    wait_until(lambda: one_round(manager) and row(waiting).status == Status.RUNNING)

    attempt = ended.attempts.get()
    assert (row(ended).status, attempt.exit_code, attempt.stdout) == (Status.FAILED, 3, "kept")
    assert (list(host.containers), len(host.starts)) == ([row(waiting).container_id], 2)


@on_postgres
def test_a_database_that_is_away_when_a_result_is_written_gets_it_later(
    host: FakeEngine, manager: QueueManager
) -> None:
    job = launched(manager)
    host.end(job.container_id, 0)
    usual = connection.settings_dict["PORT"]

    def go_away() -> None:
        end_connections()
        connection.settings_dict["PORT"] = str(free_port())

    host.after("read_log", lambda: None, go_away)

    try:
        with pytest.raises(OperationalError):
            one_round(manager)
        with pytest.raises(OperationalError):
            one_round(manager)
        assert list(host.containers) == [job.container_id]
    finally:
        connection.settings_dict["PORT"] = usual
    one_round(manager)

    assert (row(job).status, job.attempts.count(), host.containers) == (Status.COMPLETED, 1, {})


def test_a_lock_that_another_keeps_while_a_result_is_written_delays_it(
    host: FakeEngine, manager: QueueManager, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = launched(manager)
    host.end(job.container_id, 0)
    patience = {"timeout": 0.1} if database == "sqlite" else {"options": "-c lock_timeout=100ms"}
    usual = connection.settings_dict["OPTIONS"]
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", usual | patience)
    connection.close()

    with another_transaction(lambda: ContainerJob.objects.update(updated_at=now())):
        with pytest.raises(OperationalError):
            one_round(manager)
        assert list(host.containers) == [job.container_id]
    one_round(manager)

    assert (row(job).status, job.attempts.count(), host.containers) == (Status.COMPLETED, 1, {})


@on_postgres
@pytest.mark.parametrize("statement", ['INSERT INTO "container_manager_jobattempt"', "SET \"status\" = 'launching'"])
def test_a_process_that_stalls_within_a_transaction_loses_it_with_its_lease(
    fleet: Fleet, host: FakeEngine, manager: QueueManager, settings: Any, statement: str
) -> None:
    ended, waiting = launched(manager), queued(manager)
    host.end(ended.container_id, 0)
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"LEASE_SECONDS": 1}
    has_stalled, may_wake = threading.Event(), threading.Event()

    def stall_after(execute: Any, sql: str, *arguments: Any) -> Any:
        result = execute(sql, *arguments)
        if statement in connection.ops.last_executed_query(arguments[2]["cursor"], sql, arguments[0]):
            has_stalled.set()
            may_wake.wait(60)
        return result

    def stall(stop: Any) -> None:
        with connection.execute_wrapper(stall_after), suppress(DatabaseError):
            one_round(QueueManager(fleet))

    with in_background(stall):
        assert has_stalled.wait(10)

        wait_until(lambda: one_round(manager) and row(waiting).status == Status.RUNNING)

        may_wake.set()
    assert (row(ended).status, ended.attempts.count()) == (Status.COMPLETED, 1)
    assert (row(waiting).container_id, len(host.starts)) == (next(iter(host.containers)), 2)


@on_postgres
def test_a_host_that_somebody_edits_holds_up_neither_the_others_nor_its_own_jobs(
    fleet: Fleet, manager: QueueManager
) -> None:
    fleet.add_host("edited", max_concurrent_jobs=1)
    fleet.add_host("other", max_concurrent_jobs=1)
    one_round(manager)
    DockerHost.objects.update(last_seen_at=None)
    jobs = [queued(manager) for _ in range(2)]

    with another_transaction(lambda: DockerHost.objects.filter(name="edited").update(max_concurrent_jobs=5)):
        begin = time.monotonic()
        stats = one_round(manager)
        took = time.monotonic() - begin

    assert (sorted(stats.job_ids), took < 10) == ([job.pk for job in jobs], True)
    assert {row(job).slot_host.name for job in jobs} == {"edited", "other"}
    one_round(manager)
    assert not DockerHost.objects.filter(last_seen_at=None).exists()


@on_postgres
def test_a_claim_takes_no_more_than_it_may_under_any_plan(fleet: Fleet, manager: QueueManager) -> None:
    fleet.add_host(max_concurrent_jobs=100)
    Installation.load()
    build = ContainerJob.objects.build
    manager.queue_jobs([build(image="busybox") for _ in range(200)])
    later = [manager.queue_job(build(image="busybox"), schedule_for=now()) for _ in range(5)]
    with connection.cursor() as cursor:
        for plan in ("hashjoin", "mergejoin", "seqscan", "bitmapscan", "hashagg", "material", "sort"):
            cursor.execute(f"SET enable_{plan} = off")

    try:
        taken = manager.claim(5)
    finally:
        connection.close()

    assert (len(taken), ContainerJob.objects.alive().count()) == (5, 5)
    assert ContainerJob.objects.queued().count() == 195 + len(later)
