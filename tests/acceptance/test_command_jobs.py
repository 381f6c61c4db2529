"""Legacy mode, status by status and under the caps of queue mode; each test a sentence of its contract."""

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

from container_manager.containers import container_name
from container_manager.engine import DockerEngine
from container_manager.models import ContainerJob, DockerHost, Installation, Status
from container_manager.queue import queue_manager
from container_manager.types import ContainerSpec
from tests.conftest import wait_until

from .conftest import Site


def left_by_a_launcher(site: Site, status: Status, *, is_lease_over: bool) -> ContainerJob:
    """A job that a process was at when it died, or still is."""
    host = DockerHost.objects.get()
    job = site.queue("true")
    container_id = None
    if status != Status.LAUNCHING:
        instance = Installation.load().instance_id
        values = {"instance": instance, "job": str(job.pk), "attempt": "1", "token": "theirs"}
        container_id = DockerEngine(host.address, timeout=20).create(
            container_name(instance, job.pk, 1),
            ContainerSpec(image="busybox", command=["true"]),
            environment={},
            labels={f"container-manager.{name}": value for name, value in values.items()},
            hardening=host.hardening,
        )
    until = timezone.now() + timedelta(seconds=-1 if is_lease_over else 600)
    ContainerJob.objects.filter(pk=job.pk).update(
        status=status, slot_host=host, attempt=1, claim_token="theirs", claimed_by="them:1", claimed_until=until,
        container_id=container_id, deadline_at=timezone.now() + timedelta(hours=1),
    )  # fmt: skip
    return job


@pytest.mark.parametrize("status", [Status.LAUNCHING, Status.STARTING, Status.RECOVERING])
def test_what_a_launcher_holds_is_recovered_if_the_lease_is_over_and_left_otherwise(
    site_with_api: Site, status: Status
) -> None:
    held = left_by_a_launcher(site_with_api, status, is_lease_over=False)
    over = left_by_a_launcher(site_with_api, status, is_lease_over=True)
    # No arguments: what is alive.
    done = site_with_api.run("--verbose")

    assert done.returncode == 0
    held.refresh_from_db()
    over.refresh_from_db()
    assert (held.status, held.claim_token) == (status, "theirs")
    assert over.status == Status.QUEUED
    assert done.stdout.splitlines() == [
        "Found 2 job(s) to process",
        f"Processing job {held.pk} ({status})",
        f"Successfully processed job {held.pk}: left: its launcher (them:1) is at it",
        f"Processing job {over.pk} ({status})",
        f"Successfully processed job {over.pk}: is queued",
        "Processed: 2 jobs, Errors: 0",
    ]


def inline_runs(client: SyncPrefectClient) -> list[str]:
    """Names of the flows whose runs no deployment made."""
    chosen = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(is_null_=True))
    runs = client.read_flow_runs(flow_run_filter=chosen, limit=200)
    return [client.read_flow(run.flow_id).name for run in runs]


def test_jobs_in_id_order_in_one_flow_run_under_the_limit_of_the_tag(any_site: Site, api: SyncPrefectClient) -> None:
    jobs = [any_site.queue("sleep", "60", priority=priority) for priority in (20, 50, 80)]
    before = inline_runs(api).count("process-jobs")
    api.upsert_global_concurrency_limit_by_name("tag:container-job", 2)
    try:
        done = any_site.run("--status=pending", "--verbose", "--via=inline")
    finally:
        api.delete_global_concurrency_limit_by_name("tag:container-job")

    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("Successfully")] == [
        f"Successfully processed job {jobs[0].pk}: launched",
        f"Successfully processed job {jobs[1].pk}: launched",
        f"Successfully processed job {jobs[2].pk}: stays queued: limit reached: tag container-job, 2 of 2",
    ]
    assert inline_runs(api).count("process-jobs") == before + 1


def test_the_caps_are_those_of_queue_mode(site_with_api: Site) -> None:
    for _ in range(6):
        site_with_api.queue("sleep", "60")
    done = site_with_api.run("--status=pending", "--verbose", "--max-concurrent=6")

    assert ContainerJob.objects.running().count() == 5
    assert "stays queued: limit reached: max_concurrent, 5 of 5" in done.stdout


def failed(site: Site, **fields: Any) -> ContainerJob:
    job = site.queue(image="container-manager.invalid/none", pull_policy="never", **fields)
    queue_manager.launch_next_batch(5, 10, only=[job.pk])
    ContainerJob.objects.filter(pk=job.pk).update(image="busybox")
    return job


def test_a_failed_job_is_queued_again_while_retries_are_left(site_with_api: Site) -> None:
    job = failed(site_with_api, max_retries=2)
    done = site_with_api.run("--status=failed", "--verbose")

    job.refresh_from_db()
    assert f"Processing job {job.pk} (failed)" in done.stdout.splitlines()
    assert f"Successfully processed job {job.pk}: launched" in done.stdout.splitlines()
    assert (job.status, job.retry_count) == (Status.RUNNING, 1)


def test_success_means_that_the_work_was_done_whatever_the_jobs_own_exit_code(site_with_api: Site) -> None:
    job = site_with_api.queue("sh", "-c", "exit 3", max_retries=0)
    queue_manager.launch_next_batch(5, 10)
    engine = DockerEngine(DockerHost.objects.get().address, timeout=20)
    job.refresh_from_db()
    wait_until(lambda: engine.inspect(str(job.container_id)).has_ended)
    done = site_with_api.run("--fail-on-error", "--verbose")

    job.refresh_from_db()
    assert (job.status, job.exit_code) == (Status.FAILED, 3)
    assert done.returncode == 0
    assert f"Successfully processed job {job.pk}: harvested: failed (exit_code)" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == "Processed: 1 jobs, Errors: 0"


def test_a_cancelled_job_is_left_and_counts_as_processed_and_without_verbose_only_the_sum_is_told(
    site_with_api: Site,
) -> None:
    job = site_with_api.queue("true")
    queue_manager.cancel_job(job)
    done = site_with_api.run(f"--job-id={job.pk}")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["Found 1 job(s) to process", "Processed: 1 jobs, Errors: 0"]
