"""Launches of which something fails: an answer that is lost, a secret, the database, a rule, a transaction."""

import json
import threading
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import OperationalError, transaction

from container_manager.exceptions import (
    ContainerGone,
    ContainerManagerError,
    EngineError,
    EngineFailed,
    HostMisconfigured,
    QueueIsNewer,
    RequestRefused,
)
from container_manager.models import PROTOCOL, ContainerJob, Installation, Reason, Status
from container_manager.queue import QueueManager
from container_manager.types import Limits
from tests.fake_engine import (
    FakeEngine,
    Fleet,
    launched,
    let_leases_end,
    one_round,
    queued,
    raising,
    row,
)

is_over = threading.Event()
SECRETS = {"short": "abc", "long": "abcdef", "quoted": 'p"w\\é'}


def resolve(reference: str) -> str:
    return SECRETS[reference]


@pytest.fixture
def host(fleet: Fleet) -> FakeEngine:
    return fleet.add_host(max_concurrent_jobs=100)


@pytest.fixture
def manager(fleet: Fleet) -> QueueManager:
    return QueueManager(fleet)


@pytest.fixture
def resolver(settings: Any) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"SECRET_RESOLVER": f"{__name__}.resolve"}


@pytest.mark.parametrize(
    ("step", "happens", "left", "attempt"),
    [
        ("create", False, Status.LAUNCHING, 2),
        ("create", True, Status.LAUNCHING, 2),
        ("start", False, Status.STARTING, 2),
        ("start", True, Status.STARTING, 1),
    ],
)
def test_an_answer_that_is_lost_starts_no_second_container(
    host: FakeEngine, manager: QueueManager, step: str, happens: bool, left: Status, attempt: int
) -> None:
    job = queued(manager)
    host.lose_answer(step, happens=happens)
    manager.launch_next_batch()
    assert row(job).status == left
    let_leases_end()

    one_round(manager)
    one_round(manager)

    assert (row(job).status, row(job).attempt, row(job).retry_count) == (Status.RUNNING, attempt, 0)
    assert (len(host.starts), list(host.containers)) == (1, [row(job).container_id])


@pytest.mark.parametrize("step", ["create", "start"])
def test_what_a_frozen_engine_does_after_the_thaw_runs_once(
    fleet: Fleet, host: FakeEngine, manager: QueueManager, step: str
) -> None:
    fleet.timeout = 0.1
    job = queued(manager)
    # Right after the call before it.
    host.after({"create": "identify", "start": "create"}[step], host.freeze)
    manager.launch_next_batch()
    assert row(job).status == (Status.LAUNCHING if step == "create" else Status.STARTING)
    let_leases_end()

    host.thaw()
    one_round(manager)
    one_round(manager)

    assert (row(job).status, row(job).retry_count, len(host.starts)) == (Status.RUNNING, 0, 1)
    assert list(host.containers) == [row(job).container_id]


@pytest.mark.parametrize(
    ("code", "error", "status"),
    [
        (127, RequestRefused("start: not found"), Status.FAILED),
        (126, RequestRefused("start: not executable"), Status.FAILED),
        (128, EngineFailed("start: port is taken"), Status.SCHEDULED),
    ],
)
def test_a_start_that_is_refused_is_retried_only_if_that_may_help(
    host: FakeEngine, manager: QueueManager, code: int, error: EngineError, status: Status
) -> None:
    job = queued(manager)
    host.break_start(code, error)

    batch = manager.launch_next_batch()

    assert (row(job).status, job.attempts.get().exit_code, job.attempts.get().reason) == (status, code, Reason.LAUNCH)
    assert (batch.errors[0].error, host.containers, host.starts) == (str(error), {}, [])


def test_a_container_of_its_name_that_another_made_is_not_started(host: FakeEngine, manager: QueueManager) -> None:
    job = queued(manager)
    name = f"cm-{Installation.load().instance_id}-{job.pk}-1"
    engine = host.client()
    labels = {"container-manager.job": str(job.pk), "container-manager.attempt": "1"}
    engine.create(name, job.validated_spec(), environment={}, labels=labels, hardening=None)

    batch = manager.launch_next_batch()

    assert (batch.launched, row(job).status, host.starts) == (0, Status.LAUNCHING, [])


