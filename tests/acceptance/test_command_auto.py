"""How `--via auto` chooses; each test a sentence of its contract."""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management.base import OutputWrapper
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_HOME, temporary_settings

from container_manager.management.background import in_background
from container_manager.management.flow_runs import PrefectFlowRuns
from container_manager.management.processing import Options
from container_manager.management.queue_report import Console
from container_manager.models import Status
from flows import inline
from flows.api import ApiFailed
from flows.triggering import DeploymentUnattended, check_deployment
from tests.conftest import ROOT, PrefectServer, wait_until

from .conftest import Site, answering, unanswered

ONCE = ("--queue-mode", "--once")
NOBODY = "http://127.0.0.1:1/api"
NAME = "process-queue/scheduled"
ID = "11111111-1111-4111-8111-111111111111"


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


PARAMETERS: dict[str, dict[str, Any]] = {
    "queue": {"max_concurrent": 1, "timeout": 5, "work_seconds": 0},
    "jobs": {"job_id": 123, "max_concurrent": 1, "timeout": 5},
}


def run_by_auto(which: str, url: str | None, password: str, home: Path) -> str:
    """How a flow run of either flow is said to run, with this API."""
    said = StringIO()
    runs = PrefectFlowRuns("auto", Console(OutputWrapper(said), OutputWrapper(said), as_json=False), Options())
    updates = {PREFECT_HOME: home, PREFECT_API_AUTH_STRING: password} | ({PREFECT_API_URL: url} if url else {})
    call = runs.process_queue if which == "queue" else runs.process_jobs
    with temporary_settings(updates, restore_defaults=set() if url else {PREFECT_API_URL}):
        in_background(lambda: call(PARAMETERS[which]), tick=lambda: None)
    return said.getvalue().splitlines()[0]


@pytest.mark.usefixtures("site")
def test_each_way_to_fail_has_a_message_of_its_own_and_both_flows_run_inline(
    prefect_server: PrefectServer, prefect_home: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.CONTAINER_MANAGER = {"DEPLOYMENTS": {"queue": "process-queue/none", "jobs": "process-jobs/none"}}
    # It is quiet for the rest of its process, which is ours.
    monkeypatch.setattr(logging, "raiseExceptions", True)
    with answering(401) as closed, answering(500) as ill, unanswered() as silent:
        messages = {
            None: "no Prefect API is configured: set PREFECT_API_URL, or run `prefect config set PREFECT_API_URL=…`",
            NOBODY: f"the Prefect API at {NOBODY} can't be reached ([Errno 111] Connection refused): "
            "is `prefect server start` running?",
            closed: f"the Prefect API at {closed} refuses the authentication (HTTP 401): set PREFECT_API_AUTH_STRING "
            "or PREFECT_API_KEY",
            ill: f"the Prefect API at {ill} answers HTTP 500: Internal Server Error",
            prefect_server.url: "the Prefect server has no deployment process-{}/none: serve it with "
            "`python -m deployments`",
            silent: f"the Prefect API at {silent} does not answer within 3 s",
        }
        try:
            for url, message in messages.items():
                for which in PARAMETERS:
                    said = run_by_auto(which, url, prefect_server.password, prefect_home)
                    assert said == f"Runs: inline ({message.format(which)})"
        finally:
            inline.server.stop()


def test_auto_does_not_run_inline_what_the_deployment_refuses(site_with_api: Site, api: SyncPrefectClient) -> None:
    schema = {"type": "object", "properties": {"timeout": {"type": "string"}}}
    flow_id = api.create_flow_from_name("process-queue")
    deployment_id = api.create_deployment(
        flow_id, "choosy", parameter_openapi_schema=schema, enforce_parameter_schema=True
    )
    api.request("POST", "/deployments/get_scheduled_flow_runs", json={"deployment_ids": [str(deployment_id)]})
    wait_until(lambda: api.read_deployment_by_name("process-queue/choosy").last_polled)
    settings = {"CONTAINER_MANAGER": '{"DEPLOYMENTS": {"queue": "process-queue/choosy"}}'}
    done = site_with_api.run(*ONCE, **settings)

    assert done.returncode == 1
    assert done.stderr.startswith(
        "CommandError: Command failed: deployment process-queue/choosy refuses the parameters: "
    )
    assert done.stderr.count("\n") == 1


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
