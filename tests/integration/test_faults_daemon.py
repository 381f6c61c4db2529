"""An Engine that is stopped, killed, frozen, restarted, gone or another's, while jobs run on it: the tests' own."""

import gc
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import docker
import pytest
from django.db import connections
from django.db.models import F
from django.utils.timezone import now

from container_manager.containers import INSTANCE_LABEL
from container_manager.hosts import PROBE_SECONDS
from container_manager.models import ContainerJob, DockerHost, Installation, Reason, Status
from container_manager.queue import QueueManager
from tests.conftest import missing, wait_until
from tests.fake_engine import in_background, launched, one_round, queued, row
from tests.integration.daemon import OwnDaemon, can_have_own_daemon, exported, own_daemon
from tests.integration.launcher import start_launcher

pytestmark = [
    # What differs between the databases is held by the tests on the stand-in.
    pytest.mark.parametrize("database", ["postgres"], indirect=True),
    # docker-py leaves a socket that does not connect, or a stream that breaks, to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SLEEP = ["sleep", "600"]
#: seconds; a daemon that starts, on a busy machine.
SOON = 60


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """What is left to the garbage collector is collected here, and not in a later test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def module_daemon(request: pytest.FixtureRequest, engine: docker.DockerClient) -> Iterator[OwnDaemon]:
    if not can_have_own_daemon():
        missing(request.config, "what an Engine of the tests' own needs (root, and dockerd on this machine)")
    with own_daemon(exported(engine)) as daemon:
        yield daemon


@pytest.fixture
def daemon(module_daemon: OwnDaemon) -> OwnDaemon:
    module_daemon.be_fresh()
    return module_daemon


@pytest.fixture
def host(database: str, daemon: OwnDaemon, settings: Any) -> DockerHost:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"ALLOWED_BIND_PREFIXES": [str(daemon.folder)]}
    return DockerHost.objects.create(name="own", base_url=daemon.base_url, max_concurrent_jobs=100)


@pytest.fixture
def witness(daemon: OwnDaemon) -> Iterator[Path]:
    """Where each container that runs writes its job's id: no daemon has to remember it."""
    file = daemon.folder / "ran"
    file.touch()
    yield file
    file.unlink()


def witnessed(witness: Path, then: str) -> dict[str, Any]:
    mount = {"type": "bind", "source": str(witness), "target": "/ran"}
    return {"command": ["sh", "-c", f"echo $CM_JOB_ID >>/ran; {then}"], "mounts": [mount]}


def runs(witness: Path) -> Counter[int]:
    return Counter(map(int, witness.read_text().split()))


def wait_for_run(witness: Path, *jobs: ContainerJob) -> None:
    """A container's first process ignores signals until it has set up its own."""
    wait_until(lambda: runs(witness).keys() >= {job.pk for job in jobs}, SOON)


def wait_for_end(daemon: OwnDaemon, job: ContainerJob) -> None:
    with daemon.client() as client:
        wait_until(lambda: client.containers.get(job.container_id).status == "exited", SOON)


def outcome(job: ContainerJob) -> tuple[Status, Reason, int | None]:
    ended = row(job)
    return ended.status, ended.reason, ended.exit_code


def test_what_a_stopped_engine_ends_is_told_from_what_failed_and_run_again_only_where_allowed(
    daemon: OwnDaemon, host: DockerHost, manager: QueueManager, witness: Path
) -> None:
    sleeper, patient, again = (
        launched(manager, **witnessed(witness, "exec sleep 600")),
        launched(manager, **witnessed(witness, "trap 'exit 0' TERM; while :; do sleep .1; done")),
        launched(manager, **witnessed(witness, "[ $CM_ATTEMPT = 2 ] || exec sleep 600"), rerun_on_lost=True),
    )
    wait_for_run(witness, sleeper, patient, again)

    daemon.stop()
    [anomaly] = one_round(manager).anomalies
    assert "host own: " in anomaly
    assert {row(job).status for job in (sleeper, patient, again)} == {Status.RUNNING}

    daemon.start()
    one_round(manager)
    assert outcome(sleeper) == (Status.FAILED, Reason.HOST_INTERRUPTED, 143)
    assert outcome(patient) == (Status.COMPLETED, Reason.EXIT_CODE, 0)
    assert (again.attempts.get().reason, again.attempts.get().exit_code) == (Reason.HOST_INTERRUPTED, 143)

    wait_until(lambda: one_round(manager) and row(again).status == Status.COMPLETED, SOON)
    assert runs(witness) == {sleeper.pk: 1, patient.pk: 1, again.pk: 2}


def test_what_a_stopped_engine_ended_unseen_may_have_failed_by_itself_and_says_so(
    daemon: OwnDaemon, host: DockerHost, manager: QueueManager
) -> None:
    failed, stopped = launched(manager, command=["sh", "-c", "exit 137"]), launched(manager, command=SLEEP)
    wait_for_end(daemon, failed)

    daemon.stop()
    daemon.start()
    one_round(manager)

    assert outcome(failed) == (Status.FAILED, Reason.EXIT_CODE, 137)
    assert row(stopped).exit_code != 0
    assert outcome(stopped)[:2] == (Status.FAILED, Reason.EXIT_CODE)
    assert {"which may be why" in row(job).last_error for job in (failed, stopped)} == {True}


@pytest.mark.parametrize("networks", [[], ["none"]], ids=["bridge", "none"])
def test_what_a_killed_daemon_ends_when_it_starts_again_is_interrupted_though_nobody_saw_it(
    daemon: OwnDaemon, host: DockerHost, manager: QueueManager, witness: Path, networks: list[str]
) -> None:
    failed = launched(manager, command=["sh", "-c", "exit 143"], networks=networks)
    killed = launched(manager, **witnessed(witness, "exec sleep 600"), networks=networks)
    wait_for_run(witness, killed)
    wait_for_end(daemon, failed)

    daemon.kill()
    daemon.start()
    one_round(manager)

    assert outcome(failed) == (Status.FAILED, Reason.EXIT_CODE, 143)
    assert outcome(killed) == (Status.FAILED, Reason.HOST_INTERRUPTED, 143)


def test_what_dies_with_its_machine_is_told_from_a_program_that_exits_with_the_same_code(
    daemon: OwnDaemon, host: DockerHost, manager: QueueManager
) -> None:
    failed = launched(manager, command=["sh", "-c", "exit 255"])
    crashed, again = launched(manager, command=SLEEP), launched(manager, command=SLEEP, rerun_on_lost=True)
    wait_for_end(daemon, failed)

    daemon.crash()
    daemon.start()
    one_round(manager)

    assert outcome(failed) == (Status.FAILED, Reason.EXIT_CODE, 255)
    assert outcome(crashed) == (Status.FAILED, Reason.HOST_INTERRUPTED, 255)
    assert (again.attempts.get().reason, row(again).status) == (Reason.HOST_INTERRUPTED, Status.SCHEDULED)


def test_an_exit_code_that_looks_like_an_interruption_is_none_while_the_daemon_runs(
    host: DockerHost, manager: QueueManager
) -> None:
    codes = (137, 143, 255)
    jobs = [launched(manager, command=["sh", "-c", f"exit {code}"]) for code in codes]

    wait_until(lambda: one_round(manager) and not ContainerJob.objects.alive().exists(), SOON)

    assert [outcome(job) for job in jobs] == [(Status.FAILED, Reason.EXIT_CODE, code) for code in codes]
    assert [row(job).last_error for job in jobs] == [f"exited with code {code}" for code in codes]


@pytest.mark.parametrize("end", [OwnDaemon.stop, OwnDaemon.kill])
def test_jobs_of_an_engine_with_live_restore_do_not_notice_its_restart(
    daemon: OwnDaemon, host: DockerHost, manager: QueueManager, witness: Path, end: Any
) -> None:
    daemon.stop()
    daemon.start("--live-restore")
    job = launched(manager, **witnessed(witness, "while [ $(wc -l </ran) -lt 3 ]; do sleep .1; done"))
    killed = launched(manager, **witnessed(witness, "exec sleep 600"))
    wait_for_run(witness, job, killed)

    end(daemon)
    assert one_round(manager).jobs_ended == 0
    daemon.start("--live-restore")
    assert one_round(manager).jobs_ended == 0
    with witness.open("a") as file:
        file.write("0\n")
    with daemon.client() as client:
        client.containers.get(killed.container_id).kill()
    wait_until(lambda: one_round(manager) and not ContainerJob.objects.alive().exists(), SOON)

    assert outcome(job) == (Status.COMPLETED, Reason.EXIT_CODE, 0)
    # Somebody killed it; the Engine did not.
    assert outcome(killed) == (Status.FAILED, Reason.EXIT_CODE, 137)
    assert runs(witness) == {0: 1, job.pk: 1, killed.pk: 1}


def test_a_deadline_that_passes_while_the_engine_is_away_is_kept_when_it_is_back(
    daemon: OwnDaemon, host: DockerHost, manager: QueueManager, witness: Path
) -> None:
    daemon.stop()
    daemon.start("--live-restore")
    job = launched(manager, **witnessed(witness, "exec sleep 600"))
    wait_for_run(witness, job)
    daemon.stop()
    ContainerJob.objects.update(deadline_at=now() - timedelta(seconds=1))
    assert one_round(manager).jobs_stopped == 0
    assert (row(job).status, row(job).stop_requested_at) == (Status.RUNNING, None)

    daemon.start("--live-restore")
    assert one_round(manager).jobs_stopped == 1
    wait_until(lambda: one_round(manager) and row(job).status == Status.FAILED, SOON)

    assert outcome(job) == (Status.FAILED, Reason.TIMEOUT, 143)


def test_a_frozen_engine_that_thaws_does_late_what_it_was_asked_for_and_nothing_runs_twice(
    daemon: OwnDaemon, host: DockerHost, manager: QueueManager, witness: Path, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"DOCKER_TIMEOUT_SECONDS": 1, "LEASE_SECONDS": 3}
    jobs = [queued(manager, **witnessed(witness, "sleep .3")) for _ in range(12)]

    with in_background(lambda _: manager.launch_next_batch(100)) as batch:
        wait_until(lambda: runs(witness))
        daemon.signal("STOP")
        # A busy machine may have had them all launched by now; what counts is that none is launched twice.
        assert batch.result(SOON).launched <= len(jobs)
    connections["default"].close()
    for _ in range(3):
        # The leases end, and are taken over.
        one_round(manager)
        time.sleep(1)
    assert not ContainerJob.objects.filter(status=Status.FAILED).exists()
    daemon.signal("CONT")
    wait_until(lambda: one_round(manager) and not ContainerJob.objects.exclude(status=Status.COMPLETED).exists(), SOON)

    assert runs(witness) == {job.pk: 1 for job in jobs}
    with daemon.client() as client:
        wait_until(lambda: one_round(manager) and client.containers.list(all=True) == [], SOON)


def test_a_daemon_killed_again_and_again_fails_no_job_and_runs_no_attempt_twice(
    daemon: OwnDaemon, host: DockerHost, manager: QueueManager, witness: Path, settings: Any, tmp_path: Path
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"DOCKER_TIMEOUT_SECONDS": 3, "LEASE_SECONDS": 9}
    daemon.stop()
    daemon.start("--live-restore")
    # An exit that falls together with the daemon's death is lost with it: none does.
    closed = daemon.folder / "closed"
    work = witnessed(witness, "sleep .3; while [ -e /shared/closed ]; do sleep .1; done")
    work["mounts"].append({"type": "bind", "source": str(daemon.folder), "target": "/shared"})
    jobs = [queued(manager, **work, networks=["none"]) for _ in range(30)]

    launchers = [start_launcher(tmp_path / str(number), 8) for number in range(3)]
    for kills in range(4):
        wait_until(lambda kills=kills: len(runs(witness)) > 5 * kills, SOON)
        closed.touch()
        time.sleep(1)
        daemon.kill()
        daemon.start("--live-restore")
        closed.unlink()
    codes = [launcher.wait(120) for launcher in launchers]

    logs = "".join((tmp_path / str(number)).read_text() for number in range(len(launchers)))
    assert codes == [0] * len(launchers), logs
    others = ContainerJob.objects.exclude(status=Status.COMPLETED)
    assert list(others.values_list("pk", "status", "reason", "exit_code", "last_error")) == [], logs
    # A daemon that dies between a program's start and its own note of it has forgotten that it ran: what was
    # being started may run again, as another attempt.
    claims = {job.pk: row(job).attempt for job in jobs}
    assert all(1 <= runs(witness)[pk] <= claims[pk] for pk in claims), (runs(witness), claims, logs)


@pytest.mark.parametrize("is_frozen", [False, True], ids=["gone", "frozen"])
def test_a_dead_engine_costs_a_pass_one_short_wait_and_the_other_hosts_nothing(
    daemon: OwnDaemon, host: DockerHost, docker_host: DockerHost, manager: QueueManager, settings: Any, is_frozen: bool
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"HOST_GRACE_SECONDS": 1}
    stuck = [launched(manager, command=SLEEP, pinned_host=host) for _ in range(2)]
    daemon.signal("STOP" if is_frozen else "KILL")
    there = queued(manager, command=["true"], pinned_host=docker_host)

    began = time.monotonic()
    first = one_round(manager)
    waited = time.monotonic() - began
    began = time.monotonic()
    second = manager.process_queue_continuous(2, 1, work_seconds=0)
    waited_again = time.monotonic() - began

    assert waited < 3 * PROBE_SECONDS
    assert waited_again < PROBE_SECONDS
    assert ["host own: " in problem for stats in (first, second) for problem in stats.anomalies] == [True] * 2
    wait_until(lambda: one_round(manager) and row(there).status == Status.COMPLETED, SOON)
    # Once the host has been silent for so long, its jobs no longer fill the slots of all.
    waiting = queued(manager, command=["true"], pinned_host=docker_host)
    DockerHost.objects.filter(pk=host.pk).update(last_seen_at=F("last_seen_at") - timedelta(seconds=2))
    wait_until(
        lambda: manager.process_queue_continuous(2, 1, work_seconds=0) and row(waiting).status == Status.COMPLETED, SOON
    )
    assert {row(job).status for job in stuck} == {Status.RUNNING}


def test_an_engine_without_a_bridge_runs_jobs_without_a_network(
    daemon: OwnDaemon, host: DockerHost, manager: QueueManager
) -> None:
    daemon.stop()
    daemon.start("--bridge=none")
    job, failed = launched(manager, command=["true"]), launched(manager, command=["sh", "-c", "exit 137"])

    wait_until(lambda: one_round(manager) and not ContainerJob.objects.alive().exists(), SOON)

    assert outcome(job) == (Status.COMPLETED, Reason.EXIT_CODE, 0)
    assert outcome(failed) == (Status.FAILED, Reason.EXIT_CODE, 137)


def test_two_workers_with_another_engine_behind_the_same_path_leave_each_others_alone(
    daemon: OwnDaemon, host: DockerHost, docker_host: DockerHost, engine: docker.DockerClient, events: list[dict],
    manager: QueueManager, witness: Path, tmp_path: Path, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    elsewhere = docker_host.base_url.removeprefix("unix://")
    if "://" in elsewhere:
        missing(request.config, "a Docker Engine at a unix socket")
    docker_host.delete()
    path = daemon.folder / "docker.sock.of-both"
    path.touch()
    with daemon.client() as client:
        DockerHost.objects.update(base_url=f"unix://{path}", engine_id=client.info()["ID"])
    jobs = [queued(manager, **witnessed(witness, "sleep 1")) for _ in range(8)]

    def worker(name: str, socket: str) -> Any:
        mounted = ["unshare", "--mount", "sh", "-c", f'mount --bind {socket} {path} && exec "$0" "$@"']
        return start_launcher(tmp_path / name, 3, before=mounted)

    workers = [worker("own", daemon.base_url.removeprefix("unix://")), worker("elsewhere", elsewhere)]
    codes = [each.wait(120) for each in workers]

    logs = [(tmp_path / name).read_text() for name in ("own", "elsewhere")]
    assert codes == [0, 0], logs
    assert [set(ContainerJob.objects.values_list("status", "attempt")), runs(witness)] == [
        {(Status.COMPLETED, 1)},
        {job.pk: 1 for job in jobs},
    ]
    assert ["another Engine answers at this address" in log for log in logs] == [False, True], logs
    label = f"{INSTANCE_LABEL}={Installation.load().instance_id}"
    assert (engine.containers.list(all=True, filters={"label": label}), events) == ([], [])
