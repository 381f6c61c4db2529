"""Launches that fail and programs that are killed, on a real Engine: what is done, and what a person is told."""

from datetime import timedelta
from typing import Any

import docker
import pytest
from django.db.models.functions import Now

from container_manager.models import ContainerJob, DockerHost, Installation, JobAttempt, Reason, Status
from container_manager.queue import QueueManager
from tests.conftest import wait_until
from tests.fake_engine import one_round, queued, row

#: What an Engine says is the same, whichever database is told of it.
pytestmark = pytest.mark.parametrize("database", ["postgres"], indirect=True)


def resolve(reference: str) -> str:
    raise ValueError("hunter2 is the wrong key for this vault")


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"user": "no-such-user"}, Status.SCHEDULED, ["no-such-user"]),
        ({"networks": ["no-such-network"]}, Status.SCHEDULED, ["network no-such-network not found"]),
        ({"working_dir": "/etc/passwd"}, Status.SCHEDULED, ["/etc/passwd is not a directory"]),
        ({"cpu_limit": 8000}, Status.FAILED, ["CPUs", "host local refused it", "queue a corrected job"]),
        ({"image": "nobody/has-it", "pull_policy": "never"}, Status.FAILED, ["host local", "nobody/has-it", "never"]),
        ({"image": "localhost:1/a/b"}, Status.SCHEDULED, ["image localhost:1/a/b on host local", "refused"]),
        ({"secret_environment": {"A": "vault:x"}}, Status.SCHEDULED, ["secret_environment: A", "raised ValueError"]),
    ],
    ids=["user", "network", "folder", "cpus", "image", "pull", "secret"],
)
def test_a_launch_that_fails_says_what_is_wrong_and_no_secret(
    docker_host: DockerHost, settings: Any, caplog: Any, fields: dict[str, Any], status: Status, words: list[str]
) -> None:
    settings.CONTAINER_MANAGER = {"RETRY_BASE_SECONDS": 60, "SECRET_RESOLVER": f"{__name__}.resolve"}
    manager = QueueManager()
    job = queued(manager, **{"command": ["true"], "environment": {"TOKEN": "hunter2"}} | fields)

    wait_until(lambda: one_round(manager) and job.attempts.exists())

    attempt = job.attempts.get()
    assert (row(job).status, attempt.reason, attempt.error) == (status, Reason.LAUNCH, row(job).last_error)
    assert [word for word in words if word not in attempt.error] == []
    rows = [*ContainerJob.objects.values("last_error", "pull_error"), *JobAttempt.objects.values()]
    assert ("hunter2" in str(rows), "hunter2" in caplog.text) == (False, False)


def test_what_was_missing_at_the_first_try_and_is_there_at_the_next_is_used(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    name = f"cm-test-{Installation.load().instance_id}"
    job = queued(manager, command=["true"], networks=[name])
    one_round(manager)
    assert (row(job).status, row(job).retry_count) == (Status.SCHEDULED, 1)

    network = engine.networks.create(name, internal=True)
    try:
        wait_until(lambda: one_round(manager) and row(job).status == Status.COMPLETED)
    finally:
        wait_until(lambda: engine.networks.get(name).attrs["Containers"] == {})
        network.remove()

    assert list(job.attempts.values_list("reason", "exit_code")) == [("launch", 128), ("exit_code", 0)]


def test_memory_that_runs_out_in_a_child_is_noted_beside_its_parents_own_code(
    docker_host: DockerHost, manager: QueueManager
) -> None:
    script = "sleep 0.5; tail /dev/zero; sleep 0.3; exit 0"
    job = queued(manager, command=["sh", "-c", script], memory_limit_mib=8)

    wait_until(lambda: one_round(manager) and row(job).status == Status.COMPLETED)

    assert (row(job).exit_code, row(job).oom_killed, row(job).reason) == (0, True, Reason.EXIT_CODE)


def test_a_program_that_leaves_term_alone_ends_by_it_and_one_that_is_paused_does_too(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    jobs = [queued(manager, command=["sleep", "60"]) for _ in range(2)]
    manager.launch_next_batch()
    engine.containers.get(row(jobs[1]).container_id).pause()
    ContainerJob.objects.update(deadline_at=Now() - timedelta(seconds=1))

    wait_until(lambda: one_round(manager) and not ContainerJob.objects.alive().exists())

    assert [(row(job).reason, row(job).exit_code) for job in jobs] == [(Reason.TIMEOUT, 143)] * 2
