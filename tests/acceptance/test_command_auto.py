"""How `--via auto` chooses; each test a sentence of its contract."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings

from container_manager.models import Status
from flows.api import ApiFailed
from flows.triggering import DeploymentUnattended, check_deployment
from tests.conftest import ROOT, wait_until

from .conftest import Site, unanswered

ONCE = ("--queue-mode", "--once")
NAME = "process-queue/scheduled"
ID = "11111111-1111-4111-8111-111111111111"


@pytest.fixture
def api(prefect_server: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: prefect_server}), get_client(sync_client=True) as client:
        yield client


@contextmanager
def an_api(*, clock: datetime, polled: datetime | None, pool: str | None = None, worker: str = "") -> Iterator[None]:
    """One with this clock, whose deployment was polled then, on a pool that may have a worker in this status."""
    moment = polled.isoformat() if polled else None
    deployment = {"id": ID, "flow_id": ID, "name": "scheduled", "last_polled": moment, "work_pool_name": pool}
    token = {"token": "t", "client": ID, "expiration": (clock + timedelta(days=1)).isoformat()}
    workers = [{"id": ID, "work_pool_id": ID, "name": "one", "status": worker}] if worker else []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            special = {"/version": "3.8.8", "/csrf-token": token}
            self._answer(next((value for path, value in special.items() if path in self.path), deployment))

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(workers)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return format_datetime(clock, usegmt=True)

        def _answer(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}):
                yield
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("fast", [timedelta(0), timedelta(hours=5), timedelta(hours=-5)])
def test_lately_is_within_30_seconds_by_the_servers_clock(fast: timedelta) -> None:
    clock = datetime.now(UTC) + fast
    with an_api(clock=clock, polled=clock - timedelta(seconds=28)):
        check_deployment(NAME)
    with (
        an_api(clock=clock, polled=clock - timedelta(seconds=32)),
        pytest.raises(DeploymentUnattended, match="start one with `python -m deployments`"),
    ):
        check_deployment(NAME)


def test_an_online_worker_on_its_pool_is_enough_and_an_offline_one_is_not() -> None:
    now = datetime.now(UTC)
    with an_api(clock=now, polled=None, pool="yard", worker="ONLINE"):
        check_deployment(NAME)
    for worker in ("OFFLINE", ""):
        with (
            an_api(clock=now, polled=None, pool="yard", worker=worker),
            pytest.raises(DeploymentUnattended, match="`prefect worker start --pool yard`"),
        ):
            check_deployment(NAME)


def test_what_is_no_prefect_server_has_a_message_of_its_own() -> None:
    with an_api(clock=datetime.now(UTC), polled=None, pool="yard", worker="PLAYING"), pytest.raises(ApiFailed) as e:
        check_deployment(NAME)

    assert "speaks another language than this Prefect (ValidationError)" in str(e.value)


def test_auto_uses_a_deployment_on_a_work_pool_with_a_worker(site_with_api: Site, api: SyncPrefectClient) -> None:
    api.create_work_pool(WorkPoolCreate(name="quay", type="process"))
    flow_id = api.create_flow_from_name("process-queue")
    # Beside the one that other tests serve.
    entrypoint = "flows.process_queue:process_queue"
    api.create_deployment(flow_id, "on-quay", work_pool_name="quay", entrypoint=entrypoint, path=str(ROOT))
    job = site_with_api.queue("true")
    program = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "quay", "--name", "crane"]
    worker = site_with_api.start(
        program=program, PREFECT_WORKER_QUERY_SECONDS="1", PREFECT_WORKER_PREFETCH_SECONDS="1", PYTHONPATH=str(ROOT)
    )
    wait_until(lambda: api.read_workers_for_work_pool("quay"))
    settings = {"CONTAINER_MANAGER": '{"DEPLOYMENTS": {"queue": "process-queue/on-quay"}, "PICKUP_SECONDS": 60}'}
    done = site_with_api.run(*ONCE, **settings)
    worker.process.terminate()

    assert (done.returncode, done.stderr) == (0, "")
    assert "Runs: deployment process-queue/on-quay" in done.stdout.splitlines()
    assert "Processed queue: launched 1 jobs" in done.stdout.splitlines()
    job.refresh_from_db()
    assert job.status == Status.RUNNING


def test_auto_waits_3_seconds_for_an_api_that_hangs_and_runs_inline(site: Site) -> None:
    job = site.queue("true")
    with unanswered() as url:
        began = time.monotonic()
        done = site.run(*ONCE, PREFECT_API_URL=url)

    assert done.returncode == 0
    assert f"Runs: inline (the Prefect API at {url} does not answer within 3 s)" in done.stdout.splitlines()
    assert "Prefect: a temporary server that ends with this command" in done.stdout.splitlines()
    assert time.monotonic() - began < 40
    job.refresh_from_db()
    assert job.status == Status.RUNNING
