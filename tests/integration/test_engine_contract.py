"""What the queue relies on an Engine for: the same cases for a real one and for the stand-in of the other tests."""

import os
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import docker
import pytest

from container_manager.containers import INSTANCE_LABEL, container_name
from container_manager.engine import DockerEngine, Engine, Stream
from container_manager.exceptions import (
    ContainerGone,
    ContainerNotRunning,
    ContainerRunning,
    EngineError,
    EngineFailed,
    ImageMissing,
    NameTaken,
    RequestRefused,
)
from container_manager.logs import BoundedLog
from container_manager.types import ContainerSpec, EngineAddress, Hardening, Observation
from tests.conftest import wait_until
from tests.fake_engine import FakeEngine

GONE = "f" * 64
SLEEP = ["sleep", "60"]
#: Says when its init is there: the first process of a container ignores TERM until it has asked for it.
UP = ["sh", "-c", "echo up; exec sleep 60"]
DEAF = ["sh", "-c", "trap '' TERM; echo up; while true; do sleep 1; done"]
HARDENING = Hardening(pids_limit=64, cap_drop_all=False, log_driver="local", log_options={})
#: Nothing listens there, so that no registry is asked.
NOWHERE = "localhost:1/no-such-image"


@pytest.fixture
def instance() -> str:
    return secrets.token_hex(4)


