"""Flow runs as processes: begins them when they are due, so many at once, and tells the API how they ended.

Prefect's own runner ends with its API, after three looks that fail, and takes its flow runs along. This one goes on,
and so do they: what the API could not be told it is told once it is back.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import State, StateType
from prefect.client.schemas.responses import FlowRunResponse
from prefect.exceptions import Abort, ObjectNotFound
from prefect.states import Cancelled, Crashed, Pending, Scheduled
from prefect.utilities.engine import propose_state_sync

from flows.api import detail_of, is_of_one
from flows.late_runs import ids_of_runs
from flows.own_run import RESCHEDULED

from .forking import FlowRunProcess

logger = logging.getLogger("container_manager.deployments")

#: seconds; between TERM and KILL for a cancelled flow run.
_GRACE_SECONDS = 30


@dataclass
class _Child:
    flow_run: FlowRunResponse
    process: FlowRunProcess
    kill_at: float | None = None


class FlowRunner:
    """At most `limit` flow runs at once. What raises httpx's errors goes on where it was when it is called again."""

    def __init__(
        self,
        limit: int,
        environment: dict[str, str],
        entrypoint_of: Callable[[FlowRunResponse], str | None],
        on_end: Callable[[FlowRunResponse, "State[Any]"], None] = lambda run, state: None,
    ) -> None:
        """`entrypoint_of` returns the entrypoint of a run's flow, or None if the run is not ours. `on_end` is called
        with each run that has ended, and its last state.
        """
        self._limit = limit
        self._environment = environment
        self._entrypoint_of, self._on_end = entrypoint_of, on_end
        #: Runs that are not ours, or that the API answers with an error: logged once, and never tried again.
        self._left_alone: set[UUID] = set()
        self._due: dict[UUID, FlowRunResponse] = {}
        #: Taken, but the answer was lost.
        self._unsure: dict[UUID, FlowRunResponse] = {}
        self._children: dict[UUID, _Child] = {}
        self._ended: list[_Child] = []
        #: Those whose process ended before they had begun, once.
        self._put_back: set[UUID] = set()
        self._is_stopping = False

    @property
    def is_busy(self) -> bool:
        return bool(self._children)

    def offer(self, runs: Iterable[FlowRunResponse]) -> None:
        """The runs that are due, now or soon, in place of those offered before."""
        runs = [run for run in runs if run.id not in self._children and run.id not in self._left_alone]
        self._due = self._unsure | {run.id: run for run in runs}

    def go_on(self, client: SyncPrefectClient) -> None:
        """Begin what is due by now, and tell of what has ended. Asks the API only if there is something."""
        self._notice_ends()
        while self._ended:
            with self._alone(self._ended[0].flow_run):
                self._settle(client, self._ended[0])
            self._ended.pop(0)
        now = datetime.now(UTC)
        for run in sorted(self._due.values(), key=start_time):
            if self._is_stopping or len(self._children) >= self._limit or start_time(run) > now:
                return
            with self._alone(run):
                self._begin(client, run)
            self._unsure.pop(run.id, None)
            del self._due[run.id]

    def stop_cancelled(self, client: SyncPrefectClient) -> None:
        if not self._children:
            return
        for flow_run_id in _cancelling(client, list(self._children)):
            child = self._children[flow_run_id]
            if child.kill_at is None:
                child.kill_at = time.monotonic() + _GRACE_SECONDS
                child.process.terminate()

    def stop(self) -> None:
        """Begin nothing more, and ask what runs to end."""
        self._is_stopping = True
        for child in self._children.values():
            child.process.terminate()

    def kill(self) -> None:
        for child in self._children.values():
            child.process.kill()

    def _begin(self, client: SyncPrefectClient, run: FlowRunResponse) -> None:
        entrypoint = self._entrypoint_of(run)
        if entrypoint is None:
            self._left_alone.add(run.id)
            logger.warning("flow run %s is of a deployment that is not served here, and is left alone", run.id)
            return
        self._unsure[run.id] = run
        if _take(client, run):
            self._children[run.id] = _Child(run, FlowRunProcess(run.id, entrypoint, self._environment))

    @contextmanager
    def _alone(self, run: FlowRunResponse) -> Iterator[None]:
        """An API error for this run does not stop the other runs."""
        try:
            yield
        except httpx.HTTPStatusError as e:
            if not is_of_one(e):
                raise
            self._left_alone.add(run.id)
            logger.warning(
                "flow run %s (%s) is left alone: the Prefect API answers HTTP %d for it: %s",
                *(run.name, run.id, e.response.status_code, detail_of(e.response)),
            )

    def _settle(self, client: SyncPrefectClient, child: _Child) -> None:
        """Say for a flow run how it ended, if it could not do so itself."""
        try:
            told = client.read_flow_run(child.flow_run.id).state
        except ObjectNotFound:
            return
        state = self._true_state(child, told) if told is not None else None
        if state is not None:
            client.set_flow_run_state(child.flow_run.id, state, force=True)
        if ended := state or told:
            self._on_end(child.flow_run, ended)

    def _true_state(self, child: _Child, told: State[Any]) -> State[Any] | None:
        """In place of what was told; None if that is true."""
        flow_run_id = child.flow_run.id
        # By SIGTERM before its body, or after it while it reported: Prefect calls that a crash, if it can tell.
        is_cut_off = child.process.exit_code == -signal.SIGTERM and (told.is_crashed() or told.is_running())
        if told.is_cancelling() or (is_cut_off and child.kill_at is not None):
            return Cancelled(message="Flow run was cancelled.")
        if is_cut_off and self._is_stopping:
            # Once more, by whoever serves next: it goes on where it was.
            return Scheduled(name=RESCHEDULED)
        if told.is_final() or told.is_scheduled() or told.is_paused():
            return None
        if told.is_pending() and (self._is_stopping or flow_run_id not in self._put_back):
            # It had not begun: we were told to end, or the API went away in that moment.
            self._put_back.add(flow_run_id)
            return Scheduled()
        return Crashed(message=f"The process of the flow run ended with {_describe(child.process.exit_code or 0)}.")

    def _notice_ends(self) -> None:
        for flow_run_id, child in list(self._children.items()):
            if child.process.exit_code is not None:
                self._ended.append(self._children.pop(flow_run_id))
            elif child.kill_at is not None and time.monotonic() >= child.kill_at:
                child.process.kill()


