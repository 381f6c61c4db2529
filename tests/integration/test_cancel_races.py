"""A cancellation at each moment of a job's life: the job ends, nothing starts after it, nothing is left."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.db import connections
from django.utils.timezone import now

from container_manager.exceptions import EngineFailed, InvalidTransition, RequestRefused
from container_manager.models import ALIVE, ENDED, ContainerJob, Status
from container_manager.queue import QueueManager
from tests.conftest import wait_until
from tests.fake_engine import FakeEngine, Fleet, launched, let_leases_end, one_round, queued, row


@pytest.fixture
def host(fleet: Fleet) -> FakeEngine:
    return fleet.add_host()


@pytest.fixture
def manager(fleet: Fleet) -> QueueManager:
    return QueueManager(fleet)


Story = Callable[[FakeEngine, QueueManager], ContainerJob]


def waits(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    return queued(manager)


def is_due(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    job = ContainerJob.objects.build(image="busybox", command=["run"])
    return manager.queue_job(job, schedule_for=now() - timedelta(seconds=1))


def can_not_start(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    host.break_start(128, EngineFailed("start: a port is taken"))
    return queued(manager)


def has_no_program(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    host.break_start(127, RequestRefused("start: no such file"))
    return queued(manager)


def has_no_image(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    host.registry.add("far/away")
    return queued(manager, image="far/away")


def was_left_unstarted(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    return _was_left(host, manager, has_started=False)


def was_left_started(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    return _was_left(host, manager, has_started=True)


def _was_left(host: FakeEngine, manager: QueueManager, *, has_started: bool) -> ContainerJob:
    job = queued(manager)
    host.lose_answer("start", happens=has_started)
    manager.launch_next_batch()
    let_leases_end()
    return job


def has_run_out(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    job = launched(manager)
    host.end(job.container_id, 0)
    return job


def has_failed_and_is_retried(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    job = launched(manager, retry_exit_codes=[3])
    host.end(job.container_id, 3)
    return job


def is_past_its_deadline(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    job = launched(manager)
    ContainerJob.objects.update(deadline_at=now() - timedelta(seconds=1))
    return job


def has_vanished(host: FakeEngine, manager: QueueManager) -> ContainerJob:
    job = launched(manager, rerun_on_lost=True)
    host.vanish(job.container_id)
    return job


#: What befalls a job in a round, and the calls that the round makes for it; `!`: one that raises.
STORIES: dict[Story, str] = {
    waits: "identify list create start",
    is_due: "identify create start",
    can_not_start: "create inspect remove",
    has_no_program: "create inspect remove",
    has_no_image: "create! pull",
    was_left_unstarted: "list inspect remove",
    was_left_started: "list inspect",
    has_run_out: "list inspect read_log remove",
    has_failed_and_is_retried: "list inspect read_log remove",
    is_past_its_deadline: "list signal",
    has_vanished: "list inspect!",
}
MOMENTS = [
    pytest.param(story, when, step.rstrip("!"), id=f"{story.__name__}-{when}-{step.rstrip('!')}")
    for story, steps in STORIES.items()
    for step in steps.split()
    for when in ("before", "after")
    if when == "before" or not step.endswith("!")
]


@pytest.mark.parametrize(("story", "when", "step"), MOMENTS)
def test_a_job_that_is_cancelled_at_any_moment_ends_and_is_never_resurrected(
    host: FakeEngine, manager: QueueManager, story: Story, when: str, step: str
) -> None:
    job = story(host, manager)
    at_once: list[ContainerJob | None] = []

    def cancel() -> None:
        try:
            QueueManager().cancel_job(ContainerJob.objects.get(pk=job.pk))
            at_once.append(row(job))
        except InvalidTransition:
            at_once.append(None)
        connections.close_all()

    (host.before if when == "before" else host.after)(step, cancel)

    def is_over() -> bool:
        one_round(manager)
        let_leases_end()
        return bool(at_once) and row(job).status in ENDED and not host.containers

    wait_until(is_over)
    one_round(manager)

    [cancelled] = at_once
    end = row(job)
    # It had ended before, or is cancelled, or had an end of its own before it could be stopped.
    assert cancelled is None or end.status == Status.CANCELLED or (cancelled.status in ALIVE and end.reason)
    # No claim came after it.
    assert cancelled is None or end.attempt == cancelled.attempt
