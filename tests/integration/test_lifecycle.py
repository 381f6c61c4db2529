"""Jobs from the queue to the record, on a real Engine and both databases."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import docker
import pytest
from django.db import connection
from django.utils.timezone import now

from container_manager.containers import INSTANCE_LABEL
from container_manager.engine import DockerEngine
from container_manager.models import ContainerJob, DockerHost, Installation, JobAttempt, Status
from container_manager.queue import QueueManager
from tests.conftest import wait_until

SECRET = "hunter2-and-more"


def resolve(reference: str) -> str:
    return {"vault:password": SECRET, "vault:broken": f"{SECRET}\0"}[reference]


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def queued(manager: QueueManager, **fields: object) -> ContainerJob:
    return manager.queue_job(ContainerJob.objects.create_job(**{"image": "busybox"} | fields))


def run(manager: QueueManager, **fields: object) -> ContainerJob:
    job = queued(manager, **fields)
    manager.process_queue_continuous(5, 1, work_seconds=20)
    job.refresh_from_db()
    return job


def launched(manager: QueueManager, **fields: object) -> ContainerJob:
    job = queued(manager, **fields)
    assert manager.launch_next_batch().job_ids == (job.pk,)
    job.refresh_from_db()
    return job


def ended(manager: QueueManager, job: ContainerJob) -> JobAttempt:
    """The attempt of a job that passes, one after the other, bring to its end."""

    def has_ended() -> bool:
        manager.process_queue_continuous(5, 1, work_seconds=0)
        job.refresh_from_db()
        return job.slot_host_id is None

    wait_until(has_ended)
    return job.attempts.get()


def containers_left(engine: docker.DockerClient) -> list[Any]:
    label = f"{INSTANCE_LABEL}={Installation.load().instance_id}"
    return engine.containers.list(all=True, filters={"label": label})


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_ends_with_the_containers_exit_code(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient, code: int
) -> None:
    job = run(manager, command=shell(f"exit {code}"))

    assert (job.status, job.exit_code) == (Status.FAILED if code else Status.COMPLETED, code)
    assert (job.reason, job.attempts.get().exit_code) == ("exit_code", code)
    assert containers_left(engine) == []


def test_a_missing_program_is_named_as_such(docker_host: DockerHost, manager: QueueManager) -> None:
    job = run(manager, command=["no-such-program"])

    assert (job.status, job.reason, job.exit_code) == (Status.FAILED, "exit_code", 127)
    assert job.last_error == "exited with code 127: its command was not found"


def test_a_missing_image_fails_after_its_retries(docker_host: DockerHost, manager: QueueManager) -> None:
    job = run(manager, image="localhost:1/no-such-image", max_retries=1)

    assert (job.status, job.reason, job.retry_count, job.exit_code) == (Status.FAILED, "launch", 1, None)
    assert "pull" in job.last_error
    assert [(attempt.reason, "pull" in attempt.error) for attempt in job.attempts.all()] == [("launch", True)] * 2


def test_a_missing_image_that_must_not_be_pulled_fails_at_once(docker_host: DockerHost, manager: QueueManager) -> None:
    job = run(manager, image="no-such-image", pull_policy="never")

    assert (job.status, job.reason, job.retry_count) == (Status.FAILED, "launch", 0)
    assert job.last_error == "host local does not have the image no-such-image, and pull_policy is never"
    assert job.attempts.get().error == job.last_error


def test_a_missing_network_is_retried_and_leaves_no_container(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    job = run(manager, networks=["no-such-network"], max_retries=1)

    assert (job.status, job.reason, job.attempts.count()) == (Status.FAILED, "launch", 2)
    assert "no-such-network" in job.last_error
    assert containers_left(engine) == []


def test_stdout_and_stderr_are_kept_apart(docker_host: DockerHost, manager: QueueManager) -> None:
    attempt = run(manager, command=shell("echo out; echo err >&2")).attempts.get()

    assert (attempt.stdout, attempt.stderr) == ("out\n", "err\n")


def test_what_is_no_text_is_replaced_in_the_logs(docker_host: DockerHost, manager: QueueManager) -> None:
    attempt = run(manager, command=shell(r"printf 'a\000b\377c\303\251'")).attempts.get()

    assert attempt.stdout == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}cé"


def test_a_job_knows_its_id_and_attempt(docker_host: DockerHost, manager: QueueManager) -> None:
    job = run(manager, command=shell("echo $CM_JOB_ID $CM_ATTEMPT $MORE"), environment={"MORE": "a b"})

    assert job.attempts.get().stdout == f"{job.pk} 1 a b\n"


@pytest.mark.parametrize(("trap", "code"), [("", 137), ("exit 7", 7), ("exit 0", 0)])
def test_a_job_past_its_timeout_is_told_to_stop_then_killed(
    docker_host: DockerHost, manager: QueueManager, trap: str, code: int
) -> None:
    job = launched(manager, command=shell(f"trap '{trap}' TERM; echo up; sleep 60 & wait; wait"), timeout_seconds=1)

    attempt = ended(manager, job)

    assert (job.status, job.reason, job.exit_code) == (Status.FAILED, "timeout", code)
    assert (job.last_error, attempt.stdout) == ("stopped after its timeout of 1 s", "up\n")


def test_an_exit_code_is_retried_up_to_max_retries(docker_host: DockerHost, manager: QueueManager) -> None:
    job = run(manager, command=shell("echo $CM_ATTEMPT; exit 3"), retry_exit_codes=[3], max_retries=2)

    assert (job.status, job.exit_code, job.retry_count) == (Status.FAILED, 3, 2)
    tries = job.attempts.values_list("number", "exit_code", "stdout")
    assert list(tries) == [(1, 3, "1\n"), (2, 3, "2\n"), (3, 3, "3\n")]


@pytest.mark.parametrize(
    ("script", "end"),
    [("exit 4", (Status.FAILED, 4, 0)), ("exit $((CM_ATTEMPT == 1 ? 3 : 0))", (Status.COMPLETED, 0, 1))],
)
def test_only_the_named_exit_codes_are_retried(
    docker_host: DockerHost, manager: QueueManager, script: str, end: tuple[Status, int, int]
) -> None:
    job = run(manager, command=shell(script), retry_exit_codes=[3])

    assert (job.status, job.exit_code, job.retry_count) == end


def test_a_job_that_waits_is_cancelled_at_once(docker_host: DockerHost, manager: QueueManager) -> None:
    pending = ContainerJob.objects.create_job(image="busybox")
    scheduled = manager.queue_job(ContainerJob.objects.create_job(image="busybox"), now() + timedelta(hours=1))

    for job in (pending, scheduled, queued(manager)):
        assert manager.cancel_job(job) == Status.CANCELLED

    manager.process_queue_continuous(5, 1, work_seconds=5)
    ends = ContainerJob.objects.values_list("status", "reason", "attempt")
    assert list(ends) == [(Status.CANCELLED, "cancelled", 0)] * 3


def test_a_running_job_is_cancelled_by_a_pass_and_keeps_its_logs(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    job = launched(manager, command=shell("echo up; sleep 60"))
    wait_until(engine.containers.get(job.container_id).logs)

    assert manager.cancel_job(job) == Status.RUNNING
    attempt = ended(manager, job)

    assert (job.status, job.reason, attempt.reason) == (Status.CANCELLED, "cancelled", "cancelled")
    assert attempt.stdout == "up\n"
    assert containers_left(engine) == []


def test_a_scheduled_job_runs_at_its_time(docker_host: DockerHost, manager: QueueManager) -> None:
    moment = now() + timedelta(seconds=1)
    job = manager.queue_job(ContainerJob.objects.create_job(image="busybox"), schedule_for=moment)

    manager.process_queue_continuous(5, 1, work_seconds=20)

    job.refresh_from_db()
    assert (job.status, job.queued_at) == (Status.COMPLETED, moment)
    assert moment <= job.launched_at < moment + timedelta(seconds=3)


def test_a_job_that_needs_more_memory_than_its_limit_is_killed(docker_host: DockerHost, manager: QueueManager) -> None:
    # An Engine may miss what happens in a container's first moments.
    job = run(manager, command=shell("sleep 0.5; tail /dev/zero"), memory_limit_mib=8)

    assert (job.status, job.reason, job.exit_code, job.oom_killed) == (Status.FAILED, "oom", 137, True)
    assert job.last_error == "killed: it needed more memory than its limit of 8 MiB"


def test_a_failed_jobs_container_is_kept_for_a_while(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"KEEP_FAILED_CONTAINERS_SECONDS": 60}
    run(manager, command=["true"])
    failed = run(manager, command=["false"])
    manager.process_queue_continuous(5, 1, work_seconds=0)
    assert [container.id for container in containers_left(engine)] == [failed.container_id]

    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"KEEP_FAILED_CONTAINERS_SECONDS": 0}
    manager.process_queue_continuous(5, 1, work_seconds=0)
    assert containers_left(engine) == []


def test_a_container_that_is_removed_by_hand_is_lost(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    job = launched(manager, command=["sleep", "60"])
    engine.containers.get(job.container_id).remove(force=True)

    ended(manager, job)

    assert (job.status, job.reason, job.exit_code) == (Status.FAILED, "lost", None)


def test_containers_that_vanish_together_are_held_and_reported(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    for _ in range(3):
        launched(manager, command=["sleep", "60"])
    for container in containers_left(engine):
        container.remove(force=True)

    stats = manager.process_queue_continuous(5, 1, work_seconds=0)

    assert stats.anomalies == ("host local: the containers of 3 jobs vanished at once; held for 300 s",)
    assert ContainerJob.objects.running().count() == 3


def test_a_container_is_removed_only_after_its_record_is_committed(docker_host: DockerHost) -> None:
    recorded = []

    class Witness(DockerEngine):
        def remove(self, container_id: str) -> None:
            # Another thread, hence another connection: it sees what is committed.
            rows = JobAttempt.objects.filter(container_id=container_id)
            recorded.append(list(rows.values_list("stdout", "job__status")))
            connection.close()
            super().remove(container_id)

    run(QueueManager(Witness), command=["echo", "done"])

    assert recorded == [[("done\n", Status.COMPLETED)]]


def test_with_one_slot_jobs_start_by_priority(docker_host: DockerHost, manager: QueueManager) -> None:
    jobs = [queued(manager, priority=priority) for priority in (20, 50, 80)]

    stats = manager.process_queue_continuous(1, 1, work_seconds=20)

    assert stats.job_ids == tuple(job.pk for job in reversed(jobs))
    starts = JobAttempt.objects.order_by("started_at").values_list("job_id", flat=True)
    assert tuple(starts) == stats.job_ids


@pytest.mark.parametrize(("rerun", "status"), [(False, Status.FAILED), (True, Status.SCHEDULED)])
def test_a_lost_hosts_jobs_end_or_run_again(
    docker_host: DockerHost, manager: QueueManager, rerun: bool, status: Status
) -> None:
    job = launched(manager, command=["sleep", "60"], rerun_on_lost=rerun)

    [end] = manager.declare_host_lost(docker_host)

    job.refresh_from_db()
    docker_host.refresh_from_db()
    assert (end.job_id, end.status, job.status, docker_host.is_active) == (job.pk, status, status, False)
    assert (job.attempts.get().reason, job.last_error) == ("lost", "host local was declared lost")


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"command": shell("echo ${#PASSWORD}; echo is $PASSWORD")}, Status.COMPLETED),
        ({"secret_environment": {"PASSWORD": "vault:broken"}, "max_retries": 0}, Status.FAILED),
        ({"secret_environment": {"PASSWORD": "vault:unknown"}, "max_retries": 0}, Status.FAILED),
    ],
    ids=["printed", "broken", "unknown"],
)
def test_a_secrets_value_is_on_no_row(
    docker_host: DockerHost, manager: QueueManager, settings: Any, caplog: Any, fields: dict, status: Status
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"SECRET_RESOLVER": f"{__name__}.resolve"}

    job = run(manager, **{"secret_environment": {"PASSWORD": "vault:password"}} | fields)

    assert job.status == status
    assert job.attempts.get().stdout == (f"{len(SECRET)}\nis ***\n" if status == Status.COMPLETED else "")
    rows = [*ContainerJob.objects.values(), *JobAttempt.objects.values()]
    assert (SECRET in str(rows), SECRET in caplog.text) == (False, False)


def test_output_is_without_the_value_that_the_container_was_given_whatever_became_of_it(
    docker_host: DockerHost, manager: QueueManager, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"SECRET_RESOLVER": f"{__name__}.resolve"}
    command, secret = shell("echo is $PASSWORD; exit 3"), {"PASSWORD": "vault:password"}
    job = launched(manager, command=command, secret_environment=secret)
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"SECRET_RESOLVER": "no.such.resolver"}

    attempt = ended(manager, job)

    assert (job.exit_code, attempt.stdout, attempt.stderr) == (3, "is ***\n", "")


def test_a_resolver_that_fails_as_it_is_imported_stops_no_other_job(
    docker_host: DockerHost, manager: QueueManager, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_vault.py").write_text('import os\n\ntoken = os.environ["NO_SUCH_TOKEN"]\n')
    monkeypatch.syspath_prepend(tmp_path)
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"SECRET_RESOLVER": "no_vault.resolve"}
    locked = queued(manager, command=["true"], secret_environment={"TOKEN": "vault:a"}, max_retries=0)

    other = run(manager, command=["true"])

    locked.refresh_from_db()
    assert (locked.status, other.status) == (Status.FAILED, Status.COMPLETED)
    assert locked.last_error.endswith("the setting SECRET_RESOLVER can't be imported: KeyError")