def _cancelling(client: SyncPrefectClient, flow_run_ids: list[UUID]) -> list[UUID]:
    """The runs that are to be cancelled, even if the API can't show one of them."""
    chosen = FlowRunFilter(
        id=FlowRunFilterId(any_=flow_run_ids),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING])),
    )
    try:
        return [run.id for run in client.read_flow_runs(flow_run_filter=chosen)]
    except httpx.HTTPStatusError as e:
        if not is_of_one(e):
            raise
        return ids_of_runs(client, chosen.model_dump(mode="json"))


def start_time(run: FlowRunResponse) -> datetime:
    return run.next_scheduled_start_time or datetime.now(UTC)


def _take(client: SyncPrefectClient, run: FlowRunResponse) -> bool:
    """False if another process has it, or someone has cancelled or deleted it, or it has run meanwhile."""
    ours: State[Any] = Pending(message=f"taken by {socket.gethostname()}, process {os.getpid()}")
    try:
        known = client.read_flow_run(run.id).state
        # From `Completed` or `Failed` too, Prefect would let it become pending, and it would run again.
        if known is None or not (known.is_scheduled() or known.is_pending()):
            return False
        state: State[Any] | None = propose_state_sync(client, ours, flow_run_id=run.id)
    except Abort:
        # It is pending already. If that is our own message, we have it: the answer was lost.
        state = client.read_flow_run(run.id).state
    except ObjectNotFound:
        return False
    return state is not None and state.is_pending() and state.message == ours.message


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
