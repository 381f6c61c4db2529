"""One job at a time: what its status asks for is done, and said in words."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import docker
import pytest
from django.utils.timezone import now

from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import QueueManager
from container_manager.services import JobService
from container_manager.types import ProcessResult
from tests.conftest import wait_until

SLEEP = ["sleep", "60"]


@pytest.fixture
def service(manager: QueueManager) -> JobService:
    return JobService(manager)


def make(**fields: Any) -> ContainerJob:
    return ContainerJob.objects.create_job(**{"image": "busybox"} | fields)


def put(job: ContainerJob, **fields: Any) -> ContainerJob:
    ContainerJob.objects.filter(pk=job.pk).update(**fields)
    job.refresh_from_db()
    return job


def launched(manager: QueueManager, **fields: Any) -> ContainerJob:
    job = manager.queue_job(make(**fields))
    assert manager.launch_next_batch().job_ids == (job.pk,)
    job.refresh_from_db()
    return job


def processed(service: JobService, job: ContainerJob, **options: Any) -> tuple[Status, ProcessResult]:
    """The job's status after it, and what it said."""
    result = service.process_job(job, **options)
    job.refresh_from_db()
    return Status(job.status), result


def run_to_its_end(service: JobService, job: ContainerJob, engine: docker.DockerClient) -> ProcessResult:
    """Process a job that runs until it has ended; what was said last."""
    wait_until(lambda: engine.containers.get(job.container_id).status == "exited")
    # The Engine's list lags what it says of a container.
    wait_until(lambda: processed(service, job)[0] != Status.RUNNING)
    return service.process_job(job)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda manager: make(command=SLEEP),
        lambda manager: manager.queue_job(make(command=SLEEP)),
        lambda manager: manager.queue_job(make(command=SLEEP), now() - timedelta(seconds=1)),
    ],
    ids=["pending", "queued", "due"],
)
def test_a_job_that_may_start_is_launched(
    docker_host: DockerHost, manager: QueueManager, service: JobService, prepare: Callable[[QueueManager], ContainerJob]
) -> None:
    job = prepare(manager)

    assert processed(service, job) == (Status.RUNNING, ProcessResult(success=True, message="launched"))


def test_only_the_job_that_is_meant_is_launched(
    docker_host: DockerHost, manager: QueueManager, service: JobService
) -> None:
    other = manager.queue_job(make(priority=100))

    status, _ = processed(service, make(command=SLEEP))

    other.refresh_from_db()
    assert (status, other.status) == (Status.RUNNING, Status.QUEUED)


def test_a_job_that_is_scheduled_for_later_is_left(database: str, manager: QueueManager, service: JobService) -> None:
    moment = now() + timedelta(hours=1)
    job = manager.queue_job(make(), moment)

    status, result = processed(service, job)

    assert (status, result.success) == (Status.SCHEDULED, True)
    assert result.message == f"left: it is scheduled for {moment:%Y-%m-%d %H:%M:%S} UTC"


def test_with_all_slots_taken_a_job_stays_queued_and_says_why(
    docker_host: DockerHost, manager: QueueManager, service: JobService
) -> None:
    launched(manager, command=SLEEP)

    status, result = processed(service, make(), max_concurrent=1)

    assert (status, result.success) == (Status.QUEUED, True)
    assert result.message == "stays queued: limit reached: max_concurrent, 1 of 1"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"is_active": False}, "host pinned is not active"),
        ({"max_concurrent_jobs": 0}, "limit reached: max_concurrent_jobs of host pinned, 0 of 0"),
    ],
)
def test_a_job_that_is_pinned_to_a_closed_host_stays_queued_and_says_why(
    docker_host: DockerHost, service: JobService, fields: dict[str, Any], why: str
) -> None:
    host = DockerHost.objects.create(name="pinned", base_url=docker_host.base_url, **fields)

    status, result = processed(service, make(pinned_host=host))

    assert (status, result.message[:14]) == (Status.QUEUED, "stays queued: ")
    assert result.message.endswith(why)


def test_without_a_host_a_job_stays_queued_and_says_why(database: str, service: JobService) -> None:
    status, result = processed(service, make())

    assert (status, result.message) == (Status.QUEUED, "stays queued: there is no Docker host: add one")


def test_a_job_that_is_not_allowed_is_an_error_that_names_the_field(database: str, service: JobService) -> None:
    job = put(make(), image="BusyBox")

    status, result = processed(service, job)

    assert (status, result.success, result.error.split(":")[0]) == (Status.PENDING, False, "image")


def test_a_launch_that_fails_is_an_error(docker_host: DockerHost, service: JobService) -> None:
    job = make(image="no-such-image", pull_policy="never")

    status, result = processed(service, job)

    assert (status, result.success) == (Status.FAILED, False)
    assert (
        result.error == job.last_error == "host local does not have the image no-such-image, and pull_policy is never"
    )


