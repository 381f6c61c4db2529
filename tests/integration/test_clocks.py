"""Whose clock counts: the database's, whatever a process believes; and which moments a time names."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.conf import settings as django_settings
from django.db.models.functions import Now

from container_manager.models import ContainerJob, Installation, JobAttempt, Status
from container_manager.queue import QueueManager
from tests.conftest import ROOT, database_url

HOUR = 3600
BERLIN = ZoneInfo("Europe/Berlin")


# On SQLite the database's clock is the machine's own.
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
@pytest.mark.parametrize("hours", [-1, 1])
def test_a_process_whose_clock_is_an_hour_wrong_decides_as_any_other(database: str, hours: int) -> None:
    environment = os.environ | {
        "DATABASE_URL": database_url(),
        "CONTAINER_MANAGER": json.dumps(django_settings.CONTAINER_MANAGER | {"RETRY_BASE_SECONDS": 600}),
    }

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.integration.skewed", str(hours * HOUR)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, timeout=60, check=True,
    )  # fmt: skip

    told = json.loads(done.stdout)
    assert told["skew"] == hours
    assert told["statuses"] == {
        "in time": Status.RUNNING,
        "past its deadline": Status.RUNNING,
        "stopped just now": Status.RUNNING,
        "launching": Status.LAUNCHING,
        "lease is over": Status.RUNNING,
        "due": Status.RUNNING,
        "later": Status.SCHEDULED,
        "retried": Status.SCHEDULED,
        "in a minute": Status.SCHEDULED,
    }
    assert (told["stopped"], told["signals"]) == (["past its deadline", "stopped just now"], ["SIGTERM"])
    assert (told["deadline"], told["work lease"]) == (60, False)
    assert (7.4 < told["waits"]["retried"] <= 12.5, told["waits"]["in a minute"]) == (True, 1.0)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (datetime(2031, 1, 1, 12, 0, 0, 1, tzinfo=UTC), datetime(2031, 1, 1, 12, 0, 0, 1, tzinfo=UTC)),
        (datetime(2031, 1, 1, 12, 0, 0, 999_999, tzinfo=UTC), datetime(2031, 1, 1, 12, 0, 0, 999_999, tzinfo=UTC)),
        # The hour that comes twice, and the one that does not come at all.
        (datetime(2031, 10, 26, 2, 30, fold=0, tzinfo=BERLIN), datetime(2031, 10, 26, 0, 30, tzinfo=UTC)),
        (datetime(2031, 10, 26, 2, 30, fold=1, tzinfo=BERLIN), datetime(2031, 10, 26, 1, 30, tzinfo=UTC)),
        (datetime(2031, 3, 30, 2, 30, tzinfo=BERLIN), datetime(2031, 3, 30, 1, 30, tzinfo=UTC)),
    ],
    ids=["first microsecond", "last", "first 2:30", "second 2:30", "no 2:30"],
)
def test_a_time_is_kept_to_the_microsecond_and_as_the_moment_that_it_names(
    database: str, given: datetime, meant: datetime
) -> None:
    job = QueueManager().queue_job(ContainerJob.objects.build(image="busybox"), schedule_for=given)

    assert ContainerJob.objects.get(pk=job.pk).scheduled_for == meant


def test_what_is_due_is_due_by_the_database_to_its_last_digit(database: str) -> None:
    base = Installation.now()
    jobs = []
    for step in range(300):
        job = ContainerJob.objects.build(image="busybox")
        job.status, job.scheduled_for = Status.SCHEDULED, base + timedelta(milliseconds=step)
        jobs.append(job)
    ContainerJob.objects.bulk_create(jobs)

    due = list(ContainerJob.objects.due().annotate(now=Now()).values_list("scheduled_for", "now"))
    rest = ContainerJob.objects.exclude(pk__in=ContainerJob.objects.due())
    rest = list(rest.annotate(now=Now()).values_list("scheduled_for", "now"))

    # SQLite's clock counts milliseconds, and what is due with one of them is due with the next.
    slack = timedelta(milliseconds=database == "sqlite")
    assert all(scheduled_for <= now for scheduled_for, now in due)
    assert all(scheduled_for + slack > now for scheduled_for, now in rest)


@pytest.mark.parametrize(
    ("started", "finished", "seconds"),
    [
        (timedelta(0), timedelta(seconds=1.5), 1.5),
        (timedelta(0), -timedelta(microseconds=620), 0.0),
        (None, timedelta(0), None),
        (timedelta(0), None, None),
    ],
)
def test_a_run_lasts_no_negative_time_and_one_that_never_began_none(
    started: Any, finished: Any, seconds: float | None
) -> None:
    moment = datetime(2031, 1, 1, tzinfo=UTC)
    attempt = JobAttempt(
        started_at=None if started is None else moment + started,
        finished_at=None if finished is None else moment + finished,
    )

    assert attempt.run_seconds == seconds