@pytest.fixture(params=["fake", "docker"])
def contract(request: pytest.FixtureRequest, instance: str) -> Iterator[Engine]:
    if request.param == "fake":
        yield FakeEngine().client()
        return
    client: docker.DockerClient = request.getfixturevalue("engine")
    address = EngineAddress(base_url=os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
    yield DockerEngine(address, 20)
    for container in client.containers.list(all=True, filters={"label": f"{INSTANCE_LABEL}={instance}"}):
        with suppress(docker.errors.NotFound):
            container.remove(force=True, v=True)


def create(
    engine: Engine, instance: str, job_id: int = 1, own_labels: dict[str, str] | None = None, **fields: Any
) -> str:
    spec = ContainerSpec(**{"image": "busybox", "command": SLEEP} | fields)
    values = {"instance": instance} | (own_labels or {"job": str(job_id), "attempt": "1", "token": "ours"})
    labels = {f"container-manager.{name}": value for name, value in values.items()}
    return engine.create(container_name(instance, job_id, 1), spec, environment={}, labels=labels, hardening=HARDENING)


def started(engine: Engine, instance: str, **fields: Any) -> str:
    container_id = create(engine, instance, **fields)
    engine.start(container_id)
    return container_id


def ended(engine: Engine, container_id: str) -> Observation:
    wait_until(lambda: engine.inspect(container_id).has_ended)
    return engine.inspect(container_id)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each of the calls returns or raises, all of them in threads."""
    with ThreadPoolExecutor(len(calls)) as threads:
        futures = [threads.submit(call) for call in calls]
    return [future.exception() or future.result() for future in futures]


def log_of(engine: Engine, container_id: str, stream: Stream = "stdout") -> str:
    log = BoundedLog(1000, 1000)
    engine.read_log(container_id, stream, log, 10)
    return log.text()


def end_of(engine: Engine, container_id: str, lines: int) -> str:
    log = BoundedLog(0, 1000)
    engine.read_end(container_id, "stdout", log, lines, 10)
    return log.end()


def test_an_engine_has_an_id_that_stays(contract: Engine) -> None:
    assert contract.identify()
    assert contract.identify() == contract.identify()


def test_a_created_container_has_not_run(contract: Engine, instance: str) -> None:
    container_id = create(contract, instance)

    seen = contract.inspect(container_id)

    assert (seen.container_id, seen.state, seen.token) == (container_id, "created", "ours")
    assert (seen.has_run, seen.has_ended, seen.started_at, seen.finished_at) == (False, False, None, None)
    assert log_of(contract, container_id) == ""


def test_the_end_of_a_running_containers_log_is_read(contract: Engine, instance: str) -> None:
    container_id = started(contract, instance, command=UP)

    wait_until(lambda: end_of(contract, container_id, 10) == "up\n")
    assert end_of(contract, container_id, 1) == "up\n"
    with pytest.raises(ContainerGone):
        end_of(contract, GONE, 1)


def test_a_name_is_given_once(contract: Engine, instance: str) -> None:
    create(contract, instance)

    with pytest.raises(NameTaken):
        create(contract, instance)

    assert len(contract.list(instance)) == 1


def test_of_two_creates_at_once_one_gets_the_name(contract: Engine, instance: str) -> None:
    answers = at_once(*[lambda: create(contract, instance)] * 2)

    [made] = contract.list(instance)
    assert made.id in answers
    assert [type(answer) for answer in answers if answer != made.id] == [NameTaken]


def test_a_name_is_free_again_after_its_container_is_removed(contract: Engine, instance: str) -> None:
    contract.remove(create(contract, instance))

    create(contract, instance)

    assert len(contract.list(instance)) == 1


def test_a_container_is_found_by_its_exact_name(contract: Engine, instance: str) -> None:
    create(contract, instance, 88)
    wanted = create(contract, instance, 8)

    assert contract.inspect(container_name(instance, 8, 1)).container_id == wanted
    with pytest.raises(ContainerGone):
        contract.inspect(container_name(instance, 888, 1))


def test_the_list_has_the_containers_of_one_installation_in_every_state(contract: Engine, instance: str) -> None:
    created = create(contract, instance, 1)
    running = started(contract, instance, job_id=2)
    over = started(contract, instance, job_id=3, command=["true"])
    ended(contract, over)

    def states() -> dict[str, str]:
        return {container.id: container.state for container in contract.list(instance)}

    wait_until(lambda: states() == {created: "created", running: "running", over: "exited"})
    [first] = [container for container in contract.list(instance) if container.id == created]
    assert (first.name, first.job_id, first.attempt) == (container_name(instance, 1, 1), 1, 1)
    assert contract.list(f"{instance}x") == []


@pytest.mark.parametrize(
    "labels", [{"token": "x"}, {"job": "", "attempt": "-1"}, {"job": "one", "attempt": "1.5"}, {"job": "9" * 30}]
)
def test_what_is_labelled_oddly_is_listed_as_no_jobs(contract: Engine, instance: str, labels: dict[str, str]) -> None:
    container_id = create(contract, instance, own_labels=labels)

    [listed] = contract.list(instance)

    assert (listed.id, listed.job_id, listed.attempt) == (container_id, None, None)
    assert contract.inspect(container_id).token == labels.get("token", "")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ([], 0),
        (["true"], 0),
        (["false"], 1),
        (["sh", "-c", "exit 42"], 42),
        (["no-such-program"], 127),
        (["/etc"], 126),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_exit_code_is_the_programs(contract: Engine, instance: str, command: list[str], code: int) -> None:
    seen = ended(contract, started(contract, instance, command=command))

    assert (seen.state, seen.exit_code, seen.oom_killed, seen.has_run) == ("exited", code, False, True)
    assert seen.finished_at is not None


def test_what_needs_more_memory_than_its_limit_is_killed(contract: Engine, instance: str) -> None:
    # An Engine may miss what happens in a container's first moments, and then never learns of it.
    command = ["sh", "-c", "sleep 0.5; tail /dev/zero"]

    seen = ended(contract, started(contract, instance, command=command, memory_limit_mib=8))

    assert (seen.exit_code, seen.oom_killed) == (137, True)


def test_each_stream_is_read_alone(contract: Engine, instance: str) -> None:
    container_id = started(contract, instance, command=["sh", "-c", "echo out; echo err >&2"])
    ended(contract, container_id)

    assert log_of(contract, container_id, "stdout") == "out\n"
    assert log_of(contract, container_id, "stderr") == "err\n"


def test_to_start_what_runs_changes_nothing(contract: Engine, instance: str) -> None:
    container_id = started(contract, instance)
    since = contract.inspect(container_id).started_at

    contract.start(container_id)

    assert (contract.inspect(container_id).state, contract.inspect(container_id).started_at) == ("running", since)


def test_two_starts_at_once_run_it_once(contract: Engine, instance: str) -> None:
    container_id = create(contract, instance, command=DEAF)

    answers = at_once(*[lambda: contract.start(container_id)] * 2)

    wait_until(lambda: log_of(contract, container_id) == "up\n")
    assert (answers, contract.inspect(container_id).state) == ([None, None], "running")


def test_to_start_what_has_ended_runs_it_again(contract: Engine, instance: str) -> None:
    container_id = started(contract, instance, command=["sh", "-c", "echo out; echo err >&2"])
    first = ended(contract, container_id)

    contract.start(container_id)

    again = ended(contract, container_id)
    wait_until(lambda: log_of(contract, container_id) == "out\nout\n")
    assert (again.exit_code, again.started_at > first.started_at) == (0, True)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"user": "no-such-user"}, EngineFailed),
        ({"networks": ["no-such-network"]}, ContainerGone),
        ({"networks": ["bridge", "no-such-network"]}, ContainerGone),
    ],
    ids=["user", "network", "second network"],
)
def test_a_start_that_fails_leaves_a_container_that_has_not_run(
    contract: Engine, instance: str, fields: dict, error: type[EngineError]
) -> None:
    container_id = create(contract, instance, **fields)

    with pytest.raises(error):
        contract.start(container_id)

    seen = contract.inspect(container_id)
    assert (seen.state, seen.exit_code, seen.has_run, bool(seen.error)) == ("created", 128, False, True)
    contract.remove(container_id)
    assert contract.list(instance) == []


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"image": NOWHERE}, ImageMissing), ({"cpu_limit": 8000}, RequestRefused)],
    ids=["image", "cpus"],
)
def test_a_create_that_fails_leaves_nothing(
    contract: Engine, instance: str, fields: dict, error: type[EngineError]
) -> None:
    with pytest.raises(error):
        create(contract, instance, **fields)

    assert contract.list(instance) == []


@pytest.mark.parametrize(("signal", "code"), [("SIGTERM", 143), ("SIGKILL", 137)])
def test_a_signal_ends_what_runs(contract: Engine, instance: str, signal: Any, code: int) -> None:
    container_id = started(contract, instance, command=UP)
    wait_until(lambda: log_of(contract, container_id) == "up\n")

    contract.signal(container_id, signal)

    assert ended(contract, container_id).exit_code == code


@pytest.mark.parametrize("by", ["the container's end", "whoever follows"])
def test_what_is_written_is_followed_until_an_end(contract: Engine, instance: str, by: str) -> None:
    container_id = started(contract, instance, command=UP)
    follow, told = contract.follow_log(container_id, "stdout"), []

    def listen() -> None:
        # A stream that is closed under its reader looks like one that broke.
        with suppress(EngineError):
            told.extend(follow)

    listener = threading.Thread(target=listen)
    listener.start()
    wait_until(lambda: told)
    state = contract.inspect(container_id).state
    if by == "whoever follows":
        follow.close()
    else:
        contract.signal(container_id, "SIGKILL")
    listener.join(10)
    follow.close()

    assert (b"".join(told), state, listener.is_alive()) == (b"up\n", "running", False)


def test_a_program_may_ignore_term_and_not_kill(contract: Engine, instance: str) -> None:
    container_id = started(contract, instance, command=DEAF)
    wait_until(lambda: log_of(contract, container_id) == "up\n")

    contract.signal(container_id, "SIGTERM")
    assert contract.inspect(container_id).state == "running"

    contract.signal(container_id, "SIGKILL")
    assert ended(contract, container_id).exit_code == 137


def test_a_daemon_tells_since_when_it_runs(contract: Engine, instance: str) -> None:
    seen = contract.inspect(started(contract, instance))

    daemon = contract.daemon()

    assert daemon.started_at < seen.started_at < daemon.now


@pytest.mark.parametrize("networks", [[], ["none"]], ids=["bridge", "none"])
def test_a_daemon_that_sees_an_end_takes_the_network_endpoint_back(
    contract: Engine, instance: str, networks: list[str]
) -> None:
    container_id = create(contract, instance, networks=networks)
    assert not contract.inspect(container_id).has_endpoint
    contract.start(container_id)
    assert contract.inspect(container_id).has_endpoint

    contract.signal(container_id, "SIGKILL")

    assert not ended(contract, container_id).has_endpoint


@pytest.mark.parametrize("has_run", [False, True])
def test_what_does_not_run_is_not_signalled(contract: Engine, instance: str, has_run: bool) -> None:
    container_id = create(contract, instance, command=["true"])
    if has_run:
        contract.start(container_id)
        ended(contract, container_id)

    with pytest.raises(ContainerNotRunning):
        contract.signal(container_id, "SIGTERM")


def test_what_runs_is_not_removed(contract: Engine, instance: str) -> None:
    container_id = started(contract, instance)

    with pytest.raises(ContainerRunning):
        contract.remove(container_id)

    assert contract.inspect(container_id).state == "running"


@pytest.mark.parametrize("has_run", [False, True])
def test_what_does_not_run_is_removed_and_may_be_removed_again(contract: Engine, instance: str, has_run: bool) -> None:
    container_id = create(contract, instance, command=["true"])
    if has_run:
        contract.start(container_id)
        ended(contract, container_id)

    contract.remove(container_id)
    contract.remove(container_id)

    assert contract.list(instance) == []


def test_what_is_gone_is_told_at_every_step_but_its_removal(contract: Engine) -> None:
    for call in (
        lambda: contract.inspect(GONE),
        lambda: contract.start(GONE),
        lambda: contract.signal(GONE, "SIGTERM"),
        lambda: log_of(contract, GONE),
        lambda: contract.follow_log(GONE, "stdout"),
    ):
        with pytest.raises(ContainerGone):
            call()

    contract.remove(GONE)


def test_a_pull_fails_where_no_registry_has_the_image(contract: Engine, instance: str) -> None:
    with pytest.raises(EngineFailed):
        contract.pull(NOWHERE, 10)

    with pytest.raises(ImageMissing):
        create(contract, instance, image=NOWHERE)


def test_a_watch_tells_the_ends_of_one_installation_until_it_is_closed(contract: Engine, instance: str) -> None:
    watch, told = contract.watch_ends(instance), []
    other = contract.watch_ends(f"{instance}x")

    def listen() -> None:
        # A stream that is closed under its reader looks like one that broke.
        with suppress(EngineError):
            for container_id in watch:
                told.append(container_id)

    listener = threading.Thread(target=listen)
    listener.start()

    container_id = started(contract, instance, command=["true"])
    ended(contract, container_id)
    contract.start(container_id)
    ended(contract, container_id)
    wait_until(lambda: len(told) == 2)
    watch.close()
    other.close()
    listener.join(10)

    assert (told, listener.is_alive()) == ([container_id] * 2, False)


def test_a_watch_tells_what_was_killed_and_not_what_was_removed(contract: Engine, instance: str) -> None:
    watch = contract.watch_ends(instance)
    unstarted = create(contract, instance, 1)
    killed = started(contract, instance, job_id=2)

    contract.remove(unstarted)
    contract.signal(killed, "SIGKILL")

    assert next(iter(watch)) == killed
    watch.close()
