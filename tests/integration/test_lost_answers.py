"""Answers of a real Engine that are lost on the way, or come too late: what was asked for happened all the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from container_manager.containers import INSTANCE_LABEL
from container_manager.models import ContainerJob, DockerHost, Installation, Reason, Status
from container_manager.queue import QueueManager
from tests.conftest import wait_until
from tests.fake_engine import let_leases_end, one_round, queued, row
from tests.integration.lossy_proxy import LossyProxy, proxying

ECHO = ["sh", "-c", "echo once; sleep 0.2"]
DEAF = ["sh", "-c", "trap '' TERM; echo up; while true; do sleep 0.1; done"]
#: What an Engine does is the same, whichever database is told of it.
on_postgres = pytest.mark.parametrize("database", ["postgres"], indirect=True)
PATH = r"POST /v[\d.]+/containers"


@pytest.fixture
def proxy(docker_host: DockerHost, tmp_path: Path) -> Iterator[LossyProxy]:
    with proxying(tmp_path / "s", docker_host.base_url.removeprefix("unix://")) as proxy:
        DockerHost.objects.update(base_url=proxy.base_url)
        yield proxy


def ended(manager: QueueManager, job: ContainerJob) -> ContainerJob:
    def has_ended() -> bool:
        one_round(manager)
        return row(job).slot_host_id is None and row(job).status != Status.QUEUED

    wait_until(has_ended)
    return row(job)


def containers_left(engine: docker.DockerClient) -> list[Any]:
    label = f"{INSTANCE_LABEL}={Installation.load().instance_id}"
    return engine.containers.list(all=True, filters={"label": label})


@pytest.mark.parametrize(
    ("request_line", "left", "attempt"),
    [(rf"{PATH}/create", Status.LAUNCHING, 2), (rf"{PATH}/\w+/start", Status.STARTING, 1)],
    ids=["create", "start"],
)
def test_a_launch_whose_answer_is_lost_runs_once(
    proxy: LossyProxy,
    manager: QueueManager,
    engine: docker.DockerClient,
    events: list[dict],
    request_line: str,
    left: Status,
    attempt: int,
) -> None:
    job = queued(manager, command=ECHO)
    proxy.lose_next(request_line)
    manager.launch_next_batch()
    assert (proxy.lost, row(job).status, len(containers_left(engine))) == (1, left, 1)
    let_leases_end()

    end = ended(manager, job)

    assert (end.status, end.attempt, end.retry_count, end.attempts.get().stdout) == (
        Status.COMPLETED, attempt, 0, "once\n",
    )  # fmt: skip
    wait_until(lambda: [event["status"] for event in events] == ["start", "die"])
    one_round(manager)
    assert containers_left(engine) == []


@on_postgres
@pytest.mark.parametrize("request_line", [rf"{PATH}/\w+/kill\?signal=SIGTERM", rf"{PATH}/\w+/kill\?signal=SIGKILL"])
def test_a_signal_whose_answer_is_lost_was_sent(proxy: LossyProxy, manager: QueueManager, request_line: str) -> None:
    is_killed = "KILL" in request_line
    job = queued(manager, command=DEAF if is_killed else ["sleep", "60"], timeout_seconds=1)
    manager.launch_next_batch()
    proxy.lose_next(request_line)

    end = ended(manager, job)

    assert (proxy.lost, end.status, end.reason) == (1, Status.FAILED, Reason.TIMEOUT)
    assert end.exit_code == (137 if is_killed else 143)


@on_postgres
@pytest.mark.parametrize("request_line", [r"GET .*/logs\?", r"GET .*/containers/\w+/json", r"DELETE .*/containers/"])
def test_a_harvest_whose_answer_is_lost_is_done_again(
    proxy: LossyProxy, manager: QueueManager, engine: docker.DockerClient, request_line: str
) -> None:
    job = queued(manager, command=["sh", "-c", "echo once; exit 3"])
    manager.launch_next_batch()
    wait_until(lambda: [container.status for container in containers_left(engine)] == ["exited"])
    proxy.lose_next(request_line)

    end = ended(manager, job)
    one_round(manager)

    assert (proxy.lost, end.exit_code, end.attempts.get().stdout) == (1, 3, "once\n")
    assert containers_left(engine) == []


@on_postgres
def test_a_create_that_the_engine_takes_too_long_to_refuse_is_left_open_and_made_once(
    docker_host: DockerHost, engine: docker.DockerClient, events: list[dict], settings: Any
) -> None:
    usual = settings.CONTAINER_MANAGER
    # The Engine looks for a driver that it does not know for 15 s.
    settings.CONTAINER_MANAGER = usual | {"LOG_DRIVER": "no-such-driver", "DOCKER_TIMEOUT_SECONDS": 1}
    manager = QueueManager()
    job = queued(manager, command=ECHO)

    batch = manager.launch_next_batch()

    assert (batch.launched, row(job).status, row(job).retry_count) == (0, Status.LAUNCHING, 0)
    assert "timed out" in batch.errors[0].error.lower()
    settings.CONTAINER_MANAGER = usual
    let_leases_end()
    end = ended(QueueManager(), job)
    assert (end.status, end.attempt, end.retry_count) == (Status.COMPLETED, 2, 0)
    wait_until(lambda: [event["status"] for event in events] == ["start", "die"])
    assert containers_left(engine) == []
