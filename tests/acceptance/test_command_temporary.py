"""The temporary Prefect server of the inline command: it answers this command, and nobody else on the machine."""

import os
import signal
import sqlite3
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_KEY,
    PREFECT_API_URL,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    PREFECT_HOME,
    temporary_settings,
)

from container_manager.models import ContainerJob, Status
from flows import inline
from tests.conftest import wait_until

from .conftest import Running, Site

ONCE = ("--queue-mode", "--once", "--via=inline")
CONTINUOUS = ("--queue-mode", "--via=inline", "--poll-interval=1")
MINE = "operator:only-for-this-test"
#: What a person may have set, who has another API.
FOR_ANOTHER = {
    "PREFECT_API_AUTH_STRING": MINE,
    "PREFECT_API_KEY": "pnu_only-for-this-test",
    "PREFECT_CLIENT_CUSTOM_HEADERS": '{"X-Proxy-Token": "headers-only-for-this-test"}',
    "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",
    "PREFECT_SERVER_API_AUTH_STRING": "server-only-for-this-test",
    "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "false",
    "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "false",
    "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "*",
}
AS_JSON = {
    "PREFECT_API": '{"auth_string": "json-only-for-this-test"}',
    "PREFECT_SERVER": '{"api": {"auth_string": null, "csrf_protection_enabled": false, "cors_allowed_origins": "*"}}',
    "PREFECT_SERVER_API": '{"csrf_protection_enabled": false}',
}


