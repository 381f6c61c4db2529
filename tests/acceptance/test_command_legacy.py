"""`process_container_jobs` without `--queue-mode`: the flags and words of the older command."""

import json
import subprocess
from collections.abc import Callable
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection
from django.utils import timezone

from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import queue_manager
from container_manager.services import job_service
from tests.conftest import wait_until

from .conftest import Site

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pending(**fields: Any) -> ContainerJob:
    job: ContainerJob = ContainerJob.objects.create_job(**{"image": "busybox", "command": ["true"]} | fields)
    return job


def failed(site: Site, **fields: Any) -> ContainerJob:
    """A job whose image no Engine has."""
    job = site.queue(image="container-manager.invalid/none", pull_policy="never", **fields)
    queue_manager.launch_next_batch(5, 10, only=[job.pk])
    job.refresh_from_db()
    assert job.status == Status.FAILED
    return job


def running(site: Site, *command: str) -> ContainerJob:
    job = site.queue(*command)
    queue_manager.launch_next_batch(5, 10, only=[job.pk])
    job.refresh_from_db()
    assert job.status == Status.RUNNING
    return job


def scheduled(**delta: int) -> ContainerJob:
    return queue_manager.queue_job(pending(), schedule_for=timezone.now() + timedelta(**delta))


def test_nothing_found_is_said_with_exit_code_0_and_without_prefect(no_prefect: Run) -> None:
    done = no_prefect()

    assert (done.returncode, done.stdout, done.stderr) == (0, "No jobs found to process\n", "")


def test_an_unknown_job_id_is_named_on_stderr(no_prefect: Run) -> None:
    done = no_prefect("--job-id=123")

    assert (done.returncode, done.stdout, done.stderr) == (0, "No jobs found to process\n", "No job with id 123\n")


@pytest.mark.parametrize(
    "flag", ["--once", "--poll-interval=5", "--poll-interval=10", "--max-concurrent=2", "--max-concurrent=5"]
)
def test_a_flag_of_queue_mode_is_ignored_with_one_line_on_stderr(no_prefect: Run, flag: str) -> None:
    done = no_prefect(flag)

    assert (done.returncode, done.stdout) == (0, "No jobs found to process\n")
    assert done.stderr == f"{flag.split('=')[0]} has no effect without --queue-mode\n"


def test_a_default_that_is_given_by_name_is_ignored_as_well(site: Site) -> None:
    complaints = StringIO()
    call_command("process_container_jobs", poll_interval=10, max_concurrent=5, stdout=StringIO(), stderr=complaints)

    assert complaints.getvalue().splitlines() == [
        "--poll-interval has no effect without --queue-mode",
        "--max-concurrent has no effect without --queue-mode",
    ]


def test_nothing_found_is_an_object_in_json_too(no_prefect: Run) -> None:
    done = no_prefect("--job-id=123", "--json")

    assert (done.returncode, json.loads(done.stdout)) == (0, {"mode": "legacy", "processed": 0, "errors": []})
    assert done.stderr == "No jobs found to process\nNo job with id 123\n"


def test_a_dry_run_names_the_jobs_and_does_nothing(site: Site, no_prefect: Run) -> None:
    first, second = pending(name="first"), site.queue("true")
    before = list(ContainerJob.objects.order_by("pk").values())
    done = no_prefect("--status=pending", "--dry-run")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "Found 2 job(s) to process",
        f"Would process: Job {first.pk} (pending) - first",
        f"Would process: Job {second.pk} (queued) - job-{second.pk}",
    ]
    assert list(ContainerJob.objects.order_by("pk").values()) == before


def test_a_dry_run_in_json_has_what_is_next(site: Site, no_prefect: Run) -> None:
    job = pending(name="first")
    done = no_prefect("--status=pending", "--dry-run", "--json")

    assert json.loads(done.stdout) == {
        "mode": "dry-run", "next": [{"job_id": job.pk, "status": "pending", "name": "first"}],
    }  # fmt: skip
    assert done.stderr.splitlines()[-1] == f"Would process: Job {job.pk} (pending) - first"


def test_which_jobs_are_meant(site: Site) -> None:
    waiting = [pending(), site.queue("true"), scheduled(hours=-1)]
    scheduled(hours=1)
    alive = [running(site, "sleep", "60")]
    lost = [failed(site)]

    for status, jobs in (("pending", waiting), ("running", alive), (None, alive), ("failed", lost)):
        assert list(job_service.select(status=status)) == jobs
    assert list(job_service.select(job_id=lost[0].pk)) == lost


