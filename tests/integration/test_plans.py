"""The statements that run on every pass and every page find their rows by an index, however many others there are."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection
from django.test import Client

from container_manager.cancelling import cancel_with_runs
from container_manager.claiming import claim, promote_due, ready_jobs
from container_manager.models import ContainerJob, DockerHost, JobAttempt, Status
from container_manager.queue import QueueManager
from container_manager.rounds import has_ready
from container_manager.types import Limits
from tests.benchmarks import rows
from tests.fake_engine import Fleet

MANY = 5_000
JOBS, ATTEMPTS = ContainerJob._meta.db_table, JobAttempt._meta.db_table
PAGE = "/admin/container_manager/containerjob/"
DASHBOARD = f"{PAGE}dashboard/"


@pytest.fixture
def manager(fleet: Fleet) -> QueueManager:
    return QueueManager(fleet)


@pytest.fixture
def full_table(database: str, fleet: Fleet) -> DockerHost:
    """Many rows of each kind, and a few alive ones; the free host."""
    fleet.add_host("free", max_concurrent_jobs=100)
    fleet.add_host("full", max_concurrent_jobs=0)
    free, full = DockerHost.objects.order_by("name")
    # Most of a queue's rows are of the past.
    rows.copies(4 * MANY, status="'completed'")
    rows.copies(MANY, status="'queued'", queued_at=rows.moment("-n"), priority="n %% 101")
    rows.copies(MANY, status="'queued'", queued_at=rows.moment("-n"), pinned_host_id=str(full.pk))
    rows.copies(MANY, status="'scheduled'", scheduled_for=rows.moment("3600 + n"))
    rows.copies(50, status="'scheduled'", scheduled_for=rows.moment("-n"))
    rows.copies(50, status="'failed'", reason="'launch'")
    rows.copies(MANY, status="'completed'", flow_run_id="'told'", finished_at=rows.moment("-n"))
    rows.copies(2, status="'queued'", queued_at=rows.moment("-n"), flow_run_id="'awaited'")
    alive = {"slot_host_id": str(free.pk), "attempt": "1"}
    rows.copies(
        20,
        status="'running'",
        container_id="n",
        deadline_at=rows.moment("-n"),
        launched_at=rows.moment("-100"),
        **alive,
    )
    rows.copies(20, status="'launching'", claimed_until=rows.moment("-n"), claimed_by="'gone'", **alive)
    rows.analyze()
    return free


def plans(verb: Callable[[], object]) -> dict[str, str]:
    """Each statement on jobs that the verb runs: what the database says of how it finds its rows."""
    explain = "EXPLAIN " if connection.vendor == "postgresql" else "EXPLAIN QUERY PLAN "
    found: dict[str, str] = {}

    def note(execute: Any, sql: str, parameters: Any, *rest: Any) -> Any:
        if JOBS in sql and sql.startswith(("SELECT", "UPDATE", "DELETE")):
            # With its own parameters: a partial index is of use only if they match its condition.
            with connection.cursor() as cursor:
                cursor.cursor.execute(explain + sql, parameters)
                found[sql] = "\n".join(str(line[-1]) for line in cursor.cursor.fetchall())
        return execute(sql, parameters, *rest)

    with connection.execute_wrapper(note):
        verb()
    assert found, "no statement was seen"
    return found


def without_index(found: dict[str, str]) -> list[str]:
    """The statements that walk the whole table. SQLite's `SCAN … USING INDEX` of a partial index does not."""
    walks = (f"Seq Scan on {JOBS}", f"SCAN {JOBS}")
    return [
        f"{sql}\n{plan}"
        for sql, plan in found.items()
        if any(any(walk in line for walk in walks) and "USING" not in line for line in plan.splitlines())
    ]


def indexes(found: dict[str, str]) -> set[str]:
    return set(re.findall(r"cm_job_\w+", " ".join(found.values())))


def test_passes_find_their_rows_by_indexes(full_table: DockerHost, manager: QueueManager) -> None:
    ready, read = plans(has_ready), plans(lambda: ready_jobs(10))
    promoted = plans(lambda: promote_due(until=0))
    claimed = plans(lambda: claim(1000, {full_table.pk}, limit=10))
    passed = plans(lambda: manager.process_queue_continuous(1, 1, work_seconds=0))
    awaited = plans(lambda: cancel_with_runs(lambda run_ids: run_ids))

    assert [*map(without_index, (ready, read, promoted, claimed, passed, awaited))] == [[], [], [], [], [], []]
    assert "cm_job_promote" in indexes(promoted)
    assert indexes(claimed) >= {"cm_job_claim_any", "cm_job_slots"}
    assert indexes(passed) >= {"cm_job_leases", "cm_job_slots"}
    assert "cm_job_awaited" in indexes(awaited)


def test_pinned_jobs_are_claimed_by_an_index_of_their_own(full_table: DockerHost) -> None:
    rows.copies(MANY, status="'queued'", queued_at=rows.moment("-n"), pinned_host_id=str(full_table.pk))
    rows.analyze()

    found = plans(lambda: claim(1000, {full_table.pk}, limit=10))

    assert without_index(found) == []
    assert "cm_job_claim_pinned" in indexes(found)


def test_metrics_and_pages_find_their_rows_by_indexes(
    full_table: DockerHost, manager: QueueManager, client: Client
) -> None:
    walks = without_index(plans(manager.get_worker_metrics))
    for status in Status:
        found = plans(lambda status=status: client.get(f"{PAGE}?status__exact={status}"))
        # Most rows have this one: the page walks to as many as it shows.
        walks += without_index(found) if status != Status.COMPLETED else []
    job_ids = ContainerJob.objects.running().values_list("pk", flat=True)
    JobAttempt.objects.bulk_create(
        [JobAttempt(job_id=pk, number=number, reason="exit_code") for pk in job_ids for number in range(200)]
    )
    rows.analyze()
    dashboard = plans(lambda: client.get(DASHBOARD))
    queued = ContainerJob.objects.queued()
    last = [queued.filter(pinned_host__isnull=is_anywhere).in_claim_order().last() for is_anywhere in (True, False)]
    waits = [plans(lambda job=job: manager.why_waiting(job)) for job in last]
    # When nothing is free, those that are pinned to any active host are counted.
    manager.keep_limits(Limits(total=0))
    waits.append(plans(lambda: manager.why_waiting(last[0])))

    assert [*map(without_index, (*waits, dashboard)), walks] == [[], [], [], [], []]
    [ended] = [plan for sql, plan in dashboard.items() if ATTEMPTS in sql]
    assert "Sort" not in ended
    assert "TEMP B-TREE" not in ended
    assert "cm_job_claim_any" in indexes(waits[0])
    assert [indexes(found) >= {"cm_job_claim_any", "cm_job_claim_pinned"} for found in waits[1:]] == [True, True]


def test_the_page_of_all_jobs_walks_their_ids(full_table: DockerHost, client: Client) -> None:
    found = plans(lambda: client.get(PAGE))

    rows_shown = next(plan for sql, plan in found.items() if "COUNT(" not in sql)
    assert "Sort" not in rows_shown
    assert "TEMP B-TREE" not in rows_shown
