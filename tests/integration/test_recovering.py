"""What dead launchers leave, one case each: rows whose lease is over, and containers made by hand."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.utils.timezone import now

from container_manager.containers import container_name
from container_manager.engine import DockerEngine
from container_manager.exceptions import ContainerGone
from container_manager.models import LEASED, ContainerJob, DockerHost, Installation, Status
from container_manager.queue import QueueManager
from container_manager.types import BatchResult, ContainerSpec, LoopStats
from tests.conftest import wait_until

DEAD = "token-of-the-dead"
ECHO = ("echo", "once")
SLEEP = ("sleep", "60")
RECORDED = (Status.STARTING, Status.RECOVERING)


@pytest.fixture
def docker_engine(docker_host: DockerHost) -> DockerEngine:
    return DockerEngine(docker_host.address, timeout=20)


def left_over(host: DockerHost, status: Status, **fields: object) -> ContainerJob:
    """A job in its first attempt whose launcher died a while ago."""
    job = ContainerJob.objects.create_job(image="busybox", command=list(ECHO))
    fields = {
        "attempt": 1,
        "claim_token": DEAD,
        "claimed_by": "dead:1",
        "claimed_until": now() - timedelta(seconds=1),
        "queued_at": now() - timedelta(hours=1),
        "deadline_at": now() + timedelta(hours=1),
    } | fields
    ContainerJob.objects.filter(pk=job.pk).update(status=status, slot_host=host, **fields)
    job.refresh_from_db()
    return job


def make_container(
    engine: DockerEngine, host: DockerHost, job_id: int, attempt: int = 1, instance: str = "", command: Any = ECHO
) -> str:
    """Created, as a launcher does it; not started."""
    instance = instance or Installation.load().instance_id
    values = {"instance": instance, "job": str(job_id), "attempt": str(attempt), "token": DEAD}
    labels = {f"container-manager.{name}": value for name, value in values.items()}
    spec = ContainerSpec(image="busybox", command=command)
    return engine.create(
        container_name(instance, job_id, attempt), spec, environment={}, labels=labels, hardening=host.hardening
    )


def left_over_with_container(
    engine: DockerEngine, host: DockerHost, status: Status, *, command: Any = ECHO, **fields: object
) -> tuple[ContainerJob, str]:
    """The launcher had created the container and, beyond `launching`, recorded it."""
    job = left_over(host, status, **fields)
    container_id = make_container(engine, host, job.pk, job.attempt, command=command)
    if status != Status.LAUNCHING:
        ContainerJob.objects.filter(pk=job.pk).update(container_id=container_id)
    return job, container_id


def run_out(engine: DockerEngine, container_id: str) -> None:
    engine.start(container_id)
    wait_until(lambda: engine.inspect(container_id).has_ended)


def pass_over(manager: QueueManager, job: ContainerJob) -> LoopStats:
    """One round that launches nothing."""
    stats = manager.process_queue_continuous(5, 1, work_seconds=0, launch=lambda *_: BatchResult())
    job.refresh_from_db()
    return stats


def state(engine: DockerEngine, container_id: str) -> str:
    try:
        return engine.inspect(container_id).state
    except ContainerGone:
        return "gone"


def test_a_claim_without_a_container_goes_back_to_its_place_without_a_docker_call(docker_host: DockerHost) -> None:
    asked = []

    class Witness(DockerEngine):
        def inspect(self, container: str) -> Any:
            asked.append(container)
            return super().inspect(container)

        def remove(self, container_id: str) -> None:
            asked.append(container_id)
            super().remove(container_id)

    job = left_over(docker_host, Status.LAUNCHING)
    queued_at = job.queued_at

    stats = pass_over(QueueManager(Witness), job)

    assert (job.status, job.slot_host, job.claim_token, job.claimed_until) == (Status.QUEUED, None, "", None)
    assert (job.queued_at, job.attempt, job.retry_count, job.launch_tries) == (queued_at, 1, 0, 1)
    assert (asked, job.attempts.count(), stats.jobs_recovered) == ([], 0, 1)


def test_a_container_that_was_created_but_not_recorded_is_collected(
    docker_host: DockerHost, manager: QueueManager, docker_engine: DockerEngine
) -> None:
    job, container_id = left_over_with_container(docker_engine, docker_host, Status.LAUNCHING)

    pass_over(manager, job)

    assert (job.status, state(docker_engine, container_id)) == (Status.QUEUED, "gone")


@pytest.mark.parametrize("status", RECORDED)
def test_a_container_that_was_never_started_is_removed_and_its_job_queued(
    docker_host: DockerHost, manager: QueueManager, docker_engine: DockerEngine, status: Status
) -> None:
    job, container_id = left_over_with_container(docker_engine, docker_host, status)

    pass_over(manager, job)

    assert (job.status, job.container_id, job.launch_tries) == (Status.QUEUED, None, 1)
    assert (state(docker_engine, container_id), job.attempts.count()) == ("gone", 0)


def test_a_recovered_job_runs_in_a_new_attempt(
    docker_host: DockerHost, manager: QueueManager, docker_engine: DockerEngine
) -> None:
    job, _ = left_over_with_container(docker_engine, docker_host, Status.STARTING)

    manager.process_queue_continuous(5, 1, work_seconds=20)

    job.refresh_from_db()
    attempts = job.attempts.values_list("number", "stdout")
    assert (job.status, job.launch_tries, list(attempts)) == (Status.COMPLETED, 0, [(2, "once\n")])


@pytest.mark.parametrize("status", RECORDED)
def test_a_container_that_ran_is_adopted_and_harvested_and_never_started_again(
    docker_host: DockerHost, manager: QueueManager, docker_engine: DockerEngine, status: Status
) -> None:
    job, container_id = left_over_with_container(docker_engine, docker_host, status)
    run_out(docker_engine, container_id)

    pass_over(manager, job)
    pass_over(manager, job)

    assert (job.status, job.attempt, state(docker_engine, container_id)) == (Status.COMPLETED, 1, "gone")
    assert job.attempts.get().stdout == "once\n"


def test_a_pass_stays_for_what_it_adopted(
    docker_host: DockerHost, manager: QueueManager, docker_engine: DockerEngine
) -> None:
    job, container_id = left_over_with_container(docker_engine, docker_host, Status.STARTING)
    run_out(docker_engine, container_id)

    manager.process_queue_continuous(5, 1, work_seconds=20)

    job.refresh_from_db()
    assert job.status == Status.COMPLETED


@pytest.mark.parametrize("status", RECORDED)
def test_a_container_that_runs_is_adopted(
    docker_host: DockerHost, manager: QueueManager, docker_engine: DockerEngine, status: Status
) -> None:
    job, container_id = left_over_with_container(docker_engine, docker_host, status, command=SLEEP)
    docker_engine.start(container_id)

    pass_over(manager, job)

    assert (job.status, job.container_id, job.claimed_until) == (Status.RUNNING, container_id, None)
    assert state(docker_engine, container_id) == "running"


@pytest.mark.parametrize(("rerun", "status"), [(False, Status.FAILED), (True, Status.SCHEDULED)])
def test_a_recorded_container_that_is_gone_is_lost(
    docker_host: DockerHost, manager: QueueManager, rerun: bool, status: Status
) -> None:
    job = left_over(docker_host, Status.STARTING, container_id="f" * 64, rerun_on_lost=rerun)

    pass_over(manager, job)

    assert (job.status, job.reason, job.retry_count) == (status, "" if rerun else "lost", int(rerun))
    assert (job.attempts.get().reason, job.attempts.get().number) == ("lost", 1)


def test_a_container_that_recovery_had_removed_already_is_not_lost(
    docker_host: DockerHost, manager: QueueManager
) -> None:
    job = left_over(docker_host, Status.RECOVERING, container_id="f" * 64)

    pass_over(manager, job)

    assert (job.status, job.launch_tries, job.attempts.count()) == (Status.QUEUED, 1, 0)


@pytest.mark.parametrize("status", LEASED)
def test_a_cancelled_job_does_not_come_back(
    docker_host: DockerHost, manager: QueueManager, docker_engine: DockerEngine, status: Status
) -> None:
    job, container_id = left_over_with_container(docker_engine, docker_host, status)
    manager.cancel_job(job)

    pass_over(manager, job)

    assert (job.status, job.reason, job.attempts.get().reason) == (Status.CANCELLED, "cancelled", "cancelled")
    assert state(docker_engine, container_id) == "gone"


@pytest.mark.parametrize("status", LEASED)
def test_a_job_whose_lease_is_live_is_left_to_its_launcher(
    docker_host: DockerHost, manager: QueueManager, docker_engine: DockerEngine, status: Status
) -> None:
    until = now() + timedelta(minutes=1)
    job, container_id = left_over_with_container(docker_engine, docker_host, status, claimed_until=until)

    stats = pass_over(manager, job)

    assert (job.status, job.claim_token, state(docker_engine, container_id)) == (status, DEAD, "created")
    assert (stats.jobs_recovered, stats.anomalies) == (0, ())


@pytest.mark.parametrize(
    ("tries", "retries", "status", "charged"),
    [(4, 3, Status.QUEUED, 0), (5, 3, Status.SCHEDULED, 1), (5, 0, Status.FAILED, 0)],
)
def test_after_five_uncharged_tries_a_retry_is_charged(
    docker_host: DockerHost, manager: QueueManager, tries: int, retries: int, status: Status, charged: int
) -> None:
    job = left_over(docker_host, Status.LAUNCHING, launch_tries=tries, max_retries=retries)

    pass_over(manager, job)

    assert (job.status, job.retry_count) == (status, charged)
    assert list(job.attempts.values_list("reason", flat=True)) == ([] if status == Status.QUEUED else ["launch"])


@pytest.mark.parametrize("has_run", [False, True])
def test_what_an_earlier_attempt_left_is_collected_while_the_next_one_runs(
    docker_host: DockerHost, manager: QueueManager, docker_engine: DockerEngine, has_run: bool
) -> None:
    job, container_id = left_over_with_container(
        docker_engine, docker_host, Status.RUNNING, attempt=2, claimed_until=None, command=SLEEP
    )
    stale = make_container(docker_engine, docker_host, job.pk, attempt=1)
    docker_engine.start(container_id)
    if has_run:
        run_out(docker_engine, stale)

    pass_over(manager, job)

    assert (state(docker_engine, stale), state(docker_engine, container_id)) == ("gone", "running")


def test_a_stray_that_runs_is_reported_and_left(
    docker_host: DockerHost, manager: QueueManager, docker_engine: DockerEngine
) -> None:
    job = ContainerJob.objects.create_job(image="busybox")
    of_no_attempt = make_container(docker_engine, docker_host, job.pk, command=SLEEP)
    of_no_job = make_container(docker_engine, docker_host, job.pk + 1)
    docker_engine.start(of_no_attempt)

    stats = pass_over(manager, job)

    assert sorted(anomaly.split(" ", 4)[4] for anomaly in stats.anomalies) == [
        "belongs to no job of this database; left as it is",
        "is running, its attempt is over; left as it is",
    ]
    assert state(docker_engine, of_no_attempt) == "running"
    assert state(docker_engine, of_no_job) == "created"


@pytest.fixture
def foreign(docker_host: DockerHost, docker_engine: DockerEngine) -> Iterator[str]:
    """A container of another installation, for a job with an id that this one has, too."""
    job = left_over(docker_host, Status.LAUNCHING)
    container_id = make_container(docker_engine, docker_host, job.pk, instance=f"{Installation.load().instance_id}x")
    yield container_id
    docker_engine.remove(container_id)


def test_a_container_of_another_installation_is_not_touched(
    foreign: str, manager: QueueManager, docker_engine: DockerEngine
) -> None:
    job = ContainerJob.objects.get()

    stats = pass_over(manager, job)

    assert (job.status, stats.anomalies) == (Status.QUEUED, ())
    assert state(docker_engine, foreign) == "created"
