"""Rounds: observe, harvest, enforce, recover, launch, report. Once, for a while, or until told to stop."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from django.db import close_old_connections
from django.db import connection as database
from django.db.models.functions import Now
from django.db.utils import Error as DatabaseError

from . import shutdown
from .cancelling import CancelledRuns, cancel_with_runs
from .collecting import collect
from .enforcing import enforce
from .harvesting import harvest
from .hosts import Hosts, usable
from .leases import WorkLease
from .models import ContainerJob, Installation
from .observing import observe
from .pulling import LOOK_SECONDS, Pulls
from .recovering import recover
from .types import BatchResult, LoopStats, RoundReport
from .wakeups import Wakeups, wakeups
from .watching import LogWatches

logger = logging.getLogger(__name__)

#: seconds; how long a pass that is woken by events trusts in them before it lists the containers again.
_BACKSTOP_SECONDS = 2.0
#: seconds; the longest wait after the database failed again and again.
_MAX_BACKOFF_SECONDS = 60.0

#: seconds; between two questions of who waits for one job.
_TICK_SECONDS = 0.5

LaunchStep = Callable[[], BatchResult]
OnRound = Callable[[RoundReport], None]


def has_ready() -> bool:
    """Whether a claim would find anything, were there a free slot."""
    return bool(ContainerJob.objects.queued().has_any("queued_at") or ContainerJob.objects.due().exists())


class Rounds:
    """The rounds of one process. `launch` is called once per round that has jobs ready."""

    def __init__(
        self,
        hosts: Hosts,
        pulls: Pulls,
        watches: LogWatches,
        launch: LaunchStep,
        cancelled_runs: CancelledRuns | None = None,
    ) -> None:
        self._hosts = hosts
        self._pulls = pulls
        self._watches = watches
        self._launch = launch
        self._cancelled_runs = cancelled_runs
        self._is_stopping = shutdown.signal()
        self._running_after = 0

    def once(self, listening: Wakeups | None = None) -> RoundReport:
        _refresh_connection()
        if self._cancelled_runs is not None:
            cancel_with_runs(self._cancelled_runs)
        connections, problems = self._hosts.reach()
        installation = Installation.load()
        named = listening.ended_ids() if listening else set()
        view = observe(connections, installation.instance_id, named)
        running = view.running_ids
        ended, anomalies = harvest(view, self._is_stopping)
        if listening:
            listening.forget(named & running)
            listening.watch(connections, installation.instance_id)
        stopped = enforce(view)
        recovered = recover(view)
        anomalies += collect(view, installation.instance_id).anomalies
        self._pulls.settle()
        batch = BatchResult()
        if not self._is_stopping() and has_ready():
            batch = self._launch()
        if not self._is_stopping():
            # Last, so that it holds up nothing but itself.
            self._watches.serve(usable(connections))
        # Read again: what was recovered may run. A row that is stuck before that keeps no pass waiting.
        self._running_after = len(view.running_ids) + batch.launched - len(batch.ended)
        return RoundReport(
            batch=batch,
            ended=(*ended, *batch.ended),
            stopped_ids=tuple(stopped),
            recovered_ids=tuple(recovered),
            anomalies=(*problems, *view.problems, *anomalies),
        )

    def for_a_while(self, work_seconds: float) -> LoopStats:
        """Keep the slots full for `work_seconds`, if no other pass does; one round in any case.

        Ends early when there is nothing that it can act on. A pull that this process began is waited for.
        """
        lease = WorkLease()
        if work_seconds > 0 and lease.acquire():
            stats = self._keep_full(lease, work_seconds)
        else:
            stats = LoopStats().plus(self.once())
        with wakeups(self._is_stopping) as listening:
            while self._pulls and not self._is_stopping():
                # Meanwhile the queue goes on: others rely on this pass.
                self._wait(listening, _BACKSTOP_SECONDS)
                stats = stats.plus(self.once(listening))
        return stats

    def for_ever(self, poll_seconds: float) -> LoopStats:
        """Until a stop is asked for. A database that is away is reported once, and waited for."""
        stats, database_health = LoopStats(), _DatabaseHealth()
        with wakeups(self._is_stopping) as listening:
            while not self._is_stopping():
                try:
                    stats = stats.plus(self.once(listening))
                except DatabaseError as e:
                    listening.wait(database_health.failed(e))
                else:
                    database_health.worked()
                    self._wait(listening, poll_seconds)
        return stats

    def until(self, is_done: Callable[[], bool], on_round: OnRound, one_at_a_time: threading.Lock) -> None:
        """Wait until `is_done` or a stop is asked for; meanwhile do the rounds while no pass stays to do them.

        `one_at_a_time` is held during a round; if it is taken, another thread is at one. A database that is away
        is reported once, and waited for.
        """
        lease, database_health, look_at = WorkLease(), _DatabaseHealth(), 0.0
        # One in any case: a pass that stays may not look again for seconds.
        is_due = True
        with wakeups(self._is_stopping) as listening:
            try:
                while not self._is_stopping():
                    try:
                        if is_done():
                            return
                        if is_due or time.monotonic() >= look_at:
                            is_ours = bool(self._pulls) or (lease.is_free() and lease.acquire())
                            if is_ours:
                                look_at = time.monotonic() + _BACKSTOP_SECONDS
                            if is_ours or is_due:
                                self._once_alone(one_at_a_time, on_round, listening if is_ours else None)
                    except DatabaseError as e:
                        _refresh_connection()
                        listening.wait(database_health.failed(e))
                    else:
                        database_health.worked()
                        is_due = listening.wait(_TICK_SECONDS)
            finally:
                with suppress(DatabaseError):
                    lease.release()

    def _once_alone(self, one_at_a_time: threading.Lock, on_round: OnRound, listening: Wakeups | None) -> None:
        if not one_at_a_time.acquire(blocking=False):
            return
        try:
            on_round(self.once(listening))
        finally:
            one_at_a_time.release()

    def _keep_full(self, lease: WorkLease, work_seconds: float) -> LoopStats:
        until = time.monotonic() + work_seconds
        stats = LoopStats()
        try:
            with wakeups(self._is_stopping) as listening:
                while True:
                    stats = stats.plus(self.once(listening))
                    left = until - time.monotonic()
                    if self._is_stopping() or left <= 0 or not lease.acquire():
                        break
                    wait = self._patience(left)
                    if wait is None:
                        break
                    self._wait(listening, min(wait, left))
        finally:
            lease.release()
        # Released first: a pass that found the lease live has relied on us for what came in since our last look.
        if not self._is_stopping() and has_ready() and not stats.throttled and not stats.limit:
            stats = stats.plus(self.once())
        return stats

    def _patience(self, left: float) -> float | None:
        """How long to wait before the next round, in seconds; None: there is nothing to stay for."""
        if self._pulls or self._running_after > 0:
            return _BACKSTOP_SECONDS
        due = _seconds_to_next_due()
        return due if due is not None and due < left else None

    def _wait(self, listening: Wakeups, seconds: float) -> None:
        """Until a container or a pull ends, `seconds` are over, or a stop is asked for."""
        until = time.monotonic() + seconds
        while self._pulls and (left := until - time.monotonic()) > 0:
            if listening.wait(min(LOOK_SECONDS, left)) or self._is_stopping() or self._pulls.settle():
                return
        listening.wait(until - time.monotonic())


class _DatabaseHealth:
    """Says once that the database is away, and once that it is back."""

    def __init__(self) -> None:
        self._failures = 0

    def failed(self, error: DatabaseError) -> float:
        """How long to wait before the next try, in seconds."""
        self._failures += 1
        if self._failures == 1:
            logger.error("the database failed, and is tried again: %s", error)
        return float(min(2.0**self._failures, _MAX_BACKOFF_SECONDS))

    def worked(self) -> None:
        if self._failures:
            logger.warning("the database is back")
        self._failures = 0


def _refresh_connection() -> None:
    # A connection that the server has closed fails for ever until it is closed on this side, too.
    if not database.in_atomic_block:
        close_old_connections()


def _seconds_to_next_due() -> float | None:
    scheduled = ContainerJob.objects.scheduled().order_by("scheduled_for", "pk")
    first = scheduled.annotate(now=Now()).values_list("scheduled_for", "now").first()
    return max(0.0, (first[0] - first[1]).total_seconds()) if first else None
