"""Three processes, started in order, watched, and stopped together."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from urllib.parse import urljoin
from urllib.request import urlopen

from django.contrib.auth import get_user_model
from django.core.management import call_command

from container_manager.private_files import make_folder, tighten
from flows.shut_server import HOST, without_proxy

from ..checkout import ROOT
from .env_file import PASSWORD, EnvFile
from .errors import CannotStart

ENV_FILE = ROOT / ".env"
ADMIN = "admin"
#: seconds; a Prefect server makes the tables of a new database first.
_START_SECONDS = 120
#: seconds; a pass that is in progress ends within twenty.
_STOP_SECONDS = 60
_TICK_SECONDS = 0.2


class Stopped(Exception):
    """Somebody asked for it."""


class Service:
    """A process of a session of its own, so that Ctrl-C reaches us alone; what it says is in a file."""

    def __init__(self, name: str, log: Path, *command: str, env: Mapping[str, str]) -> None:
        self.name, self._log = name, log
        # An earlier version may have left a log that others can read.
        tighten(log)
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 (our own programs, no shell)
                [sys.executable, *command],
                cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def check(self) -> None:
        if self._process.poll() is not None:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            last = lines[-1] if lines else f"exit code {self._process.returncode}"
            raise CannotStart(f"{self.name} ended: {last} (the whole of it: {self._log})")

    def has_said(self, words: str) -> bool:
        return words in self._log.read_text(errors="replace")

    def stop(self, is_urgent: Callable[[], bool]) -> None:
        self._process.terminate()
        until = time.monotonic() + _STOP_SECONDS
        while self._process.poll() is None:
            if is_urgent() or time.monotonic() > until:
                self._process.kill()
            time.sleep(_TICK_SECONDS)


class FirstLook:
    def __init__(self) -> None:
        self._stops = 0
        self._services: list[Service] = []
        self._logs = Path(os.environ["PREFECT_HOME"]) / "first-look"
        self._site = f"http://{HOST}:{_port('SITE_PORT', 8000)}"
        os.environ.update(without_proxy(os.environ))
        #: The API that a person has set. If it is empty we start a server, and this becomes its API.
        self._api = os.environ.get("PREFECT_API_URL") or EnvFile.read(ENV_FILE).api_of_somebody()
        self._prefect_port = None if self._api else _port("PREFECT_PORT", 4200)
        #: The environment of the processes that use that API.
        self._env: dict[str, str] = dict(os.environ) | ({"PREFECT_API_URL": self._api} if self._api else {})

    def run(self) -> None:
        """Until SIGTERM or Ctrl-C; a second one waits for nothing. `CannotStart` if a process ends by itself."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_stop)
        try:
            self._start()
            while True:
                self._wait()
        except Stopped:
            _say("stopping")
        finally:
            # The server last: the others have something to tell it.
            for service in reversed(self._services):
                service.stop(lambda: self._stops > 1)

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        # Nothing but a count: whatever else a handler does may run in the middle of it.
        self._stops += 1

    def _start(self) -> None:
        make_folder(self._logs)
        call_command("migrate", verbosity=0)
        login = _whence(self._api) if self._prefect_port is None else self._start_prefect(self._prefect_port)
        server = self._api.removesuffix("/api")
        _say(f"Prefect      {server}{login}")
        pages = _prefect_pages(server)
        addresses = {"SITE_URL": self._site, "PREFECT_UI_URL": pages}
        self._env["CONTAINER_MANAGER"] = json.dumps(addresses | json.loads(self._env.get("CONTAINER_MANAGER") or "{}"))
        deployments = self._add("deployments", "-m", "deployments")
        self._wait_until(lambda: deployments.has_said("serving "))
        _say(f"deployments  {pages}/deployments")
        self._add("site", "manage.py", "runserver", "--noreload", self._site.removeprefix("http://"))
        self._wait_until(lambda: _answers(f"{self._site}/admin/login/"))
        _say(f"site         {self._site}/admin/  {_see_to_admin()}")
        _say("Ctrl-C stops all of it. Something to look at: make demo, in another terminal")

    def _start_prefect(self, port: int) -> str:
        """Start our Prefect server. Returns a note on how to log in to its pages."""
        server, is_new = EnvFile.read(ENV_FILE).own_server(port)
        self._add(
            "Prefect", "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port),
            env=server.environment(os.environ),
        )  # fmt: skip
        self._wait_until(lambda: _answers(f"{server.api}/ready"))
        self._api, self._env = server.api, server.client_environment(os.environ)
        return f"  password {server.password}" if is_new else f"  (its password is {PASSWORD} in {ENV_FILE})"

    def _add(self, name: str, *command: str, env: Mapping[str, str] | None = None) -> Service:
        service = Service(name, self._logs / f"{name}.log", *command, env=env or self._env)
        self._services.append(service)
        return service

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + _START_SECONDS
        while not condition():
            if time.monotonic() > until:
                raise CannotStart(
                    f"{self._services[-1].name} did not start within {_START_SECONDS} s: see {self._logs}"
                )
            self._wait()

    def _wait(self) -> None:
        if self._stops:
            raise Stopped
        for service in self._services:
            service.check()
        time.sleep(_TICK_SECONDS)


def main() -> int:
    try:
        FirstLook().run()
    except CannotStart as e:
        sys.stderr.write(f"{e}\n")
        return 1
    return 0


def _port(variable: str, usual: int) -> int:
    """A free one; `CannotStart` names the variable that chooses another."""
    port = int(os.environ.get(variable) or usual)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as e:
            raise CannotStart(_taken(variable, port)) from e
    return port


def _taken(variable: str, port: int) -> str:
    line = f"port {port} is in use: stop what uses it, or choose another with `make serve {variable}={port + 1}`"
    if variable == "PREFECT_PORT":
        line += f"; if it is a Prefect server, use it with `PREFECT_API_URL=http://{HOST}:{port}/api make serve`"
    return line


def _whence(api: str) -> str:
    return "" if api == os.environ.get("PREFECT_API_URL") else f"  (which {ENV_FILE} names)"


def _answers(url: str) -> bool:
    with suppress(OSError), urlopen(url, timeout=5) as answer:  # noqa: S310 (our own address)
        return bool(answer.status == 200)
    return False


def _prefect_pages(server: str) -> str:
    """Where the pages are that a server leads to: it may have older ones, too, at the addresses without a prefix."""
    with suppress(OSError, ValueError), urlopen(f"{server}/ui-settings", timeout=5) as answer:  # noqa: S310 (as above)
        settings: dict[str, str | None] = json.load(answer)
        return urljoin(server, settings.get(f"{settings.get('default_ui')}_base_url") or "").rstrip("/")
    return server


def _see_to_admin() -> str:
    """Make a user for the admin, once; how to log in."""
    users = get_user_model()
    if users.objects.filter(is_superuser=True).exists():
        return f"(its password was printed when {ADMIN} was made; a new one: manage.py changepassword {ADMIN})"
    password = secrets.token_urlsafe(9)
    users.objects.create_superuser(ADMIN, password=password)
    return f"user {ADMIN}, password {password}"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