@pytest.mark.parametrize(
    ("lease", "status", "message"),
    [
        (timedelta(minutes=1), Status.LAUNCHING, "left: its launcher (other:1) is at it"),
        (-timedelta(minutes=1), Status.QUEUED, "is queued"),
    ],
    ids=["live", "over"],
)
def test_a_job_that_is_launching_is_recovered_once_its_lease_is_over(
    docker_host: DockerHost, service: JobService, lease: timedelta, status: Status, message: str
) -> None:
    claim = {"attempt": 1, "claim_token": "t", "claimed_by": "other:1", "claimed_until": now() + lease}
    job = put(make(), status=Status.LAUNCHING, slot_host=docker_host, queued_at=now(), **claim)

    assert processed(service, job) == (status, ProcessResult(success=True, message=message))


def test_a_job_that_runs_is_left_to_run(docker_host: DockerHost, manager: QueueManager, service: JobService) -> None:
    job = launched(manager, command=SLEEP)

    assert processed(service, job) == (Status.RUNNING, ProcessResult(success=True, message="is running"))


def test_a_job_that_has_run_out_is_harvested_whatever_its_exit_code(
    docker_host: DockerHost, manager: QueueManager, service: JobService, engine: docker.DockerClient
) -> None:
    job = launched(manager, command=["sh", "-c", "echo done; exit 3"])
    wait_until(lambda: engine.containers.get(job.container_id).status == "exited")

    result = wait_until(lambda: (told := service.process_job(job)).message != "is running" and told)

    job.refresh_from_db()
    assert result == ProcessResult(success=True, message="harvested: failed (exit_code)")
    assert (job.status, job.exit_code, job.attempts.get().stdout) == (Status.FAILED, 3, "done\n")


def test_a_job_past_its_deadline_is_stopped(
    docker_host: DockerHost, manager: QueueManager, service: JobService
) -> None:
    job = put(launched(manager, command=SLEEP), deadline_at=now() - timedelta(seconds=1))

    wait_until(lambda: processed(service, job)[0] != Status.RUNNING)

    assert (job.status, job.reason) == (Status.FAILED, "timeout")


def test_a_failed_job_runs_again_while_retries_are_left(docker_host: DockerHost, service: JobService) -> None:
    job = put(make(command=SLEEP), status=Status.FAILED, reason="exit_code", exit_code=1, attempt=1, retry_count=2)

    assert processed(service, job) == (Status.RUNNING, ProcessResult(success=True, message="launched"))
    assert (job.attempt, job.reason, job.exit_code) == (2, "", None)


def test_a_failed_job_without_retries_left_is_an_error_that_names_the_way(database: str, service: JobService) -> None:
    job = put(make(), status=Status.FAILED, retry_count=3)

    status, result = processed(service, job)

    assert (status, result.success) == (Status.FAILED, False)
    assert result.error == f"no retries left; process it with --job-id {job.pk} to run it anew"


def test_a_failed_job_that_is_meant_by_its_id_always_runs_again(docker_host: DockerHost, service: JobService) -> None:
    job = put(make(command=SLEEP), status=Status.FAILED, retry_count=3)

    assert processed(service, job, always_retry=True)[0] == Status.RUNNING
    assert job.retry_count == 0


def test_a_job_that_fails_whenever_it_is_processed_runs_out_of_retries(
    docker_host: DockerHost, manager: QueueManager, service: JobService, engine: docker.DockerClient
) -> None:
    job = launched(manager, command=["false"], max_retries=1)

    for _ in range(2):
        result = run_to_its_end(service, job, engine)
        job.refresh_from_db()

    assert (result.success, job.status, job.attempts.count()) == (False, Status.FAILED, 2)


@pytest.mark.parametrize("always_retry", [False, True])
@pytest.mark.parametrize("status", [Status.COMPLETED, Status.CANCELLED])
def test_with_a_job_that_is_done_there_is_nothing_to_do(
    database: str, service: JobService, status: Status, always_retry: bool
) -> None:
    job = put(make(), status=status)

    told = processed(service, job, always_retry=always_retry)

    assert told == (status, ProcessResult(success=True, message=f"nothing to do: it is {status}"))


@pytest.mark.parametrize(
    ("group", "statuses"),
    [
        ("pending", {"pending", "queued", "scheduled"}),
        ("running", {"launching", "starting", "recovering", "running"}),
        (None, {"launching", "starting", "recovering", "running"}),
        ("failed", {"failed"}),
    ],
)
def test_a_group_is_selected_in_the_order_of_ids(
    database: str, service: JobService, group: Any, statuses: set[str]
) -> None:
    host = DockerHost.objects.create(name="a")
    alive = ("launching", "starting", "recovering", "running")
    for status in reversed(Status):
        put(make(), status=status, scheduled_for=now(), slot_host=host if status in alive else None)
    put(make(), status=Status.SCHEDULED, scheduled_for=now() + timedelta(hours=1))

    selected = list(service.select(status=group))

    assert {job.status for job in selected} == statuses
    assert [job.pk for job in selected] == sorted(job.pk for job in selected)
    assert len(selected) == len(statuses)
