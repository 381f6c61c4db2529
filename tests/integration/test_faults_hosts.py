"""Hosts that fail, hang, move, are replaced or deleted, while the others go on."""

import gc
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
from django.db import connections

from container_manager.exceptions import HostMisconfigured, HostUnavailable, OutcomeUnknown
from container_manager.models import ContainerJob, DockerHost, Reason, Status
from container_manager.queue import QueueManager
from tests.conftest import ROOT, database_url, wait_until
from tests.fake_engine import (
    FakeEngine,
    Fleet,
    in_background,
    launched,
    let_leases_end,
    one_round,
    queued,
    raising,
    row,
)


@pytest.fixture
def manager(fleet: Fleet) -> QueueManager:
    return QueueManager(fleet)


def threads(prefix: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)]


def with_many_ended(manager: QueueManager, host: FakeEngine, count: int = 12) -> list[ContainerJob]:
    jobs = [queued(manager) for _ in range(count)]
    manager.launch_next_batch(1000)
    for container_id in list(host.containers):
        host.end(container_id)
    return jobs


@pytest.mark.parametrize("kind", [HostUnavailable, HostMisconfigured, OutcomeUnknown])
def test_one_failing_call_closes_a_host_for_the_rest_of_the_round(
    fleet: Fleet, manager: QueueManager, settings: Any, kind: type[Exception]
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"LAUNCH_THREADS": 1}
    host = fleet.add_host(max_concurrent_jobs=100)
    jobs = with_many_ended(manager, host)
    queued(manager)
    host.always("inspect", raising(kind("inspect: no answer")))
    before = len(host.calls)

    stats = one_round(manager)

    assert [call.step for call in host.calls[before:]] == ["identify", "list", "inspect"]
    assert (stats.jobs_ended, stats.jobs_launched) == (0, 0)
    assert ContainerJob.objects.running().count() == len(jobs)


def test_the_round_after_asks_the_host_again(fleet: Fleet, manager: QueueManager) -> None:
    host = fleet.add_host(max_concurrent_jobs=100)
    jobs = with_many_ended(manager, host)
    host.before("inspect", raising(HostUnavailable()))
    one_round(manager)

    stats = one_round(manager)

    assert (stats.anomalies, ContainerJob.objects.filter(status=Status.COMPLETED).count()) == ((), len(jobs))


def test_the_other_hosts_go_on_in_the_same_round(fleet: Fleet, manager: QueueManager) -> None:
    broken, sound = fleet.add_host("broken"), fleet.add_host("sound")
    on_broken = launched(manager, pinned_host=DockerHost.objects.get(name="broken"))
    on_sound = launched(manager, pinned_host=DockerHost.objects.get(name="sound"))
    broken.end(on_broken.container_id)
    sound.end(on_sound.container_id)
    broken.always("inspect", raising(HostUnavailable()))
    waiting = queued(manager)

    one_round(manager)

    assert (row(on_broken).status, row(on_sound).status) == (Status.RUNNING, Status.COMPLETED)
    assert (row(waiting).status, row(waiting).slot_host.name) == (Status.RUNNING, "sound")


def test_a_host_that_hangs_costs_a_round_one_timeout(fleet: Fleet, manager: QueueManager) -> None:
    fleet.timeout = 0.2
    hanging, sound = fleet.add_host("hanging"), fleet.add_host("sound")
    jobs = [launched(manager, pinned_host=DockerHost.objects.get(name="hanging")) for _ in range(3)]
    job = launched(manager, pinned_host=DockerHost.objects.get(name="sound"))
    sound.end(job.container_id)
    hanging.freeze()

    stats = one_round(manager)
    hanging.thaw()

    assert stats.anomalies == ("host hanging: identify: read timed out",)
    assert (row(job).status, [row(each).status for each in jobs]) == (Status.COMPLETED, [Status.RUNNING] * 3)


@pytest.mark.parametrize("error", [RuntimeError("no existing session"), KeyError("ID"), EOFError()])
def test_a_probe_that_raises_anything_does_not_close_a_host_for_good(
    fleet: Fleet, manager: QueueManager, error: Exception
) -> None:
    host = fleet.add_host()
    job = queued(manager)
    host.before("identify", raising(error))

    [anomaly] = one_round(manager).anomalies
    stats = one_round(manager)

    assert type(error).__name__ in anomaly
    assert (stats.anomalies, stats.job_ids) == ((), (job.pk,))


def test_idle_passes_leave_no_threads_and_no_watches(fleet: Fleet, manager: QueueManager) -> None:
    host = fleet.add_host()
    manager.process_queue_continuous(5, 1, work_seconds=5)
    before = threading.active_count()

    for _ in range(50):
        manager.process_queue_continuous(5, 1, work_seconds=5)

    wait_until(lambda: host.watches == [] and threads("events-local") == [])
    assert threading.active_count() <= before


# A stream that is closed under its reader is left to the garbage collector, which says so.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_idle_passes_leave_no_sockets(docker_host: DockerHost) -> None:
    manager = QueueManager()

    def sockets_after(passes: int) -> int:
        for _ in range(passes):
            manager.process_queue_continuous(5, 1, work_seconds=5)
        wait_until(lambda: threads("events-local") == [])
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    few = sockets_after(5)

    assert sockets_after(50) <= few


