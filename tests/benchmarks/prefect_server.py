"""A Prefect server as the README sets one up, on the same kind of database as the queue."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from django.db import connection

from tests.conftest import free_port


@contextmanager
def prefect_server() -> Iterator[tuple[str, int]]:
    """The URL of its API and its process id."""
    with tempfile.TemporaryDirectory(prefix="container-manager-bench-") as home:
        port = free_port()
        url = f"http://127.0.0.1:{port}/api"
        environment = os.environ | {
            "PREFECT_HOME": home,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        }
        if connection.vendor == "postgresql":
            environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = _database()
        with (Path(home) / "server.log").open("w") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
                env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=home,
            )  # fmt: skip
        try:
            until = time.monotonic() + 120
            while not _is_ready(url):
                if server.poll() is not None or time.monotonic() > until:
                    raise RuntimeError((Path(home) / "server.log").read_text()[-2000:])
                time.sleep(0.2)
            yield url, server.pid
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _is_ready(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/ready", timeout=5).is_success
    return False


def _database() -> str:
    """A new one beside the queue's."""
    known = connection.settings_dict
    name = f"{known['NAME']}_prefect"
    # Outside of any transaction, on a connection that may be anything but inside one.
    with connection.cursor() as cursor:
        cursor.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        cursor.execute(f'CREATE DATABASE "{name}"')
    return f"postgresql+asyncpg://{known['USER']}@{known['HOST']}:{known['PORT']}/{name}"
