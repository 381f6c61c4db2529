"""Serve the deployments: register them, then run what is due of them, until told to stop."""

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import UUID

import httpx
from django.db import connection
from django.db.utils import Error as DatabaseError
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import FlowRunResponse
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from container_manager.conf import get_settings
from flows.api import FlowRunError, child_environment, detail_of, is_of_one, translated
from flows.limits import settle

from . import forking
from .definitions import JOBS_RUNNER, QUEUE_RUNNER, Definition, definitions
from .due import DueRuns
from .health import Health
from .registering import check, register
from .renaming import replaced
from .running import FlowRunner

logger = logging.getLogger("container_manager.deployments")

#: Passes at once: one that stays and the next one, and a third by hand.
PASSES = 3
#: seconds; between two looks for what is due.
LOOK_SECONDS = 2.0
#: seconds; between two checks that the deployments are still ours and that the limits follow the hosts' slots.
CHECK_SECONDS = 10.0
#: seconds; between two checks whether deployments that were refused can be served now.
_RECONSIDER_SECONDS = 60.0
#: seconds; between two tries to reach an API that is away.
_AWAY_SECONDS = 5.0
#: seconds; of one call to the API.
REQUEST_SECONDS = 10
#: The server closes the connection after an answer of 500. The next request on it would fail, and is not retried.
_NO_REUSE = httpx.Limits(max_connections=16, max_keepalive_connections=0)
#: seconds; how soon a signal, a run's time and a run's end are noticed.
_TICK_SECONDS = 0.2
#: seconds; for what runs when we are told to stop. A pass ends within twenty.
_STOP_SECONDS = 45.0
#: Of a call at the start, when there is nothing yet to look after: a server on SQLite is busy now and then.
_START_RETRIES = 3
#: A flow run whose API is away at its end tries for some eight minutes to say how it ended: its work is done by then.
_CLIENT_RETRIES = 7


#: Returns the deployments that may be served. Called again while the service runs.
Allowed = Callable[[], tuple[Definition, ...]]
OnRegistered = Callable[[Iterable[Definition]], None]