def environment_of(pid: int) -> dict[str, str]:
    pairs = (line.partition("=") for line in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return {name: value for name, _, value in pairs}


def server_of(command: Running) -> dict[str, str]:
    """The environment of its server, which no other user may read; found once that answers."""

    def find() -> dict[str, str] | None:
        # The command's process may fork before it starts anything else; every thread has children of its own.
        tasks = Path(f"/proc/{command.process.pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        found = [environment_of(child) for child in children]
        return next((env for env in found if "PREFECT__SERVER_EPHEMERAL" in env), None)

    command.wait_for("Prefect: a temporary server")
    server: dict[str, str] = wait_until(find)
    return server


@contextmanager
def running(site: Site, **changes: str) -> Iterator[tuple[Running, dict[str, str]]]:
    """The command, in the midst of its work, and the environment of its server."""
    command = site.start(*CONTINUOUS, **changes)
    yield command, server_of(command)
    command.send(signal.SIGTERM)
    assert command.end() == 0, command.errors


@pytest.mark.parametrize("changes", [{}, FOR_ANOTHER, AS_JSON], ids=["nothing set", "set", "set as JSON"])
def test_nobody_else_gets_an_answer(site: Site, changes: dict[str, str]) -> None:
    wrong = [None, ("operator", "only-for-this-test"), ("", ""), ("json-only-for-this-test", "")]
    with running(site, **changes) as (_, server):
        url = server["PREFECT_API_URL"]
        read = {requests.get(f"{url}/{path}", auth=auth, timeout=30).status_code
                for path in ("admin/version", "admin/settings", "csrf-token?client=x", "docs", "openapi.json")
                for auth in wrong}  # fmt: skip
        written = {requests.post(f"{url}/deployments/filter", json={}, auth=auth, timeout=30).status_code
                   for auth in wrong}  # fmt: skip
        alive = {requests.get(f"{url}/{path}", timeout=30).status_code for path in ("health", "ready")}
        name, _, secret = server["PREFECT_SERVER_API_AUTH_STRING"].partition(":")
        known = requests.get(f"{url}/admin/version", auth=(name, secret), timeout=30)
        # Whoever knows the password, but is a page in a browser.
        page = requests.post(f"{url}/deployments/filter", json={}, auth=(name, secret), timeout=30)
        asked = requests.options(
            f"{url}/deployments/filter", timeout=30,
            headers={"Origin": "http://127.0.0.1:1", "Access-Control-Request-Method": "POST"},
        )  # fmt: skip

    assert (read, written, alive) == ({401}, {403}, {200})
    assert (known.status_code, page.status_code) == (200, 403)
    assert "access-control-allow-origin" not in asked.headers


def test_it_works_and_its_password_is_nowhere_to_be_read(site: Site, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    changes = FOR_ANOTHER | {
        "PREFECT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "DEBUG", "DJANGO_LOG_LEVEL": "DEBUG",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "DEBUG", "PREFECT_DEBUG_MODE": "true",
    }  # fmt: skip
    job = site.queue("true")
    with running(site, **changes) as (command, server):
        wait_until(lambda: status_of(job) == Status.COMPLETED)
        arguments = Path(f"/proc/{command.process.pid}/cmdline").read_text()
    said = "\n".join([*command.lines, *command.errors, arguments])
    kept = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
    secret = server["PREFECT_SERVER_API_AUTH_STRING"].partition(":")[2]
    with sqlite3.connect(home / "prefect.db") as database:
        counts = {table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                  for table in ("flow_run", "log", "events")}  # fmt: skip

    assert len(secret) >= 32
    assert secret not in said
    assert secret.encode() not in kept
    # What threads of the command send, it takes, too.
    assert all(counts.values()), counts
    modes = {path.name: oct(path.stat().st_mode & 0o77) for path in home.glob("prefect.db*")}
    assert set(modes.values()) == {"0o0"}, modes


def status_of(job: ContainerJob) -> str:
    job.refresh_from_db()
    return job.status


def test_each_one_has_a_password_of_its_own_and_nothing_that_is_meant_for_another_api(site: Site) -> None:
    passwords = set()
    for _ in range(2):
        with running(site, **FOR_ANOTHER) as (_, server):
            passwords.add(server["PREFECT_SERVER_API_AUTH_STRING"])
            told = "\n".join(server.values())

    assert len(passwords) == 2
    assert "only-for-this-test" not in told


@pytest.mark.usefixtures("site")
def test_this_process_sends_it_nothing_that_is_meant_for_another_api(prefect_home: Path, settings: Any) -> None:
    updates = {
        PREFECT_HOME: prefect_home, PREFECT_API_URL: "", PREFECT_API_AUTH_STRING: MINE, PREFECT_API_KEY: "pnu_mine",
        PREFECT_CLIENT_CUSTOM_HEADERS: {"X-Proxy-Token": "mine", "authorization": "Bearer mine"},
    }  # fmt: skip
    try:
        with temporary_settings(updates), inline.recorded(), get_client(sync_client=True) as client:
            headers = dict(client._client.headers)
            answer = client.hello()
    finally:
        inline.server.stop()

    assert answer.status_code == 200
    assert "mine" not in str(headers)
    assert headers["authorization"].startswith("Basic ")
    assert b64decode(headers["authorization"].removeprefix("Basic ")).startswith(b"temporary:")


@contextmanager
def proxy() -> Iterator[tuple[str, list[str]]]:
    """What it was asked for; it gets nothing for anybody."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def _refuse(self) -> None:
            asked.append(f"{self.command} {self.path} {self.headers}")
            self.send_error(502)

        do_GET = do_POST = do_CONNECT = _refuse  # noqa: N815 (the library's names)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_proxy_hears_of_it(site: Site, variable: str) -> None:
    job = site.queue("true")
    with proxy() as (address, asked):
        done = site.run(*ONCE, **{variable: address, "NO_PROXY": "registry.example"})

    assert (done.returncode, asked) == (0, []), done.stderr
    assert status_of(job) in (Status.RUNNING, Status.COMPLETED)


def test_where_the_environment_of_a_process_is_read_only_its_own_user_can() -> None:
    """On what the rest relies: the server learns its password by its environment."""
    assert os.stat("/proc/self/environ").st_mode & 0o77 == 0