def test_a_database_error_in_one_launch_leaves_the_others(host: FakeEngine, manager: QueueManager) -> None:
    taken = ContainerJob.objects.create_job(image="busybox")
    ContainerJob.objects.filter(pk=taken.pk).update(status=Status.FAILED, container_id="f" * 64)
    usual = host.new_id
    ids = chain(["f" * 64], repeat(None))
    host.new_id = lambda: next(ids) or usual()
    jobs = [queued(manager) for _ in range(5)]

    batch = manager.launch_next_batch()

    assert (batch.launched, len(batch.job_ids)) == (4, 4)
    [error] = batch.errors
    assert error.error.startswith("the database failed: ")
    assert {job.pk for job in jobs} == {error.job_id, *batch.job_ids}
    assert ContainerJob.objects.running().count() == 4


@pytest.mark.parametrize("path", ["nowhere.resolve", f"{__name__}.no_such_function", "no-path"])
def test_a_resolver_that_is_not_there_is_a_charged_launch_error_of_its_job_alone(
    host: FakeEngine, manager: QueueManager, settings: Any, path: str
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"SECRET_RESOLVER": path}
    job, other = queued(manager, secret_environment={"A": "ref"}, max_retries=1), queued(manager)

    batch = manager.launch_next_batch()

    assert (row(job).status, row(job).retry_count, job.attempts.get().reason) == (Status.SCHEDULED, 1, Reason.LAUNCH)
    assert "SECRET_RESOLVER can't be imported" in row(job).last_error
    assert (batch.job_ids, host.count("create")) == ((other.pk,), 1)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("token abcdef, then abc", "token ***, then ***"),
        (f"bad value {json.dumps(SECRETS['quoted'])}", 'bad value "***"'),
        (f"bad value {json.dumps(SECRETS['quoted'], ensure_ascii=False)}", 'bad value "***"'),
        (f"bad value {SECRETS['quoted']}", "bad value ***"),
    ],
)
def test_no_part_of_any_secret_is_left_in_an_error(
    host: FakeEngine, manager: QueueManager, resolver: None, caplog: Any, said: str, kept: str
) -> None:
    references = {"A": "short", "B": "long", "C": "quoted"}
    job = queued(manager, secret_environment=references, max_retries=0)
    host.before("create", raising(EngineFailed(said)))

    batch = manager.launch_next_batch()

    assert row(job).last_error == job.attempts.get().error == batch.errors[0].error == kept
    assert (kept in caplog.text, said in caplog.text) == (True, False)


def test_no_secret_is_left_where_the_host_is_at_fault(host: FakeEngine, manager: QueueManager, resolver: None) -> None:
    job = queued(manager, secret_environment={"A": "long"})
    host.before("create", raising(HostMisconfigured("a proxy refuses abcdef")))

    manager.launch_next_batch()

    assert (row(job).status, row(job).last_error) == (Status.QUEUED, "a proxy refuses ***")


def hang(reference: str) -> str:
    is_over.wait(60)
    return ""


def test_a_resolver_that_hangs_is_a_launch_error_of_its_job_alone(
    host: FakeEngine, manager: QueueManager, settings: Any
) -> None:
    is_over.clear()
    ours = {"SECRET_RESOLVER": f"{__name__}.hang", "DOCKER_TIMEOUT_SECONDS": 0.2}
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | ours
    job, other = queued(manager, secret_environment={"A": "ref"}, max_retries=0), queued(manager)

    batch = manager.launch_next_batch()
    is_over.set()

    assert (row(job).status, batch.job_ids) == (Status.FAILED, (other.pk,))
    assert "the resolver did not answer within 0.2 s" in row(job).last_error


