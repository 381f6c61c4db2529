"""The command as people run it: a process of its own, on a database, a Prefect home and an Engine of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import docker
import psycopg
import pytest
from django.db import connections
from prefect.client.orchestration import SyncPrefectClient, get_client

from container_manager.containers import INSTANCE_LABEL
from container_manager.models import ContainerJob, DockerHost, Installation
from container_manager.queue import queue_manager
from container_manager.settings import database_from_url
from tests.conftest import ROOT, PrefectServer, as_default, missing, wait_until

#: What a checkout needs for its make targets.
PARTS = (
    "container_manager", "deployments", "flows", ".ci", "manage.py", "Makefile", "pyproject.toml", "constraints.txt",
    ".gitignore",
)  # fmt: skip
MANAGE = [sys.executable, str(ROOT / "manage.py")]


def environment(**changes: str) -> dict[str, str]:
    """That of a person who has set nothing: what the tests themselves need is not passed on, and what `.env` has is not
    read, which a first look leaves in a checkout."""
    ours = ("PREFECT_", "DJANGO_", "DATABASE_URL", "CONTAINER_MANAGER", "PYTHON")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    unset = {"PREFECT_API_URL": "", "PREFECT_API_AUTH_STRING": ""}
    return inherited | unset | {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"} | changes


def as_a_person() -> dict[str, str]:
    """As above, but that `.env` may lead them."""
    return {name: value for name, value in environment().items() if not name.startswith("PREFECT_API_")}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One of the test's own: what a first look leaves there is not left in ours."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in PARTS:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    # It is up to date, whatever was changed since it was made.
    (folder / ".venv").symlink_to(ROOT / ".venv")
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(folder / name, (0, 0))
    return folder


@contextmanager
def make(target: str, checkout: Path, **changes: str) -> Iterator["Running"]:
    # Not the outer make's flags: they would reach the inner one.
    kept = {name: value for name, value in as_a_person().items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    process = subprocess.Popen(
        ["make", target], cwd=checkout, env=kept | changes, text=True, umask=0o022,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    running = Running(process)
    try:
        yield running
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        running.end(120)


class Running:
    """A command that runs; its lines as they come."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(process.stdout, self.lines)),
            threading.Thread(target=self._read, args=(process.stderr, self.errors)),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        with stream:
            lines.extend(line.rstrip("\n") for line in stream)

    def wait_for(self, text: str, seconds: float = 40) -> str:
        """The first line on stdout or stderr that has the text in it."""

        def find() -> str | None:
            found = [line for line in [*self.lines, *self.errors] if text in line]
            if not found and self.process.poll() is not None:
                pytest.fail(f"{text!r} never came: {self.lines} {self.errors}")
            return found[0] if found else None

        return str(wait_until(find, seconds))

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = 40) -> int:
        """The exit code."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(10)
        return code


@dataclass
class Site:
    """One installation."""

    env: dict[str, str]
    folder: Path
    started: list[Running] = field(default_factory=list)

    def run(self, *arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*MANAGE, "process_container_jobs", *arguments],
            env=self.env | changes, cwd=self.folder, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip

    def start(self, *arguments: str, program: list[str] | None = None, **changes: str) -> Running:
        process = subprocess.Popen(
            program or [*MANAGE, "process_container_jobs", *arguments],
            env=self.env | changes, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running = Running(process)
        self.started.append(running)
        return running

    def queue(self, *command: str, **fields: Any) -> ContainerJob:
        job = ContainerJob.objects.create_job(**{"image": "busybox", "command": list(command or ("true",))} | fields)
        return queue_manager.queue_job(job)


def objects(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


@contextmanager
def unanswered() -> Iterator[str]:
    """An API that takes connections and says nothing, so that a flow run is long in progress."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/api"


@contextmanager
def answering(status: int) -> Iterator[str]:
    """An API that answers everything with this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the temporary servers' tables are made once."""
    return tmp_path_factory.mktemp("prefect-home")


def migrate(url: str, env: dict[str, str]) -> None:
    subprocess.run([*MANAGE, "migrate", "-v0"], env=env | {"DATABASE_URL": url}, check=True)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to copy."""
    path = tmp_path_factory.mktemp("site") / "site.sqlite3"
    migrate(f"sqlite:///{path}", environment())
    return path


@contextmanager
def new_database(server: str, name: str) -> Iterator[str]:
    """The address of a new database at this PostgreSQL server, for as long as the context lasts."""
    name = f"container_manager_{name}_{os.getpid()}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        try:
            yield urlsplit(server)._replace(path=f"/{name}").geturl()
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def connected(url: str, blocker: Any) -> Iterator[None]:
    """Let this process's models be those of the site."""
    connections.settings["site"] = connections.configure_settings({"default": database_from_url(url)})["default"]
    with blocker.unblock(), as_default("site"):
        yield
    connections["site"].close()
    del connections["site"]
    del connections.settings["site"]


@contextmanager
def installed(url: str, env: dict[str, str], folder: Path, client: docker.DockerClient) -> Iterator[Site]:
    DockerHost.objects.all().delete()
    DockerHost.objects.create(name="local", base_url=os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
    Installation.objects.all().delete()
    site = Site(env | {"DATABASE_URL": url}, folder)
    try:
        yield site
    finally:
        for running in site.started:
            if running.process.poll() is None:
                running.process.kill()
            running.end()
        mine = {"label": f"{INSTANCE_LABEL}={Installation.load().instance_id}"}
        for container in client.containers.list(all=True, filters=mine):
            with suppress(docker.errors.NotFound):
                container.remove(force=True, v=True)


@pytest.fixture
def site(
    tmp_path: Path, migrated: Path, prefect_home: Path, engine: docker.DockerClient, django_db_blocker: Any
) -> Iterator[Site]:
    """On SQLite, without a Prefect API."""
    url = f"sqlite:///{shutil.copy(migrated, tmp_path / 'site.sqlite3')}"
    env = environment(PREFECT_HOME=str(prefect_home))
    with connected(url, django_db_blocker), installed(url, env, tmp_path, engine) as site:
        yield site


@pytest.fixture
def api(prefect_server: PrefectServer) -> Iterator[SyncPrefectClient]:
    with prefect_server.used(), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def site_with_api(site: Site, prefect_server: PrefectServer) -> Site:
    site.env |= prefect_server.client
    return site


@pytest.fixture
def postgres_site(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    prefect_home: Path,
    engine: docker.DockerClient,
    django_db_blocker: Any,
) -> Iterator[Site]:
    server = os.environ.get("TEST_POSTGRES_URL")
    if not server:
        missing(request.config, "PostgreSQL (TEST_POSTGRES_URL)")
    env = environment(PREFECT_HOME=str(prefect_home))
    with new_database(str(server), "command") as url:
        migrate(url, env)
        with connected(url, django_db_blocker), installed(url, env, tmp_path, engine) as site:
            yield site


@pytest.fixture(params=["site", "postgres_site"])
def any_site(request: pytest.FixtureRequest, prefect_server: PrefectServer) -> Site:
    """On both databases, one after the other, with an API."""
    site: Site = request.getfixturevalue(request.param)
    site.env |= prefect_server.client
    return site


@pytest.fixture
def no_prefect(site: Site) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs the command where to import Prefect is an error."""
    trap = site.folder / "trap" / "prefect"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise SystemExit('Prefect was imported')\n")

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return site.run(*arguments, PYTHONPATH=str(trap.parent))

    return run
