"""A service that can't do its work says so in a line, and ends if it never can."""

import logging
import os
import time
from pathlib import Path

import pytest
from django.db import OperationalError, connection
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.responses import FlowRunResponse
from prefect.states import Completed, Crashed, Failed

from container_manager.conf import Settings
from container_manager.models import PROTOCOL, Installation
from deployments.definitions import definitions
from deployments.health import Health
from deployments.registering import CannotServe
from tests.conftest import wait_until

from .conftest import Serve
from .prefect_side import DAILY, another_installation, registered, run_now

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


def newer() -> None:
    Installation.objects.update(protocol=PROTOCOL + 1)


def look_again(health: Health) -> None:
    """As after an interval."""
    health._check_at = 0
    health.check_database()


@on_sqlite
def test_a_queue_of_a_newer_version_ends_what_serves_within_an_interval(database: str, serve: Serve) -> None:
    Installation.load()
    with serve() as served:
        wait_until(lambda: f"serving {DAILY}" in served.log.read_text(), 120)
        known = len(served.log.read_text().splitlines())
        newer()
        code = served.process.wait(60)
        lines = served.log.read_text().splitlines()[known:]

    assert code == 1
    assert [line for line in lines if "newer version" in line] == lines[-1:]


def test_a_queue_of_a_newer_version_or_another_ones_can_never_be_served(database: str) -> None:
    health = Health()
    with another_installation("feedc0de"), pytest.raises(CannotServe, match="is that of installation feedc0de now"):
        look_again(health)
    newer()
    with pytest.raises(CannotServe, match="newer"):
        look_again(health)


def test_a_database_that_goes_away_and_comes_back_is_told_once_each(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    health = Health()
    table = Installation._meta.db_table
    with connection.schema_editor() as editor:
        editor.execute(f"ALTER TABLE {table} RENAME TO {table}_away")
    try:
        look_again(health)
        look_again(health)
        health.note(OperationalError("no connection"))
    finally:
        with connection.schema_editor() as editor:
            editor.execute(f"ALTER TABLE {table}_away RENAME TO {table}")
    look_again(health)
    look_again(health)

    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert told[0].startswith("the database can't be used, and no flow run can do its work meanwhile: ")
    assert told[1] == "the database is back"


@on_sqlite
def test_flow_runs_that_fail_are_told_once_until_one_succeeds(
    api: SyncPrefectClient, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    registered(api)
    run = FlowRunResponse.model_validate(api.read_flow_run(run_now(api, DAILY)).model_dump())
    queue, *_, daily = definitions(Settings())
    health = Health()
    caplog.set_level(logging.WARNING)
    for definition, state in (
        (queue, Failed(message="no room\nof many lines")),
        (queue, Failed(message="no room")),
        (daily, Completed()),
        (queue, Crashed(message="killed")),
        (queue, Completed()),
        (queue, Completed()),
    ):
        health.note_end(definition, run, state)

    assert [record.message for record in caplog.records] == [
        f"process-queue/scheduled can't do its work: flow run {run.id} ended Failed: no room",
        f"process-queue/scheduled can't do its work: flow run {run.id} ended Crashed: killed",
        "process-queue/scheduled works again",
    ]


def age_of(file: Path) -> float:
    return time.time() - file.stat().st_mtime


@on_sqlite
def test_the_alive_file_is_as_old_as_the_last_answer_of_the_api_and_the_database(
    database: str, serve: Serve, tmp_path: Path
) -> None:
    alive = tmp_path / "alive"
    table = Installation._meta.db_table
    with serve("--alive-file", str(alive)) as served:
        wait_until(alive.exists, 120)
        first = alive.stat().st_mtime
        wait_until(lambda: alive.stat().st_mtime > first, 60)
        with connection.schema_editor() as editor:
            editor.execute(f"ALTER TABLE {table} RENAME TO {table}_away")
        try:
            wait_until(lambda: "the database can't be used" in served.log.read_text(), 60)
            wait_until(lambda: age_of(alive) > 8, 60)
        finally:
            with connection.schema_editor() as editor:
                editor.execute(f"ALTER TABLE {table}_away RENAME TO {table}")
        wait_until(lambda: age_of(alive) < 4, 60)
        wait_until(lambda: "the database is back" in served.log.read_text(), 60)

    assert served.log.read_text().count("the database can't be used") == 1


@on_sqlite
def test_the_alive_file_is_not_touched_while_the_database_is_away(database: str, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    health = Health(alive)
    health.note_look()
    os.utime(alive, (0, 0))
    health.note(OperationalError("no connection"))
    health.note_look()

    assert alive.stat().st_mtime == 0
