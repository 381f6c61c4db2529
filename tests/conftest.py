"""What the tests run on: both databases, a real Engine, a real Prefect server, a real browser.

A part that is missing skips its tests, and with `--strict-parts` fails them.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.settings import SCRATCH

# Prefect reads its settings when it is imported. Without a heartbeat a flow ends a second sooner.
os.environ |= {
    "PREFECT_HOME": str(SCRATCH / "prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_FLOWS": '{"heartbeat_frequency": null}',
    # Not what `.env` has in a checkout where somebody has a first look.
    "PREFECT_API_URL": "",
    "PREFECT_API_AUTH_STRING": "",
}

import docker
import httpx
import pytest
import requests
from django.conf import settings
from django.db import connections
from django.test.utils import setup_databases, teardown_databases
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from container_manager.containers import INSTANCE_LABEL
from container_manager.models import ContainerJob, DockerHost, Installation, JobAttempt
from container_manager.queue import QueueManager
from flows.shut_server import ShutServer, new_password

# The same examples each time; and others each time, many more, for who has an hour: HYPOTHESIS_PROFILE=long.
hypothesis_settings.register_profile(
    "quick", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.register_profile(
    "long", hypothesis_settings.get_profile("quick"), derandomize=False, max_examples=2000, stateful_step_count=80
)
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "busybox:latest"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-parts",
        action="store_true",
        help="fail, not skip, where an Engine, a PostgreSQL or a Chromium is missing",
    )


def pytest_sessionfinish() -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)


def missing(config: pytest.Config, part: str) -> None:
    if config.getoption("--strict-parts"):
        pytest.fail(f"{part} is missing", pytrace=False)
    pytest.skip(f"{part} is missing")


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """The condition's first true value; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > until:
            pytest.fail(f"not within {seconds:g} s")
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def database_url() -> str:
    """The database that is `default` now, for a process with the site's own settings."""
    database = connections["default"].settings_dict
    if connections["default"].vendor == "sqlite":
        return f"sqlite:///{database['NAME']}"
    return f"postgres://{database['USER']}@{database['HOST']}:{database['PORT']}/{database['NAME']}"


@pytest.fixture(scope="session")
def django_db_setup(django_test_environment: None, django_db_blocker: Any) -> Iterator[None]:
    """Every database, whichever tests were chosen."""
    with django_db_blocker.unblock():
        made = setup_databases(verbosity=0, interactive=False, serialized_aliases=[])
        for alias in connections:
            with as_default(alias):
                empty_tables()
        yield
        for connection in connections.all():
            connection.close()
        teardown_databases(made, verbosity=0)


@contextmanager
def as_default(alias: str) -> Iterator[None]:
    """Let the database of this alias be `default`: the product knows no other."""
    if alias == "default":
        yield
        return
    usual = connections.settings["default"]
    connections["default"].close()
    del connections["default"]
    connections.settings["default"] = connections[alias].settings_dict
    try:
        yield
    finally:
        connections["default"].close()
        del connections["default"]
        connections.settings["default"] = usual


def empty_tables() -> None:
    for model in (JobAttempt, ContainerJob, DockerHost, Installation):
        model.objects.all().delete()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, django_db_setup: None, django_db_blocker: Any) -> Iterator[str]:
    """Both databases, one after the other, with real transactions; its value is the database's name."""
    if request.param == "postgres" and "postgres" not in settings.DATABASES:
        missing(request.config, "PostgreSQL (TEST_POSTGRES_URL)")
    alias = "default" if request.param == "sqlite" else "postgres"
    with django_db_blocker.unblock(), as_default(alias):
        try:
            yield request.param
        finally:
            empty_tables()


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> Iterator[docker.DockerClient]:
    """The Engine, by a client of the tests' own."""
    try:
        client = docker.from_env(timeout=60)
        client.images.get(IMAGE)
    except docker.errors.DockerException:
        missing(request.config, f"a Docker Engine with {IMAGE} (make engine)")
    yield client
    client.close()


@pytest.fixture
def docker_host(database: str, engine: docker.DockerClient) -> Iterator[DockerHost]:
    """A host row for the Engine. Every container that the test leaves is removed."""
    host = DockerHost.objects.create(
        name="local", base_url=os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    )
    instance_id = Installation.load().instance_id
    yield host
    for container in engine.containers.list(all=True, filters={"label": f"{INSTANCE_LABEL}={instance_id}"}):
        with suppress(docker.errors.NotFound):
            container.remove(force=True, v=True)


@pytest.fixture
def manager() -> QueueManager:
    """A queue with connections of its own, so that no test meets another's breaker."""
    return QueueManager()


#: How a Prefect server keeps the slots of tags, as `pyproject.toml` has it for those that are started in a checkout.
TAG_SLOTS = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
}


class PrefectServer:
    """A real one on a free port, which may be stopped and started: shut, as all that we start, or open to anybody."""

    def __init__(self, home: Path, env: Mapping[str, str], *, is_open: bool = False, host: str = "127.0.0.1") -> None:
        """`home`: where it keeps its things; `env`: the rest of its environment; `host`: where it listens."""
        self._log, self._host = home / "server.log", host
        self._server = ShutServer(free_port(), "" if is_open else new_password("tests"))
        self.port = self._server.port
        self.pages, self.url, self.password = self._server.pages, self._server.api, self._server.password
        # Its pages ask at port 4200 unless they are told otherwise.
        own = {"PREFECT_HOME": str(home), "PREFECT_UI_API_URL": self.url}
        self._home, self._env = home, {**env, **own} if is_open else self._server.environment(env) | own
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def client(self) -> dict[str, str]:
        """What a process needs in its environment to ask it."""
        return {"PREFECT_API_URL": self.url, "PREFECT_API_AUTH_STRING": self.password}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, it is the one that this process asks."""
        with temporary_settings({PREFECT_API_URL: self.url, PREFECT_API_AUTH_STRING: self.password}):
            yield

    def ask(self, path: str, /, **question: Any) -> Any:
        """By POST, as one asks it most things."""
        return self.request("POST", path, json=question).json()

    def request(self, method: str, path: str, /, **content: Any) -> httpx.Response:
        """By Prefect's own client, with all that this server asks for; an error if it refuses."""
        with self.used(), get_client(sync_client=True) as client:
            return client.request(method, path, **content)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self._log.open("ab") as log:
            port = str(self._server.port)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "server", "start", "--host", self._host, "--port", port],
                env=self._env, cwd=self._home, stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(self._is_ready, 120)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _is_ready(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            pytest.fail(f"the Prefect server did not start: {self._log.read_text()[-2000:]}")
        with suppress(requests.RequestException):
            return requests.get(f"{self.url}/ready", timeout=5).ok
        return False


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """With a home of its own."""
    server = PrefectServer(tmp_path_factory.mktemp("prefect"), os.environ | TAG_SLOTS)
    try:
        server.start()
        yield server
        # What this process still has to tell it would fail once it is gone.
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)
    finally:
        server.stop()