def serve(
    allowed: Allowed,
    *,
    take_over: bool = False,
    alive_file: Path | None = None,
    on_registered: OnRegistered = lambda deployments: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then ask the flow runs to end and wait for them. `alive_file`: see `Health`.

    Raises `CannotServe`, and a `FlowRunError` if the API can't be reached at the start.
    """
    # Ours does not try again by itself: it has all flow runs to look after meanwhile.
    environment = {"PREFECT_CLIENT_MAX_RETRIES": str(_CLIENT_RETRIES)} | child_environment()
    with (
        _stop_signals() as stop,
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(sync_client=True, httpx_settings={"timeout": REQUEST_SECONDS, "limits": _NO_REUSE}) as client,
    ):
        with translated(), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: _START_RETRIES}):
            registered = register(client, allowed(), take_over=take_over)
        forking.prepare(environment)
        on_registered(registered.values())
        service = _Service(client, allowed, registered, environment, Health(alive_file), on_registered)
        try:
            while not stop.is_asked:
                service.go_on()
                time.sleep(_TICK_SECONDS)
        finally:
            service.stop()


class _Stop:
    is_asked = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """The first SIGTERM or SIGINT within is noted; a second one does what it always did."""
    stop = _Stop()
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.is_asked = True
        signal.signal(number, usual[signal.Signals(number)])

    for number in usual:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class _Service:
    def __init__(
        self,
        client: SyncPrefectClient,
        allowed: Allowed,
        registered: dict[UUID, Definition],
        environment: dict[str, str],
        health: Health,
        on_registered: OnRegistered,
    ) -> None:
        self._client, self._allowed, self._health, self._on_registered = client, allowed, health, on_registered
        self._take(registered)
        limits = {QUEUE_RUNNER: PASSES, JOBS_RUNNER: get_settings().JOB_RUNS}
        self._runners = {
            name: FlowRunner(limit, environment, self._entrypoint_of, self._note_end) for name, limit in limits.items()
        }
        self._look_at = self._check_at = time.monotonic()
        self._reconsider_at = time.monotonic() + _RECONSIDER_SECONDS
        self._failures = 0
        self._has_trouble = False
        self._told: set[str] = set()

    def go_on(self) -> None:
        """Do what is due now. An API that is away is logged once and asked again. `CannotServe` if serving must end."""
        self._health.check_database()
        now = time.monotonic()
        is_time_to_look = now >= self._look_at
        if self._failures and not is_time_to_look:
            return
        self._look_at = now + LOOK_SECONDS if is_time_to_look else self._look_at
        try:
            with translated():
                self._step(is_time_to_look)
        except FlowRunError as e:
            self._note_failure(e)
        except DatabaseError as e:
            self._health.note(e)
        else:
            if self._failures > 1:
                logger.warning("the Prefect API is back")
            self._failures = 0
            if is_time_to_look and not self._has_trouble:
                self._health.note_look()

    def _step(self, is_time_to_look: bool) -> None:
        if self._failures > 1:
            # It may be another server, or one that has lost its data.
            self._take(register(self._client, self._allowed()))
        elif time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + CHECK_SECONDS
            self._check()
        self._has_trouble = False
        for name, runner in self._runners.items():
            with self._for_itself(f"runner {name}"):
                if is_time_to_look:
                    self._look(name, runner)
                runner.go_on(self._client)

    @contextmanager
    def _for_itself(self, what: str) -> Iterator[None]:
        """An answer of 500 to something that one runner asks does not stop the other one. It is reported once."""
        try:
            yield
        except httpx.HTTPStatusError as e:
            if not is_of_one(e):
                raise
            self._has_trouble = True
            line = f"{what}: the Prefect API answers HTTP {e.response.status_code}: {detail_of(e.response)}"
            if line not in self._told:
                logger.warning("%s", line)
            self._told.add(line)

    def stop(self) -> None:
        """Ask what runs to end, wait for it, and tell how it ended if there is somebody to tell it to."""
        for runner in self._runners.values():
            runner.stop()
        until = time.monotonic() + _STOP_SECONDS
        while any(runner.is_busy for runner in self._runners.values()) and time.monotonic() < until:
            time.sleep(_TICK_SECONDS)
            self._tell()
        for runner in self._runners.values():
            runner.kill()
        self._tell()

    def _take(self, registered: dict[UUID, Definition]) -> None:
        self._registered = registered
        before = replaced(registered)
        self._served = registered | {pk: definition for pk, (definition, _) in before.items()}
        self._due = {pk: DueRuns(pk, definition) for pk, definition in registered.items()} | {
            pk: DueRuns(pk, definition, until=until) for pk, (definition, until) in before.items()
        }

    def _entrypoint_of(self, run: FlowRunResponse) -> str | None:
        definition = self._served.get(run.deployment_id) if run.deployment_id else None
        return definition.entrypoint if definition else None

    def _note_end(self, run: FlowRunResponse, state: "State[Any]") -> None:
        definition = self._served.get(run.deployment_id) if run.deployment_id else None
        # A run of the other runner ends as its job ends, which says nothing about this service.
        if definition is not None and definition.runner == QUEUE_RUNNER:
            self._health.note_end(definition, run, state)

    def _check(self) -> None:
        try:
            check(self._client, self._registered)
            if time.monotonic() >= self._reconsider_at:
                self._reconsider_at = time.monotonic() + _RECONSIDER_SECONDS
                with self._for_itself("registration"):
                    self._add_allowed()
            for tag, limit in settle(self._client, create=False).items():
                logger.warning(
                    "set the limit of tag %s to %d: it follows the hosts' slots", get_settings().named(tag), limit
                )
        finally:
            # Close it until the next check, so that an idle service holds no connection.
            connection.close()

    def _add_allowed(self) -> None:
        """Register the deployments that were refused or failed before, if they can be served now."""
        if len(self._registered) == len(definitions(get_settings())):
            return
        if missing := [one for one in self._allowed() if one not in self._registered.values()]:
            added = register(self._client, missing)
            self._take({**self._registered, **added})
            self._on_registered(added.values())

    def _tell(self) -> None:
        try:
            with translated():
                for runner in self._runners.values():
                    runner.go_on(self._client)
        except FlowRunError as e:
            self._note_failure(e)

    def _note_failure(self, error: FlowRunError) -> None:
        self._failures += 1
        self._look_at = time.monotonic() + _AWAY_SECONDS
        # One alone is nothing to speak of: a server on SQLite is busy now and then.
        if self._failures == 2:
            logger.warning("%s; it is asked again, and what runs goes on", error)

    def _look(self, name: str, runner: FlowRunner) -> None:
        ids = [pk for pk, definition in self._served.items() if definition.runner == name]
        due = [run for pk in ids for run in self._due[pk].find(self._client)]
        if any(run.work_queue_id for run in due):
            # They are meant for a worker, or are left over from a work pool.
            check(self._client, self._registered)
        runner.offer(due)
        runner.stop_cancelled(self._client)
