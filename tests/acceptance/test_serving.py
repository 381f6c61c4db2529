"""`python -m deployments` on a Prefect server that asks for a password, and that goes away and comes back."""

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from container_manager.leases import WORK_LEASE_SECONDS
from container_manager.models import ContainerJob, Installation, Status
from tests.conftest import ROOT, PrefectServer, wait_until

from .conftest import Running, Site, environment

QUEUE = "process-queue/scheduled"
#: name:password, of another server.
AUTH = "operator:only-for-this-test"
SETTINGS = json.dumps({"POLL_INTERVAL_SECONDS": 3, "WORK_SECONDS": 2.5})


@pytest.fixture(scope="module")
def guarded_prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("guarded-prefect"), environment())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def guarded_site(site: Site, guarded_prefect: PrefectServer) -> Site:
    site.env |= guarded_prefect.client | {
        "CONTAINER_MANAGER": SETTINGS,
        "PYTHONPATH": str(ROOT),
    }
    return site


def deployments(site: Site, *arguments: str, **changes: str) -> Running:
    return site.start(program=[sys.executable, "-m", "deployments", *arguments], **changes)


def unwell(server: PrefectServer) -> list[str]:
    """What is said of flow runs that did not end well."""
    runs = server.ask("/flow_runs/filter", flow_runs={"state": {"type": {"not_any_": ["COMPLETED", "SCHEDULED"]}}})
    return [f"{run['name']} {run['state_name']}: {run['state']['message']}" for run in runs]


def is_in(job: ContainerJob, *statuses: Status) -> bool:
    job.refresh_from_db()
    return job.status in statuses


def test_with_the_wrong_password_or_none_it_says_what_to_set(guarded_site: Site) -> None:
    wrong = deployments(guarded_site, PREFECT_API_AUTH_STRING="operator:wrong")
    none = deployments(guarded_site, "limits", PREFECT_API_AUTH_STRING="")

    assert (wrong.end(), none.end()) == (1, 1)
    (line,) = wrong.errors
    assert none.errors == [line]
    assert line.endswith("refuses the authentication (HTTP 401): set PREFECT_API_AUTH_STRING or PREFECT_API_KEY")


def test_the_password_of_another_server_keeps_nothing_from_a_temporary_one(site: Site) -> None:
    job = site.queue("true")

    done = site.run("--queue-mode", "--once", PREFECT_SERVER_API_AUTH_STRING=AUTH)

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "Processed queue: launched 1 jobs"), done.stderr
    assert is_in(job, Status.RUNNING, Status.COMPLETED)


@contextmanager
def in_front_of(server: PrefectServer, key: str) -> Iterator[str]:
    """An API that asks for this key, as Prefect Cloud's does; behind it is the real server."""

    class Handler(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            if self.headers["Authorization"] != f"Bearer {key}":
                self.send_error(401)
                return
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            kept = {name: self.headers[name] for name in self.headers if name.lower().startswith("prefect-csrf-")}
            answer = requests.request(
                self.command, server.url + self.path.removeprefix("/api"), data=body,
                auth=tuple(server.password.split(":")), headers=kept | {"Content-Type": "application/json"}, timeout=30,
            )  # fmt: skip
            self.send_response(answer.status_code)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward  # noqa: N815 (the library's names)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/api"
        finally:
            http.shutdown()
            thread.join()


def test_an_api_key_is_as_good(guarded_site: Site, guarded_prefect: PrefectServer) -> None:
    guarded_site.env |= {"PREFECT_API_AUTH_STRING": "", "PREFECT_API_KEY": "only-for-this-test"}
    with in_front_of(guarded_prefect, "only-for-this-test") as url:
        shown = deployments(guarded_site, "limits", PREFECT_API_URL=url)
        refused = deployments(guarded_site, "limits", PREFECT_API_URL=url, PREFECT_API_KEY="another")
        codes = (shown.end(90), refused.end(90))

    assert codes == (0, 1)
    assert shown.lines[-1] == "tag container-launch   limit 2   in use 0 (launch tasks in flight)"
    assert "refuses the authentication (HTTP 401)" in refused.errors[0]


def is_waited_for(job: ContainerJob) -> bool:
    """A pass stays: its lease was written when the job had run for a while. Who began before would hold it, and end."""
    job.refresh_from_db()
    until = Installation.load().work_until
    return until is not None and until > job.launched_at + timedelta(seconds=WORK_LEASE_SECONDS + 3)


def is_alone(server: PrefectServer) -> bool:
    """The pass that stays, without one that only looks, and might have to tell its end just when nobody listens."""
    alive = {"state": {"type": {"any_": ["PENDING", "RUNNING"]}}}
    return len(server.ask("/flow_runs/filter", flow_runs=alive)) == 1


@pytest.mark.timeout(400)
def test_an_outage_of_a_guarded_server_fails_nothing_and_ends_nothing(
    guarded_site: Site, guarded_prefect: PrefectServer
) -> None:
    # A pass that stays for as long as a slow machine may need, since there is a container to wait for.
    site, stays = guarded_site, json.dumps({"POLL_INTERVAL_SECONDS": 10, "WORK_SECONDS": 300})
    served = deployments(site, CONTAINER_MANAGER=stays)
    first = site.queue("sleep", "1000")
    wait_until(lambda: is_in(first, Status.RUNNING), 120)
    wait_until(lambda: is_waited_for(first) and is_alone(guarded_prefect), 120)
    guarded_prefect.stop()
    served.wait_for("is asked again, and what runs goes on", 120)
    # Nobody but the pass in progress can launch and harvest it.
    meanwhile = site.queue("true", networks=["none"])
    wait_until(lambda: is_in(meanwhile, Status.COMPLETED), 120)
    guarded_prefect.start()
    served.wait_for("the Prefect API is back", 120)
    afterwards = site.queue("true", networks=["none"])
    wait_until(lambda: is_in(afterwards, Status.COMPLETED), 120)
    served.send(signal.SIGTERM)

    assert served.end(90) == 0
    assert unwell(guarded_prefect) == []
    assert guarded_prefect.password not in "".join(served.lines + served.errors)
