"""Runs a flow in this process, recorded at the configured Prefect API or on a temporary server of our own."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import atexit
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import httpx
from prefect import tags
from prefect.events.worker import EventsWorker
from prefect.exceptions import PrefectException
from prefect.flows import Flow
from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import APILogHandler, APILogWorker, PrefectConsoleHandler
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_KEY,
    PREFECT_API_URL,
    PREFECT_CLIENT_CSRF_SUPPORT_ENABLED,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    temporary_settings,
)

from container_manager import shutdown
from container_manager.exceptions import ShuttingDown
from container_manager.types import FlowRunReport, ReportT

from . import limits
from .api import ApiRefused, FlowRunError, check_api, child_environment
from .identity import inline_tag
from .shut_server import HOST, ShutServer, new_password, without_proxy
from .triggering import FlowRunFailed, report_of

logger = logging.getLogger("container_manager.flows")

#: seconds; on a new database the server makes its tables first, which takes eight on two cores.
START_SECONDS = 90
#: Of a call to an API that was there a moment ago: ten seconds in all, and a flow run that the API goes away from makes
#: three such calls until it ends. Prefect's own five retries take over a minute each. A SQLite server that is busy
#: needs one in two of three flow runs, and two in one of 25.
CLIENT_RETRIES = 2
#: seconds; for the last logs and events of a run.
DRAIN_SECONDS = 5
STOP_SECONDS = 5

#: The server ends with us, however we end: nobody else holds the other end of its standard input.
_SERVER = """
import os, socket, sys, threading
import uvicorn

def end_with_parent():
    os.read(0, 1)
    os._exit(0)

threading.Thread(target=end_with_parent, daemon=True).start()
config = uvicorn.Config(
    "prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on", timeout_graceful_shutdown=2
)
uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
"""


class TemporaryServer:
    """A Prefect server of this process; started when it is first needed, and again if it has died.

    Its password is new each time. Only this process and the server's know it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._address: ShutServer | None = None

    def ensure(self) -> ShutServer:
        """In a session of its own, so that Ctrl-C and a group's signals don't end it before us."""
        if self._process is not None and self._address is not None and self._process.poll() is None:
            return self._address
        self.stop()
        logger.info("starting a temporary Prefect server")
        atexit.register(self.stop)
        # Without a name, so that nothing is left behind, however we end.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `stop`)
        with socket.create_server((HOST, 0)) as listener:
            # Bound before it starts, so that nothing else can take the port meanwhile.
            address = ShutServer(listener.getsockname()[1], new_password("temporary"))
            self._process = subprocess.Popen(  # noqa: S603 (our own program, no shell)
                [sys.executable, "-c", _SERVER, str(listener.fileno())],
                env=_environment(address) | self._own_home(),
                pass_fds=[listener.fileno()],
                # Other users must not read its database.
                umask=0o077,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_ready(self._process, address.api)
        self._address = address
        return address

    def stop(self) -> None:
        """End it, after the last logs and events were sent."""
        process, log, self._process, self._log = self._process, self._log, None, None
        atexit.unregister(self.stop)
        if process is not None:
            if process.poll() is None:
                APILogWorker.drain_all(timeout=DRAIN_SECONDS)
                EventsWorker.drain_all(timeout=DRAIN_SECONDS)
                process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin:
                process.stdin.close()
        if log is not None:
            log.close()
        if self._home is not None:
            self._home.cleanup()
            self._home = None

    def _own_home(self) -> dict[str, str]:
        """Its database is kept in the Prefect home, since to make one takes seconds; if that can be written to."""
        if os.access(PREFECT_HOME.value(), os.W_OK):
            return {}
        self._home = tempfile.TemporaryDirectory(prefix="container-manager-prefect-")
        return {"PREFECT_HOME": self._home.name}

    def _wait_until_ready(self, process: "subprocess.Popen[bytes]", url: str) -> None:
        until = time.monotonic() + START_SECONDS
        while True:
            if shutdown.is_stopping():
                raise ShuttingDown
            if process.poll() is not None or time.monotonic() > until:
                raise ApiRefused(f"the temporary Prefect server did not start: {self._last_words()}")
            try:
                # The listener is open from the start: what is asked too early waits.
                if httpx.get(f"{url}/health", timeout=0.5, trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.05)

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        return " ".join(self._log.read().decode(errors="replace")[-500:].split()) or "it said nothing"


def _environment(address: ShutServer) -> dict[str, str]:
    return address.environment(child_environment()) | {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        # Its own default forgets who holds a slot of a limit.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }


server = TemporaryServer()


def run(flow: "Flow[..., Any]", parameters: dict[str, Any], report_type: type[ReportT]) -> FlowRunReport[ReportT]:
    """Run the flow, within `recorded`, in this thread, which must not be the main one: there Prefect would take the
    signal handlers.
    """
    if shutdown.is_stopping():
        raise ShuttingDown
    try:
        # `purge` finds the run by this tag.
        with tags(inline_tag()):
            state: Any = flow(**parameters, return_state=True)
    except (httpx.HTTPError, PrefectException) as e:
        # The run may have done its work; what is lost is its record.
        raise FlowRunFailed(f"the flow run could not be recorded: {e or type(e).__name__}") from e
    return report_of(state, "inline", report_type)


#: The URL of the API that Prefect's services in this process were made for.
_services_url = ""


def _renew_services(url: str) -> None:
    """Prefect keeps what sends events and takes the slots of tags for the life of a process, bound to its first API."""
    global _services_url
    if _services_url not in ("", url):
        # It stops all of them, whoever is asked; what still has something to send may do so in the background.
        APILogWorker.drain_all(timeout=0)
    _services_url = url


class Record(NamedTuple):
    """Where flow runs are recorded, and why not at the configured API if they are not."""

    where: str
    problem: str = ""


@contextmanager
def recorded(problem: str = "") -> Iterator[Record]:
    """Within, flow runs are recorded, and tags' limits read, at the configured API if it answers, else on our server.

    A `problem` with the API that is known already spares asking it. The heartbeat's thread would hold up the end of
    each run by a second.
    """
    where = ""
    if not problem:
        try:
            where = check_api()
        except FlowRunError as e:
            problem = str(e)
    if problem:
        address = server.ensure()
        _renew_services(address.api)
        os.environ.update(without_proxy(os.environ))
        with temporary_settings(_client_settings(address)), limits.on_temporary_server():
            yield Record("a temporary server that ends with this command", problem)
        return
    _renew_services(str(PREFECT_API_URL.value()))
    retries = min(CLIENT_RETRIES, PREFECT_CLIENT_MAX_RETRIES.value())
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_CLIENT_MAX_RETRIES: retries}):
        yield Record(where)


