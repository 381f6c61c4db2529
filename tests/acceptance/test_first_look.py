"""`make serve`, as somebody runs it who has a first look."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker
import pytest
import requests

from tests.conftest import ROOT, free_port

from .conftest import Running, environment


@contextmanager
def make_serve(home: Path, **changes: str) -> Iterator[Running]:
    # Not the outer make's flags: they would reach the inner one.
    kept = {name: value for name, value in environment().items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    home_of_its_own = {"DATABASE_URL": f"sqlite:///{home / 'site.sqlite3'}", "PREFECT_HOME": str(home / "prefect")}
    process = subprocess.Popen(
        ["make", "serve"], cwd=ROOT, env=kept | home_of_its_own | changes, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    running = Running(process)
    try:
        yield running
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        running.end(120)


@pytest.fixture
def shared_server(prefect_server: str) -> Iterator[str]:
    """What is served on it ends with the test."""
    yield prefect_server
    for deployment in requests.post(f"{prefect_server}/deployments/filter", json={}, timeout=30).json():
        requests.delete(f"{prefect_server}/deployments/{deployment['id']}", timeout=30)
    for limit in requests.post(f"{prefect_server}/v2/concurrency_limits/filter", json={}, timeout=30).json():
        requests.delete(f"{prefect_server}/v2/concurrency_limits/{limit['id']}", timeout=30)


def log_in(admin: str, password: str) -> requests.Response:
    session = requests.Session()
    session.get(admin, timeout=30)
    form = {"username": "admin", "password": password, "csrfmiddlewaretoken": session.cookies["csrftoken"]}
    return session.post(f"{admin}login/?next=/admin/", data=form, timeout=30)


def is_closed(port: str) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(port))) != 0


@pytest.mark.timeout(400)
def test_it_starts_all_three_names_where_they_are_and_stops_them_together(
    engine: docker.DockerClient, shared_server: str, tmp_path: Path
) -> None:
    ports = {"SITE_PORT": str(free_port()), "PREFECT_PORT": str(free_port())}
    site, prefect = (f"http://127.0.0.1:{port}" for port in ports.values())
    with make_serve(tmp_path, **ports) as running:
        running.wait_for("Ctrl-C stops all of it", 200)
        lines = list(running.lines)
        (password,) = re.findall(r"user admin, password (\S+)", "\n".join(lines))
        pages = log_in(f"{site}/admin/", password)
        deployments = requests.post(f"{prefect}/api/deployments/filter", json={}, timeout=30).json()
        asks = requests.get(f"{prefect}/ui-settings", timeout=30).json()["api_url"]
        os.killpg(running.process.pid, signal.SIGINT)
        running.process.wait(120)
        closed = [is_closed(port) for port in ports.values()]
    with make_serve(tmp_path, PREFECT_API_URL=shared_server, SITE_PORT=ports["SITE_PORT"]) as again:
        line = again.wait_for("site ", 200)
        again.send(signal.SIGTERM)
        again.process.wait(120)

    urls = [f"Prefect      {prefect}", f"deployments  {prefect}/v2/deployments", f"site         {site}/admin/"]
    assert [line for line in lines if line.startswith(tuple(urls))] == [*lines[-4:-1]], lines
    assert (pages.status_code, "Container jobs" in pages.text) == (200, True)
    assert {"scheduled", "on-demand"} <= {deployment["name"] for deployment in deployments}
    assert (asks, closed, is_closed(ports["SITE_PORT"])) == (f"{prefect}/api", [True, True], True)
    assert "its password was printed when admin was made" in line


def test_a_port_that_is_in_use_is_told_in_a_line_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "deployments.first_look"], cwd=ROOT, capture_output=True, text=True, check=False,
            env=environment(PREFECT_HOME=str(tmp_path), SITE_PORT=str(free_port()), PREFECT_PORT=str(port)),
        )  # fmt: skip

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"port {port} is in use: stop what uses it, or choose another with `make serve PREFECT_PORT={port + 1}`; if it "
        f"is a Prefect server, use it with `PREFECT_API_URL=http://127.0.0.1:{port}/api make serve`\n"
    )
