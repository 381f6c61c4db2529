"""Jobs from the queue to the record, on a real Engine and both databases."""

import pytest

from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import QueueManager


def run(manager: QueueManager, **fields: object) -> ContainerJob:
    job = manager.queue_job(ContainerJob.objects.create_job(image="busybox", **fields))
    manager.process_queue_continuous(5, 1, work_seconds=20)
    job.refresh_from_db()
    return job


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_ends_with_the_containers_exit_code(docker_host: DockerHost, manager: QueueManager, code: int) -> None:
    job = run(manager, command=["sh", "-c", f"exit {code}"])

    assert (job.status, job.exit_code) == (Status.FAILED if code else Status.COMPLETED, code)