def _client_settings(address: ShutServer) -> dict[Any, Any]:
    """The settings for our server: its password, and no credentials that are meant for another API."""
    return {
        PREFECT_API_URL: address.api,
        PREFECT_API_AUTH_STRING: address.password,
        PREFECT_API_KEY: None,
        PREFECT_CLIENT_CUSTOM_HEADERS: {name: _header(name, address) for name in PREFECT_CLIENT_CUSTOM_HEADERS.value()},
        PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: True,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        # Should it die, its client would otherwise try for minutes; nothing else can keep it from answering.
        PREFECT_CLIENT_MAX_RETRIES: 1,
    }


def _header(name: str, address: ShutServer) -> str:
    """The value for a custom header that a person has set. It can be replaced, but not removed, and overrides ours."""
    return address.authorization if name.lower() == "authorization" else ""


#: What these warn of, the caller tells: that a flow run failed, and why; that the API is away.
_TOLD = ("prefect.flow_runs", "prefect.task_runs")
#: They also warn that they still send what they have while the process ends: that is as it should be.
_SENDERS = ("prefect.events.clients", EventsWorker.__name__, APILogWorker.__name__)


def quiet_console(*, is_verbose: bool = False, with_failures: bool = False) -> None:
    """Keep Prefect's lines off the console, for the life of this process; the server gets them all the same.

    Warnings stay, but for those that the caller gives in words of its own; all stay if it `is_verbose`. `with_failures`
    those of failed runs stay, with their tracebacks. What the project's own handlers show is left to them.
    """
    level = logging.INFO if is_verbose else logging.WARNING
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", logging.getLevelName(level))
    setup_logging()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(_is_not_ours)
            if not is_verbose and not with_failures:
                handler.addFilter(_is_not_told)
    for sender in _SENDERS:
        logging.getLogger(sender).setLevel(logging.ERROR)
    if not is_verbose:
        # What a server did not take before it went away comes out whole, and what was not sent is told of on stderr,
        # whatever the levels, by the switch that the standard library has for it.
        for handler in logging.getLogger("prefect._internal").handlers:
            # A handler of Prefect's configuration has a name; others, such as a test runner's, are not ours to change.
            if handler.name:
                handler.setLevel(logging.CRITICAL)
        logging.raiseExceptions = False


def _is_not_told(record: logging.LogRecord) -> bool:
    return not record.name.startswith(_TOLD)


def _is_not_ours(record: logging.LogRecord) -> bool:
    name = "container_manager"
    has_own = any(not isinstance(handler, APILogHandler) for handler in logging.getLogger(name).handlers)
    return not (has_own and record.name.startswith(name))
