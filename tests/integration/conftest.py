"""Who looks at the pages, the Engine's own word on what ran, and Prefect as flows and deployments need it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import docker
import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.db import connections, transaction
from django.test import Client
from prefect.client.orchestration import SyncPrefectClient, get_client

from container_manager.containers import INSTANCE_LABEL
from container_manager.models import DockerHost, Installation
from flows.late_runs import bulk_delete
from tests.conftest import ROOT, PrefectServer, database_url
from tests.fake_engine import Fleet, watched_fleet


@dataclass
class Served:
    """`python -m deployments`, running."""

    process: "subprocess.Popen[str]"
    log: Path


#: `run("prefect", "deploy", …, NAME=value)`: a module as a person runs it.
Run = Callable[..., "subprocess.CompletedProcess[str]"]
#: `with serve("--take-over", NAME=value)`: `python -m deployments` for as long as the context lasts.
Serve = Callable[..., AbstractContextManager[Served]]


@contextmanager
def another_transaction(write: Callable[[], object]) -> Iterator[None]:
    """What `write` locks is held by another's transaction for the block."""
    is_held, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with transaction.atomic():
            write()
            is_held.set()
            is_over.wait(60)
        connections.close_all()

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert is_held.wait(10)
        yield
    finally:
        is_over.set()
        holder.join()


def logged_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def client(database: str) -> Iterator[Client]:
    """Somebody who may do everything."""
    yield logged_in(User.objects.create_superuser("root"))
    for model in (LogEntry, Session, User):
        model.objects.all().delete()


@pytest.fixture
def fleet(database: str) -> Iterator[Fleet]:
    """Engines in memory; what must hold whatever a test does is looked at when it has ended."""
    yield from watched_fleet()


@pytest.fixture
def events(docker_host: DockerHost, engine: docker.DockerClient) -> Iterator[list[dict]]:
    """What happens to this installation's containers, as it happens: the Engine remembers only 256 events."""
    label = f"{INSTANCE_LABEL}={Installation.load().instance_id}"
    stream = engine.events(decode=True, filters={"type": "container", "label": label, "event": ["start", "die"]})
    told: list[dict] = []

    def listen() -> None:
        for event in stream:
            told.append(event)

    listener = threading.Thread(target=listen)
    listener.start()
    yield told
    stream.close()
    listener.join(10)


def flow_runs_of(serving: int) -> list[int]:
    """The processes of the flow runs that it serves: forked from the template, a child of it."""
    return [run for child in children_of(serving) for run in children_of(child)]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def most_alive(events: list[dict]) -> int:
    """How many containers ran at one time, by the Engine's clock."""
    in_order = sorted(events, key=lambda event: event["timeNano"])
    return max(accumulate(1 if event["status"] == "start" else -1 for event in in_order), default=0)


def forget_limits_and_runs() -> None:
    with get_client(sync_client=True) as client:
        for limit in client.read_global_concurrency_limits(limit=200):
            client.delete_global_concurrency_limit_by_name(limit.name)
        bulk_delete(client, {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}})


@pytest.fixture
def prefect_api(prefect_server: PrefectServer) -> Iterator[PrefectServer]:
    """This process uses the real server: without limits of tags, or flow runs that nobody ended, before and after."""
    with prefect_server.used():
        forget_limits_and_runs()
        yield prefect_server
        forget_limits_and_runs()


@pytest.fixture
def api(database: str, prefect_api: PrefectServer) -> Iterator[SyncPrefectClient]:
    """A client of the real server. What is registered there ends with the test."""
    with get_client(sync_client=True) as client:
        yield client
        delete_deployments_and_pools(client)


def delete_deployments_and_pools(client: SyncPrefectClient) -> None:
    for deployment in client.read_deployments(limit=200):
        client.delete_deployment(deployment.id)
    for pool in client.read_work_pools():
        client.delete_work_pool(pool.name)


@pytest.fixture
def environment(prefect_api: PrefectServer, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Of a process of the site's own. The deployments and pools that it makes end with the test."""
    yield (
        os.environ
        | prefect_api.client
        | {
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "DATABASE_URL": f"sqlite:///{tmp_path / 'unused.sqlite3'}",
            "DJANGO_SETTINGS_MODULE": "container_manager.settings",
            "CONTAINER_MANAGER": '{"POLL_INTERVAL_SECONDS": 3, "WORK_SECONDS": 2}',
        }
    )
    with get_client(sync_client=True) as client:
        delete_deployments_and_pools(client)


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    def run(*arguments: str, folder: Path = ROOT, **changes: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=folder, env=environment | changes, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def serve(database: str, environment: dict[str, str], tmp_path: Path) -> Serve:
    @contextmanager
    def serving(*arguments: str, **changes: str) -> Iterator[Served]:
        log = tmp_path / f"served-{len(list(tmp_path.glob('served-*')))}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "deployments", *arguments],
                cwd=ROOT, env=environment | {"DATABASE_URL": database_url()} | changes,
                stdout=output, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        try:
            yield Served(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

    return serving
