"""A Prefect server as the README sets one up, on the same kind of database as the queue."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from django.db import connection

from tests.conftest import PrefectServer


@contextmanager
def prefect_server() -> Iterator[PrefectServer]:
    with tempfile.TemporaryDirectory(prefix="container-manager-bench-") as home:
        environment = os.environ | {
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        }
        if connection.vendor == "postgresql":
            environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = _database()
        server = PrefectServer(Path(home), environment)
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _database() -> str:
    """A new one beside the queue's."""
    known = connection.settings_dict
    name = f"{known['NAME']}_prefect"
    # Outside of any transaction, on a connection that may be anything but inside one.
    with connection.cursor() as cursor:
        cursor.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        cursor.execute(f'CREATE DATABASE "{name}"')
    return f"postgresql+asyncpg://{known['USER']}@{known['HOST']}:{known['PORT']}/{name}"
