"""An installation as its people have it: a database, settings, a served process, a command."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from django.core.management import call_command
from django.db import connections

from container_manager.models import DockerHost, Installation
from container_manager.settings import database_from_url
from tests.acceptance.conftest import MANAGE
from tests.conftest import ROOT, as_default

#: Short leases and stays, so that what a killed process held is recovered within seconds.
SETTINGS = {
    "POLL_INTERVAL_SECONDS": 10,
    "WORK_SECONDS": 8,
    "LEASE_SECONDS": 12,
    "DOCKER_TIMEOUT_SECONDS": 4,
    "STOP_GRACE_SECONDS": 1,
    "RETRY_BASE_SECONDS": 0.2,
    "KEEP_FAILED_CONTAINERS_SECONDS": 3600,
}
#: Of the host's row; above every limit that is set here.
HOST_SLOTS = 10


class Started:
    """A process that was started, and what it says on both of its outputs."""

    def __init__(self, program: Sequence[str], env: Mapping[str, str], output: Path) -> None:
        self._output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(program, env=env, cwd=output.parent, stdout=file, stderr=file)

    @property
    def code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    @property
    def lines(self) -> list[str]:
        return self._output.read_text(errors="replace").splitlines()

    @property
    def last_words(self) -> str:
        return "\n".join(self.lines)[-800:]

    def kill(self) -> None:
        if self.code is None:
            self.process.kill()
            self.process.wait()


class Neighbour:
    """`title` is what it is called here, and the alias of its database in this process."""

    def __init__(self, title: str, url: str, env: Mapping[str, str], folder: Path, **settings: Any) -> None:
        self.title, self._folder = title, folder
        self._name = settings.get("NAME", "")
        self._env = {
            **env, "DATABASE_URL": url, "PYTHONPATH": str(ROOT), "CONTAINER_MANAGER": json.dumps(SETTINGS | settings)
        }  # fmt: skip
        #: Every process that was started, and the one that serves its deployments.
        self._started: list[Started] = []
        self.service: Started | None = None
        #: Of every process that has served its deployments.
        self.pids: set[int] = set()
        database = connections.configure_settings({"default": database_from_url(url)})["default"]
        connections.settings[title] = database
        call_command("migrate", database=title, verbosity=0)
        with self.opened():
            self.instance_id = Installation.load().instance_id
            address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
            DockerHost.objects.update(base_url=address, max_concurrent_jobs=HOST_SLOTS)

    def __str__(self) -> str:
        return self.title

    def opened(self) -> AbstractContextManager[None]:
        """Within, the models of this process are those of its database."""
        return as_default(self.title)

    def named(self, what: str) -> str:
        return f"{self._name}.{what}" if self._name else what

    def serve(self) -> Started:
        """Start `python -m deployments`."""
        self.service = self.start(sys.executable, "-m", "deployments")
        self.pids.add(self.service.process.pid)
        return self.service

    @property
    def is_serving(self) -> bool:
        """It has registered all of its deployments."""
        return self.service is not None and sum(line.startswith("serving ") for line in self.service.lines) == 4

    def command(self, *arguments: str) -> Started:
        return self.start(*MANAGE, "process_container_jobs", *arguments)

    def start(self, *program: str) -> Started:
        output = self._folder / f"{self.title}-{len(self._started)}.output"
        self._started.append(Started(program, self._env, output))
        return self._started[-1]

    def end(self) -> None:
        for started in self._started:
            started.kill()
        connections[self.title].close()


@contextmanager
def ended(folder: Path, *neighbours: Neighbour) -> Iterator[None]:
    """Nothing that they start in the folder outlives this: a service that is killed leaves its flow runs behind."""
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.end()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (process / "cwd").readlink() == folder:
                    os.kill(int(process.name), signal.SIGKILL)
