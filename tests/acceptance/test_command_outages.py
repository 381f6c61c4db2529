"""What the continuous mode survives: a database and a Prefect server that go away and come back."""

import signal
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import docker
import pytest
from django.db import connection
from django.db.utils import OperationalError

from container_manager.models import ContainerJob, Status
from tests.conftest import PrefectServer, missing, wait_until

from .conftest import Running, Site, connected, environment, installed, migrate
from .outages import Postgres, own_postgres, postgres_programs

CONTINUOUS = ("--queue-mode", "--poll-interval=1")
FAILED, BACK = "Queue processing failed: ", "Queue processing works again, after "


def runs_a_job(site: Site, seconds: float = 40) -> None:
    job = site.queue("true", networks=["none"])
    wait_until(lambda: ContainerJob.objects.filter(pk=job.pk, status=Status.COMPLETED).exists(), seconds)


def is_at_work(site: Site) -> None:
    """A flow run is in progress, with logs and events to send."""
    jobs = [site.queue("sleep", "0.5", networks=["none"]).pk for _ in range(12)]
    wait_until(lambda: ContainerJob.objects.filter(pk__in=jobs, status=Status.RUNNING).exists(), 60)


def ends_well(command: Running) -> None:
    command.send(signal.SIGTERM)
    assert command.end(20) == 0
    assert command.lines[-1].startswith("Queue processor finished. Processed ") or "errors" in "".join(command.lines)


def told_nothing_else(command: Running) -> bool:
    """A line per change of state is all that stderr has, whatever Prefect and its threads went through."""
    return all(line.startswith((FAILED, BACK)) for line in command.errors)


def said(command: Running, words: str) -> list[str]:
    return [line for line in [*command.lines, *command.errors] if line.startswith(words)]


def end_all_connections() -> int:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return int(cursor.fetchone()[0])


def test_connections_that_the_database_ends_are_survived(postgres_site: Site, prefect_server: PrefectServer) -> None:
    postgres_site.env |= prefect_server.client
    command = postgres_site.start(*CONTINUOUS, "--via=inline")
    runs_a_job(postgres_site)
    # The main thread's, too.
    command.send(signal.SIGUSR1)
    command.wait_for("Queue status: {")
    ended = 0
    for _ in range(8):
        ended += end_all_connections()
        time.sleep(0.4)
    runs_a_job(postgres_site)
    seen = len(said(command, "Queue status: {"))
    command.send(signal.SIGUSR1)
    wait_until(lambda: len(said(command, "Queue status: {")) > seen, 5)

    assert ended > 0
    ends_well(command)
    assert len(said(command, BACK)) <= len(said(command, FAILED)) <= 2 * len(said(command, BACK))
    assert told_nothing_else(command), command.errors


@pytest.fixture
def postgres(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    programs = postgres_programs()
    if programs is None:
        missing(request.config, "PostgreSQL's initdb")
    with own_postgres(Path(str(programs))) as server:
        yield server


@pytest.fixture
def site_on_its_own_postgres(
    postgres: Postgres,
    tmp_path: Path,
    prefect_home: Path,
    prefect_server: PrefectServer,
    engine: docker.DockerClient,
    django_db_blocker: Any,
) -> Iterator[Site]:
    env = environment(PREFECT_HOME=str(prefect_home), **prefect_server.client)
    migrate(postgres.url, env)
    with connected(postgres.url, django_db_blocker), installed(postgres.url, env, tmp_path, engine) as site:
        yield site


def test_a_database_that_is_stopped_and_started_again_is_survived_and_told_once_per_change_of_state(
    site_on_its_own_postgres: Site, postgres: Postgres
) -> None:
    site = site_on_its_own_postgres
    command = site.start(*CONTINUOUS, "--via=inline")
    runs_a_job(site)
    connection.close()
    postgres.stop()
    command.wait_for(FAILED)
    time.sleep(8)
    command.send(signal.SIGUSR1)
    command.wait_for("Queue status: unknown, the database failed: ", 10)
    postgres.start()
    command.wait_for(BACK)
    wait_until(can_query, 10)
    runs_a_job(site)

    ends_well(command)
    # A flow run that was in progress fails in its own way, then there is no database to begin one with.
    assert 1 <= len(said(command, FAILED)) <= 2
    assert told_nothing_else(command), command.errors
    (line,) = said(command, BACK)
    assert int(line.removeprefix(BACK).split()[0]) >= 2


def can_query() -> bool:
    try:
        connection.ensure_connection()
    except OperationalError:
        return False
    return True


@pytest.fixture
def own_prefect(tmp_path: Path) -> Iterator[PrefectServer]:
    home = tmp_path / "own-prefect"
    home.mkdir()
    server = PrefectServer(home, environment())
    server.start()
    yield server
    server.stop()


@pytest.mark.timeout(300)
def test_a_prefect_server_that_goes_away_and_comes_back_is_survived_and_told_once_per_change_of_state(
    site: Site, own_prefect: PrefectServer
) -> None:
    site.env |= own_prefect.client
    ours = f"Prefect: {own_prefect.url.removesuffix('/api')}"
    command = site.start(*CONTINUOUS, "--shutdown-timeout=60")
    on_deployment = site.start(*CONTINUOUS, "--via=deployment")
    runs_a_job(site)
    on_deployment.wait_for(f"{FAILED}the Prefect server has no deployment process-queue/scheduled")
    own_prefect.stop()
    # A flow run in progress tries for a while to reach the one that has gone.
    command.wait_for("Prefect: a temporary server that ends with this command", 120)
    runs_a_job(site)
    on_deployment.wait_for(f"{FAILED}the Prefect API at {own_prefect.url} can't be reached", 60)
    own_prefect.start()
    wait_until(lambda: len(said(command, ours)) >= 2)
    runs_a_job(site)

    ends_well(on_deployment)
    # Once more, and a signal while a flow run still tries to reach it.
    is_at_work(site)
    own_prefect.stop()
    command.send(signal.SIGTERM)
    asked_at = time.monotonic()
    assert command.end(70) == 0
    assert time.monotonic() - asked_at < 60
    # Between two looks at it the server may have come back: how it runs then changes twice. The reason is told with
    # the place only where the line before has not told it: the server may go between the two.
    told = [line.partition(" (") for line in said(command, "Prefect: ")]
    places = [place for place, _ in groupby(place for place, _, _ in told)]
    assert places == [ours, "Prefect: a temporary server that ends with this command", ours]
    assert all(why.startswith(f"the Prefect API at {own_prefect.url} ") for _, _, why in told if why)
    assert len(said(command, BACK)) <= len(said(command, FAILED)) <= 2
    assert len(said(on_deployment, FAILED)) in (2, 3)
    for one in (command, on_deployment):
        assert told_nothing_else(one), one.errors