def test_what_ended_is_no_loss_if_its_logs_are_gone(host: FakeEngine, manager: QueueManager) -> None:
    job = launched(manager)
    host.end(job.container_id, 0)
    host.always("read_log", raising(ContainerGone("dead")))

    one_round(manager)

    assert (row(job).status, row(job).exit_code) == (Status.COMPLETED, 0)
    assert "unavailable: dead" in job.attempts.get().stdout


def test_a_job_is_saved_and_queued_or_neither(manager: QueueManager, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **fields: object) -> bool:
        raise OperationalError

    monkeypatch.setattr("container_manager.queue.move", fail)

    with pytest.raises(OperationalError):
        manager.queue_job(ContainerJob.objects.build(image="busybox"))

    assert not ContainerJob.objects.exists()


def test_secrets_reach_the_container(host: FakeEngine, manager: QueueManager, resolver: None) -> None:
    job = launched(manager, secret_environment={"A": "short"}, environment={"B": "plain"})

    given = host.containers[job.container_id].environment
    assert given == {"A": "abc", "B": "plain", "CM_JOB_ID": str(job.pk), "CM_ATTEMPT": "1"}


VERBS: dict[str, Callable[[QueueManager], Any]] = {
    "launch": lambda manager: manager.launch_next_batch(),
    "claim": lambda manager: manager.claim(5),
    "round": one_round,
    "for a while": lambda manager: manager.process_queue_continuous(5, 1, work_seconds=5),
    "for ever": lambda manager: manager.process_queue_continuous(5, 1),
    "limits": lambda manager: manager.keep_limits(Limits()),
    "look after": lambda manager: manager.look_after(ContainerJob.objects.get()),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_an_older_version_touches_nothing_of_a_newer_queue(host: FakeEngine, manager: QueueManager, verb: Any) -> None:
    job = queued(manager)
    Installation.load()
    Installation.objects.update(protocol=PROTOCOL + 1)
    before = ContainerJob.objects.values().get()

    with pytest.raises(QueueIsNewer):
        verb(manager)

    assert ContainerJob.objects.values().get(pk=job.pk) == before
    assert {call.step for call in host.calls} <= {"identify"}


@pytest.mark.parametrize("verb", ["launch", "round", "look after"])
def test_nothing_is_asked_of_an_engine_inside_a_transaction(host: FakeEngine, manager: QueueManager, verb: str) -> None:
    queued(manager)
    Installation.load()

    with pytest.raises(ContainerManagerError, match="transaction"), transaction.atomic():
        VERBS[verb](manager)

    assert host.calls == []


@pytest.mark.parametrize(
    ("allowed", "source", "is_allowed"),
    [(None, "cm-data", True), (None, "data", False), (None, "xcm-data", False), (["team-?"], "team-1", True),
     (["team-?"], "cm-data", False), ([], "cm-data", False)],
)  # fmt: skip
def test_a_job_mounts_only_volumes_that_are_allowed(
    database: str, settings: Any, allowed: list[str] | None, source: str, is_allowed: bool
) -> None:
    if allowed is not None:
        settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"ALLOWED_VOLUMES": allowed}
    mounts = [{"source": source, "target": "/data"}]

    if is_allowed:
        assert ContainerJob.objects.create_job(image="busybox", mounts=mounts).pk
        return
    with pytest.raises(ValidationError, match="ALLOWED_VOLUMES") as refused:
        ContainerJob.objects.create_job(image="busybox", mounts=mounts)
    assert set(refused.value.message_dict) == {"mounts"}


def test_a_volume_is_checked_again_at_launch(host: FakeEngine, manager: QueueManager, settings: Any) -> None:
    job = queued(manager, mounts=[{"source": "cm-data", "target": "/data"}])
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"ALLOWED_VOLUMES": ["team-*"]}

    manager.launch_next_batch()

    assert (row(job).status, row(job).reason, host.count("create")) == (Status.FAILED, Reason.LAUNCH, 0)
    assert row(job).last_error == "not allowed: mounts: 0: volume cm-data is not among the setting ALLOWED_VOLUMES"
