"""Jobs that ended with their Engine, and jobs that only look like it: what is told apart, and what is run again."""

from datetime import timedelta

import pytest
from django.db.models import F
from django.utils.timezone import now

from container_manager.exceptions import OutcomeUnknown
from container_manager.models import ContainerJob, DockerHost, Reason, Status
from container_manager.queue import QueueManager
from tests.fake_engine import FakeEngine, Fleet, launched, let_leases_end, one_round, queued, row

HINT = "; its Engine was restarted before anyone looked, which may be why"


@pytest.fixture
def host(fleet: Fleet) -> FakeEngine:
    return fleet.add_host()


@pytest.fixture
def manager(fleet: Fleet, host: FakeEngine) -> QueueManager:
    return QueueManager(fleet)


def be_found_down(host: FakeEngine, manager: QueueManager) -> None:
    host.down()
    one_round(manager)
    host.up()


def outcome(job: ContainerJob) -> tuple[Status, Reason, int | None, str]:
    ended = row(job)
    return ended.status, ended.reason, ended.exit_code, ended.last_error


def test_what_dies_with_its_machine_is_interrupted_though_no_pass_was_there(
    host: FakeEngine, manager: QueueManager
) -> None:
    job = launched(manager)
    host.crash()

    one_round(manager)

    error = "its Engine went down while it ran (exit code 255)"
    assert outcome(job) == (Status.FAILED, Reason.HOST_INTERRUPTED, 255, error)


@pytest.mark.parametrize("code", [137, 143, 255])
def test_what_ended_by_itself_before_its_machine_died_is_not_interrupted(
    host: FakeEngine, manager: QueueManager, code: int
) -> None:
    job = launched(manager)
    host.end(job.container_id, code)
    host.crash()

    one_round(manager)

    assert outcome(job) == (Status.FAILED, Reason.EXIT_CODE, code, f"exited with code {code}{HINT}")


def test_what_an_engine_stops_is_interrupted_if_a_pass_found_it_down(host: FakeEngine, manager: QueueManager) -> None:
    job = launched(manager)
    host.restart()
    be_found_down(host, manager)

    one_round(manager)

    error = "its Engine went down while it ran (exit code 143)"
    assert outcome(job) == (Status.FAILED, Reason.HOST_INTERRUPTED, 143, error)


def test_what_an_engine_may_have_stopped_unseen_is_said_to_be_possible(host: FakeEngine, manager: QueueManager) -> None:
    job = launched(manager)
    host.restart()

    one_round(manager)

    assert outcome(job) == (Status.FAILED, Reason.EXIT_CODE, 143, f"exited with code 143{HINT}")


def test_what_failed_long_before_its_engine_was_found_down_is_not_interrupted(
    host: FakeEngine, manager: QueueManager
) -> None:
    job = launched(manager)
    host.end(job.container_id, 137)
    host.clock.advance(3600)
    host.restart()
    be_found_down(host, manager)

    one_round(manager)

    assert outcome(job) == (Status.FAILED, Reason.EXIT_CODE, 137, f"exited with code 137{HINT}")


@pytest.mark.parametrize("code", [137, 143, 255])
@pytest.mark.parametrize("is_found_down", [False, True])
def test_what_fails_on_an_engine_that_was_not_restarted_simply_failed(
    host: FakeEngine, manager: QueueManager, code: int, is_found_down: bool
) -> None:
    job = launched(manager, rerun_on_lost=True)
    host.end(job.container_id, code)
    if is_found_down:
        # A network that is away looks the same.
        be_found_down(host, manager)

    one_round(manager)

    assert outcome(job) == (Status.FAILED, Reason.EXIT_CODE, code, f"exited with code {code}")


def test_nothing_is_guessed_of_an_engine_that_does_not_tell_since_when_it_runs(
    host: FakeEngine, manager: QueueManager
) -> None:
    job = launched(manager)
    host.restart()
    be_found_down(host, manager)
    host.started_at = None

    one_round(manager)

    assert outcome(job) == (Status.FAILED, Reason.EXIT_CODE, 143, "exited with code 143")


@pytest.mark.parametrize(("code", "status"), [(0, Status.COMPLETED), (3, Status.FAILED)])
def test_a_code_that_no_engine_gives_is_the_programs_own(
    host: FakeEngine, manager: QueueManager, code: int, status: Status
) -> None:
    job = launched(manager)
    host.end(job.container_id, code)
    host.restart()
    be_found_down(host, manager)

    one_round(manager)

    assert outcome(job)[:3] == (status, Reason.EXIT_CODE, code)
    assert host.count("daemon") == 0


@pytest.mark.parametrize("rerun", [False, True])
@pytest.mark.parametrize("befall", [FakeEngine.crash, FakeEngine.restart])
def test_only_a_job_that_says_so_is_run_again_and_that_is_charged(
    host: FakeEngine, manager: QueueManager, rerun: bool, befall: object
) -> None:
    job = launched(manager, rerun_on_lost=rerun)
    befall(host)

    one_round(manager)

    expected = (Status.SCHEDULED, 1) if rerun else (Status.FAILED, 0)
    assert (row(job).status, row(job).retry_count) == expected
    assert job.attempts.count() == 1


def test_what_is_being_stopped_when_its_machine_dies_ends_as_stopped(host: FakeEngine, manager: QueueManager) -> None:
    job = launched(manager, command=["sh", "-c", "trap '' TERM; echo up; while true; do sleep 1; done"])
    ContainerJob.objects.update(deadline_at=now() - timedelta(seconds=1))
    one_round(manager)
    host.crash()

    one_round(manager)

    assert outcome(job)[:3] == (Status.FAILED, Reason.TIMEOUT, 255)


def test_a_host_goes_down_once_until_it_is_seen_again(host: FakeEngine, manager: QueueManager) -> None:
    one_round(manager)
    be_found_down(host, manager)
    DockerHost.objects.update(
        last_down_at=F("last_down_at") - timedelta(hours=1), last_seen_at=now() - timedelta(hours=2)
    )
    first = DockerHost.objects.get().last_down_at

    be_found_down(host, manager)
    assert DockerHost.objects.get().last_down_at == first

    one_round(manager)
    be_found_down(host, manager)
    assert DockerHost.objects.get().last_down_at > first


@pytest.mark.parametrize(("is_over", "status"), [(False, Status.RUNNING), (True, Status.COMPLETED)])
def test_what_runs_since_a_time_that_a_dead_daemon_took_along_is_adopted(
    host: FakeEngine, manager: QueueManager, is_over: bool, status: Status
) -> None:
    job = queued(manager)

    def die() -> None:
        [container] = host.containers.values()
        container.started_at = None
        raise OutcomeUnknown

    host.after("start", die)
    manager.launch_next_batch()
    if is_over:
        host.end(row(job).container_id)
    let_leases_end()

    one_round(manager)
    one_round(manager)

    assert (row(job).status, row(job).attempt) == (status, 1)
    assert host.count("remove") == int(is_over)