def test_no_arguments_mean_running_and_what_has_ended_is_harvested(site_with_api: Site) -> None:
    ended, alive = running(site_with_api, "true"), running(site_with_api, "sleep", "60")
    site_with_api.queue("true")
    done = site_with_api.run("--verbose")

    assert done.returncode == 0
    ended.refresh_from_db()
    alive.refresh_from_db()
    assert (ended.status, alive.status) == (Status.COMPLETED, Status.RUNNING)
    assert done.stdout.splitlines() == [
        "Found 2 job(s) to process",
        f"Processing job {ended.pk} (running)",
        f"Successfully processed job {ended.pk}: harvested: completed (exit_code)",
        f"Processing job {alive.pk} (running)",
        f"Successfully processed job {alive.pk}: is running",
        "Processed: 2 jobs, Errors: 0",
    ]


def test_pending_jobs_are_launched_while_a_slot_is_free_and_stay_queued_otherwise(site_with_api: Site) -> None:
    DockerHost.objects.update(max_concurrent_jobs=2)
    jobs = [pending(command=["sleep", "60"]), site_with_api.queue("sleep", "60"), scheduled(hours=-1)]
    done = site_with_api.run("--status=pending", "--verbose")

    assert done.returncode == 0
    statuses = list(ContainerJob.objects.order_by("pk").values_list("status", flat=True))
    assert statuses == [Status.RUNNING, Status.RUNNING, Status.QUEUED]
    assert f"Successfully processed job {jobs[0].pk}: launched" in done.stdout.splitlines()
    assert (
        f"Successfully processed job {jobs[2].pk}: stays queued: limit reached: max_concurrent_jobs of host local, "
        "2 of 2"
    ) in done.stdout.splitlines()


def test_a_failed_job_without_retries_left_is_an_error_by_status_and_anew_by_id(site_with_api: Site) -> None:
    job = failed(site_with_api, max_retries=0)
    by_status = site_with_api.run("--status=failed")

    assert by_status.returncode == 0
    assert by_status.stdout.splitlines() == [
        "Found 1 job(s) to process",
        f"Failed to process job {job.pk}: no retries left; process it with --job-id {job.pk} to run it anew",
        "Processed: 0 jobs, Errors: 1",
    ]
    ContainerJob.objects.filter(pk=job.pk).update(image="busybox")
    by_id = site_with_api.run(f"--job-id={job.pk}", "--json")

    job.refresh_from_db()
    assert job.status == Status.RUNNING
    assert json.loads(by_id.stdout) == {"mode": "legacy", "processed": 1, "errors": []}


def test_a_database_error_on_one_job_is_told_and_does_not_stop_the_rest(site_with_api: Site) -> None:
    bad, good = pending(), pending()
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE TRIGGER trouble BEFORE UPDATE ON container_manager_containerjob "
            f"WHEN OLD.id = {bad.pk} BEGIN SELECT RAISE(ABORT, 'disk trouble'); END"
        )
    done = site_with_api.run("--status=pending")

    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            "Found 2 job(s) to process",
            f"Error processing job {bad.pk}: disk trouble",
            "Processed: 1 jobs, Errors: 1",
        ],
    )
    good.refresh_from_db()
    assert good.status == Status.RUNNING


def test_with_fail_on_error_an_errored_job_makes_exit_code_3(site_with_api: Site) -> None:
    job = failed(site_with_api, max_retries=0)
    done = site_with_api.run("--status=failed", "--fail-on-error", "--json")

    assert done.returncode == 3
    assert json.loads(done.stdout)["errors"][0]["job_id"] == job.pk


def test_what_has_ended_or_is_scheduled_for_later_is_left_and_counts_as_processed(site_with_api: Site) -> None:
    done_before = running(site_with_api, "true")
    wait_until(lambda: queue_manager.look_after(done_before))
    later = scheduled(hours=1)
    completed = site_with_api.run(f"--job-id={done_before.pk}", "--verbose")
    left = site_with_api.run(f"--job-id={later.pk}", "--verbose")

    assert f"Successfully processed job {done_before.pk}: nothing to do: it is completed" in completed.stdout
    assert "Processed: 1 jobs, Errors: 0" in completed.stdout
    later.refresh_from_db()
    assert f"{later.pk}: left: it is scheduled for {later.scheduled_for:%Y-%m-%d %H:%M:%S}" in left.stdout
