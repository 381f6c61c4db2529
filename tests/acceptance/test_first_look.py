"""`make serve`, as somebody runs it who has a first look."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import docker
import pytest
import requests
from dotenv import dotenv_values

from tests.conftest import PrefectServer, free_port

from .conftest import Running, as_a_person, environment, make

MINE = "FIRST=1\n# mine\n"


def stop(running: Running) -> None:
    os.killpg(running.process.pid, signal.SIGINT)
    running.process.wait(120)


def prefect(checkout: Path, *arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
    """As a person types it there."""
    home = {"PREFECT_HOME": str(checkout / ".prefect")}
    return subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=checkout, env=as_a_person() | home | changes, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def shared_server(prefect_server: PrefectServer) -> Iterator[PrefectServer]:
    """What is served on it ends with the test."""
    yield prefect_server
    for what in ("deployments", "v2/concurrency_limits"):
        for row in prefect_server.ask(f"/{what}/filter"):
            prefect_server.request("DELETE", f"/{what}/{row['id']}")


def log_in(admin: str, password: str) -> requests.Response:
    session = requests.Session()
    session.get(admin, timeout=30)
    form = {"username": "admin", "password": password, "csrfmiddlewaretoken": session.cookies["csrftoken"]}
    return session.post(f"{admin}login/?next=/admin/", data=form, timeout=30)


def is_closed(port: str) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(port))) != 0


def status_of(api: str, auth: tuple[str, ...] | None = None) -> int:
    return requests.get(f"{api}/admin/version", auth=auth, timeout=30).status_code


def open_to_others(folder: Path) -> list[str]:
    """Of what a first look leaves there."""
    kept = [folder / ".env", *folder.glob("db.sqlite3*"), folder / ".prefect"]
    home = folder / ".prefect"
    kept += [*home.glob("*.db*"), home / "first-look", *(home / "first-look").glob("*")]
    assert len(kept) >= 8, kept
    return [f"{path}: {path.stat().st_mode & 0o777:o}" for path in kept if path.stat().st_mode & 0o077]


@pytest.mark.timeout(600)
def test_it_starts_all_three_names_where_they_are_and_stops_them_together(
    engine: docker.DockerClient, checkout: Path
) -> None:
    ports = {"SITE_PORT": str(free_port()), "PREFECT_PORT": str(free_port())}
    site, pages = (f"http://127.0.0.1:{port}" for port in ports.values())
    (checkout / ".env").write_text(MINE)
    # As an earlier version has left them.
    (checkout / ".prefect").mkdir(mode=0o755)
    (checkout / "db.sqlite3").touch(mode=0o644)
    with make("serve", checkout, **ports) as running:
        running.wait_for("Ctrl-C stops all of it", 200)
        lines = list(running.lines)
        (password,) = re.findall(r"user admin, password (\S+)", "\n".join(lines))
        (secret,) = re.findall(r"^Prefect .*  password (\S+)$", "\n".join(lines), re.MULTILINE)
        admin = log_in(f"{site}/admin/", password)
        settings = requests.get(f"{pages}/ui-settings", timeout=30).json()
        stranger, wrong = status_of(f"{pages}/api"), status_of(f"{pages}/api", ("make-serve", "wrong"))
        known = status_of(f"{pages}/api", tuple(secret.split(":")))
        shown = prefect(checkout, "deployment", "ls")
        begun = prefect(checkout, "deployment", "run", "process-queue/scheduled")
        modes = open_to_others(checkout)
        stop(running)
        closed = [is_closed(port) for port in ports.values()]
    logged = "".join(path.read_text() for path in (checkout / ".prefect/first-look").iterdir())
    # On another port, which is in `.env` from then on; its password is not printed again.
    other = str(free_port())
    with make("serve", checkout, **ports | {"PREFECT_PORT": other}) as again:
        line = again.wait_for("Prefect  ", 200)
        last = again.wait_for("site  ", 200)
        same = status_of(f"http://127.0.0.1:{other}/api", tuple(secret.split(":")))

    urls = [f"Prefect      {pages}", f"deployments  {pages}/v2/deployments", f"site         {site}/admin/"]
    assert [line for line in lines if line.startswith(tuple(urls))] == [*lines[-4:-1]], lines
    assert (admin.status_code, "Container jobs" in admin.text) == (200, True)
    assert (settings["api_url"], settings["auth"], settings["csrf_enabled"]) == (f"{pages}/api", "BASIC", True)
    assert (stranger, wrong, known, same) == (401, 401, 200, 200)
    assert "process-queue/scheduled" in shown.stdout, shown.stderr
    assert begun.returncode == 0, begun.stderr
    assert (modes, closed) == ([], [True, True])
    assert secret not in logged
    assert (secret in "".join(again.lines), str(checkout / ".env") in line) == (False, True)
    assert "its password was printed when admin was made" in last
    assert (checkout / ".env").read_text().startswith(MINE)
    api = f"http://127.0.0.1:{other}/api"
    assert dotenv_values(checkout / ".env") == {
        "FIRST": "1", "PREFECT_API_URL": api, "PREFECT_API_AUTH_STRING": secret,
    }  # fmt: skip


@pytest.mark.timeout(400)
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_a_server_that_a_person_names_is_used_and_nothing_is_written(
    engine: docker.DockerClient, checkout: Path, shared_server: PrefectServer, place: str
) -> None:
    text = "".join(f"{name}={value}\n" for name, value in shared_server.client.items()) if place == ".env" else MINE
    (checkout / ".env").write_text(text)
    (checkout / ".env").chmod(0o644)
    named = {} if place == ".env" else shared_server.client
    with make("serve", checkout, SITE_PORT=str(free_port()), **named) as running:
        running.wait_for("site ", 200)
        line = running.wait_for("Prefect ")
    file = checkout / ".env"

    assert line.split()[1] == shared_server.pages
    assert (f"(which {file} names)" in line) == (place == ".env")
    assert (file.read_text(), file.stat().st_mode & 0o777) == (text, 0o644)
    assert shared_server.password not in "".join([*running.lines, *running.errors])


@contextmanager
def recording() -> Iterator[tuple[str, list[str]]]:
    """An API of somebody else's, and the headers that it has got."""
    heard: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def _note(self) -> None:
            heard.append(str(self.headers))
            self.send_error(404)

        do_GET = do_POST = do_PATCH = do_PUT = _note  # noqa: N815 (the library's names)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api", heard
        server.shutdown()
        thread.join()