def test_listeners_follow_a_hosts_address_and_go_with_it(fleet: Fleet, manager: QueueManager) -> None:
    old, new = fleet.add_host("moving"), fleet.at("unix:///new.sock")

    with in_background(lambda stop: manager.process_queue_continuous(5, 0.1, stop)):
        wait_until(lambda: old.watches)

        DockerHost.objects.update(base_url="unix:///new.sock", engine_id="")
        wait_until(lambda: new.watches and not old.watches)

        DockerHost.objects.all().delete()
        wait_until(lambda: not new.watches and not threads("events-moving") and not threads("host-moving"))


def test_an_end_that_the_list_does_not_show_yet_is_harvested_by_its_event(fleet: Fleet, manager: QueueManager) -> None:
    host = fleet.add_host()
    host.list_lag = 3600
    job = launched(manager)

    with in_background(lambda stop: manager.process_queue_continuous(5, 1, stop, work_seconds=10)):
        wait_until(lambda: host.watches)
        host.end(job.container_id, 0)
        wait_until(lambda: row(job).status == Status.COMPLETED)


def test_another_engine_at_the_address_does_not_mean_that_the_known_one_is_down(
    fleet: Fleet, manager: QueueManager
) -> None:
    host = fleet.add_host()
    job = launched(manager)
    host.replace("engine-of-another-machine")

    [anomaly] = one_round(manager).anomalies
    assert "another Engine answers" in anomaly

    host.replace("engine-1")
    host.end(job.container_id, 137)
    one_round(manager)
    assert (row(job).status, row(job).reason) == (Status.FAILED, Reason.EXIT_CODE)
    assert (DockerHost.objects.get().last_down_at, DockerHost.objects.get().last_error) == (None, "")


def test_of_two_machines_at_first_contact_one_works(fleet: Fleet, manager: QueueManager) -> None:
    host = fleet.add_host()
    job = queued(manager)
    DockerHost.objects.update(engine_id="")

    def be_first() -> None:
        """Between our look at the row and the answer."""
        DockerHost.objects.update(engine_id="engine-of-another-machine")
        connections.close_all()

    host.before("identify", be_first)

    [anomaly] = one_round(manager).anomalies

    assert "another Engine answers" in anomaly
    assert (row(job).status, DockerHost.objects.get().engine_id) == (Status.QUEUED, "engine-of-another-machine")


def test_nothing_of_a_host_is_touched_while_another_engine_answers(fleet: Fleet, manager: QueueManager) -> None:
    host = fleet.add_host()
    job = launched(manager)
    waiting = queued(manager)
    host.replace("engine-of-another-machine")
    before = len(host.calls)

    one_round(manager)

    assert {call.step for call in host.calls[before:]} == {"identify"}
    assert (row(job).status, row(waiting).status) == (Status.RUNNING, Status.QUEUED)


def test_another_engine_is_worked_with_once_it_is_accepted(fleet: Fleet, manager: QueueManager) -> None:
    host = fleet.add_host()
    one_round(manager)
    host.replace("engine-of-another-machine")
    job = queued(manager)
    one_round(manager)
    assert row(job).status == Status.QUEUED

    DockerHost.objects.update(engine_id="")
    one_round(manager)

    assert row(job).status == Status.RUNNING
    assert DockerHost.objects.get().engine_id == "engine-of-another-machine"


def test_a_claim_whose_launcher_and_host_died_runs_on_another_host(fleet: Fleet, manager: QueueManager) -> None:
    dead, idle = fleet.add_host("dead", max_concurrent_jobs=20), fleet.add_host("idle")
    job = queued(manager)
    [claimed] = QueueManager(fleet).claim(1)
    assert claimed.slot_host.name == "dead"
    let_leases_end()
    dead.down()

    stats = one_round(manager)

    assert (stats.jobs_recovered, stats.job_ids) == (1, (job.pk,))
    assert (row(job).status, row(job).slot_host.name, row(job).retry_count) == (Status.RUNNING, "idle", 0)
    assert (len(dead.starts), len(idle.starts)) == (0, 1)


def test_a_cancelled_claim_of_an_unreachable_host_ends(fleet: Fleet, manager: QueueManager) -> None:
    host = fleet.add_host()
    job = queued(manager)
    QueueManager(fleet).claim(1)
    manager.cancel_job(job)
    let_leases_end()
    host.down()

    one_round(manager)

    assert (row(job).status, row(job).slot_host) == (Status.CANCELLED, None)


def test_a_host_that_is_away_fails_no_job(fleet: Fleet, manager: QueueManager) -> None:
    host = fleet.add_host()
    running, waiting = launched(manager), queued(manager)
    host.down()
    for _ in range(3):
        one_round(manager)
    assert (row(running).status, row(waiting).status) == (Status.RUNNING, Status.QUEUED)

    host.up()
    host.end(running.container_id, 0)
    stats = one_round(manager)

    assert (row(running).status, stats.job_ids) == (Status.COMPLETED, (waiting.pk,))


#: Launches a job, forks, and launches another in the child, whose exit code says whether that runs.
FORKS = """
import os, django
django.setup()
from django.db import connections
from container_manager.queue import QueueManager
from tests.fake_engine import Fleet, launched
fleet = Fleet()
fleet.add_host()
manager = QueueManager(fleet)
launched(manager)
connections.close_all()
child = os.fork()
if child == 0:
    launched(manager)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_process_that_forks_takes_no_connection_and_no_thread_to_an_engine_along(database: str) -> None:
    environment = os.environ | {"DATABASE_URL": database_url(), "DJANGO_SETTINGS_MODULE": "container_manager.settings"}

    subprocess.run([sys.executable, "-c", FORKS], cwd=ROOT, env=environment, timeout=30, check=True)

    assert ContainerJob.objects.running().count() == 2