#: How a person may name another API than `.env` does.
WAYS = {
    "a variable": lambda url: {"PREFECT_API_URL": url},
    "a variable in small letters": lambda url: {"prefect_api_url": url},
    "a variable as JSON": lambda url: {"PREFECT_API": f'{{"url": "{url}"}}'},
}
PROGRAMS = {
    "manage.py": ["manage.py", "process_container_jobs", "--queue-mode", "--once"],
    "manage.py, by deployment": ["manage.py", "process_container_jobs", "--queue-mode", "--once", "--via=deployment"],
    "deployments": ["-m", "deployments"],
    "deployments limits": ["-m", "deployments", "limits"],
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_password_in_the_file_is_not_sent_to_an_api_at_another_address(
    checkout: Path, tmp_path: Path, program: list[str], way: object
) -> None:
    ours = "PREFECT_API_URL=http://127.0.0.1:4200/api\nPREFECT_API_AUTH_STRING=make-serve:a-secret\n"
    (checkout / ".env").write_text(ours)
    env = as_a_person() | {"PREFECT_HOME": str(tmp_path), "DATABASE_URL": f"sqlite:///{tmp_path}/site.sqlite3"}
    subprocess.run([sys.executable, "manage.py", "migrate", "-v0"], cwd=checkout, env=env, check=True)
    with recording() as (url, heard):
        done = subprocess.run(
            [sys.executable, *program], cwd=checkout, env=env | way(url), capture_output=True, text=True, check=False
        )
        # One that is named with a password gets that.
        subprocess.run(
            [sys.executable, *program], cwd=checkout, env=env | way(url) | {"PREFECT_API_AUTH_STRING": "me:mine"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert heard, done.stderr
    assert "bWFrZS1zZXJ2Z" not in "".join(heard)
    assert "Basic bWU6bWluZQ==" in heard[-1]


@pytest.mark.timeout(400)
def test_serving_with_another_api_does_not_send_it_the_password_in_the_file(
    engine: docker.DockerClient, checkout: Path
) -> None:
    (checkout / ".env").write_text(
        "PREFECT_API_URL=http://127.0.0.1:4200/api\nPREFECT_API_AUTH_STRING=make-serve:a-secret\n"
    )
    with recording() as (url, heard), make("serve", checkout, PREFECT_API_URL=url, SITE_PORT=str(free_port())) as serve:
        serve.process.wait(200)

    assert heard, serve.errors
    assert "uthorization" not in "".join(heard)


@pytest.mark.timeout(600)
def test_the_demonstration_is_not_led_by_a_server_that_runs_or_has_ended(
    engine: docker.DockerClient, checkout: Path
) -> None:
    ports = {"SITE_PORT": str(free_port()), "PREFECT_PORT": str(free_port())}
    with make("serve", checkout, **ports) as serve:
        serve.wait_for("Ctrl-C stops all of it", 200)
        with make("demo", checkout) as beside:
            beside.process.wait(200)
        stop(serve)
    with make("demo", checkout) as after:
        after.process.wait(200)

    for demo in (beside, after):
        text = "\n".join(demo.lines)
        assert "no Prefect API is configured" in text
        assert "All eight ended as expected" in text
        assert demo.process.returncode == 0, text
    assert open_to_others(checkout) == []


def test_a_port_that_is_in_use_is_told_in_a_line_with_what_to_do(checkout: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "deployments.first_look"], cwd=checkout, capture_output=True, text=True, check=False,
            env=environment(PREFECT_HOME=str(tmp_path), SITE_PORT=str(free_port()), PREFECT_PORT=str(port)),
        )  # fmt: skip

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"port {port} is in use: stop what uses it, or choose another with `make serve PREFECT_PORT={port + 1}`; if it "
        f"is a Prefect server, use it with `PREFECT_API_URL=http://127.0.0.1:{port}/api make serve`\n"
    )
    assert not (checkout / ".env").exists()


@pytest.mark.parametrize("name", [".env", ".env.k3j2", "db.sqlite3-wal", ".prefect/prefect.db"])
def test_nothing_that_a_first_look_leaves_is_taken_into_git(checkout: Path, name: str) -> None:
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)

    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=checkout, check=False).returncode == 0
