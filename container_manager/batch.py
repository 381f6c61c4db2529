"""One batch: claim and launch; and while that goes on, harvest what ends and claim its slots again."""

import time
from collections.abc import Collection

from django.db.utils import Error as DatabaseError

from . import shutdown
from .claiming import Claim, claim, promote_due
from .conf import get_settings
from .exceptions import DatabaseBusy
from .harvesting import harvest_ended
from .hosts import HostConnection, Hosts, usable
from .launching import launches
from .locks import statements_within
from .models import Installation
from .pulling import Pulls
from .steps import Driver
from .types import BatchResult, EndedJob
from .wakeups import current_wakeups

#: Jobs claimed at once, per thread of a host: each is launched well within the lease.
_CLAIMED_PER_THREAD = 4
#: seconds; for how long a batch claims while slots and ready jobs are left. Then a round looks after the rest.
_BATCH_SECONDS = 5
#: seconds; how soon a container's end is seen while calls are under way.
_LOOK_SECONDS = 0.05
#: seconds; how long a batch whose slots are full waits for one of them: a new batch costs a task run.
_LINGER_SECONDS = 2


def launch_batch(
    hosts: Hosts, pulls: Pulls, max_concurrent: int, timeout: float, only: Collection[int] | None
) -> BatchResult:
    """Claim and launch until slots or ready jobs run out, for five seconds at most.

    In a pass that listens to its hosts' events, ended containers are harvested meanwhile, and their slots filled.
    """
    began = time.monotonic()
    try:
        with statements_within(timeout):
            instance_id = Installation.load().instance_id
            connections = hosts.reached()
            pulls.settle()
            promote_due(began + timeout / 2)
    except DatabaseBusy as e:
        return BatchResult(limit=str(e))
    batch = _Batch(connections, pulls, instance_id, max_concurrent, only, began + timeout)
    return batch.run(began + _BATCH_SECONDS)


class _Batch:
    def __init__(
        self,
        connections: dict[int, HostConnection],
        pulls: Pulls,
        instance_id: str,
        max_concurrent: int,
        only: Collection[int] | None,
        give_up_at: float,
    ) -> None:
        """`give_up_at` (monotonic): until then a lock is waited for."""
        self._connections = connections
        self._pulls = pulls
        self._instance_id = instance_id
        self._max_concurrent = max_concurrent
        self._only = only
        self._give_up_at = give_up_at
        self._is_stopping = shutdown.signal()
        self._listening = current_wakeups()
        self._driver: Driver[BatchResult | EndedJob | None] = Driver()
        self._result = BatchResult()
        self._limit = ""
        #: Whether a claim may find a job and a slot for it.
        self._may_claim = True
        self._failure: DatabaseError | None = None
        #: Containers whose end was told: those being harvested, and those that no running row names yet.
        self._harvested: set[str] = set()
        self._unknown: set[str] = set()

    def run(self, until: float) -> BatchResult:
        """Begin nothing after `until` (monotonic), and end what was begun."""
        linger_until = until
        while True:
            is_over = self._is_stopping() or self._failure is not None or time.monotonic() >= until
            if not is_over:
                self._harvest_named()
                if self._may_claim and not self._driver.has_waiting:
                    self._claim()
            if self._driver.is_busy:
                for outcome in self._driver.go_on(_LOOK_SECONDS if self._listening else None):
                    self._take(outcome)
                linger_until = min(until, time.monotonic() + _LINGER_SECONDS)
            elif is_over or not (self._may_claim or self._linger(linger_until)):
                return self._end()

    def _claim(self) -> None:
        connections = usable(self._connections)
        try:
            claimed = claim(
                self._max_concurrent,
                connections.keys(),
                limit=_CLAIMED_PER_THREAD * get_settings().LAUNCH_THREADS * len(connections),
                only=self._only,
                timeout=max(0.1, self._give_up_at - time.monotonic()),
            )
        except DatabaseBusy as e:
            claimed = Claim(limit=str(e))
        except DatabaseError as e:
            self._failure = e
            return
        self._limit = claimed.limit
        self._may_claim = bool(claimed.jobs) and not claimed.limit
        if claimed.lease is not None:
            self._driver.add(
                launches(claimed.jobs, claimed.lease, connections, self._pulls, self._instance_id, self._is_stopping)
            )

    def _harvest_named(self) -> None:
        told = self._listening.ended_ids() if self._listening else set()
        new = told - self._harvested - self._unknown
        if new:
            found = harvest_ended(new, usable(self._connections))
            self._harvested |= found.keys()
            self._unknown |= new - found.keys()
            # First, since each frees a slot.
            self._driver.add(found.values(), is_urgent=True)

    def _take(self, outcome: BatchResult | EndedJob | None) -> None:
        if isinstance(outcome, EndedJob):
            self._result += BatchResult(ended=(outcome,))
            self._may_claim = True
        elif outcome is not None:
            self._result += outcome
            self._may_claim |= not outcome.launched
            # Its container may have ended before its row was running.
            self._unknown.clear()

    def _linger(self, until: float) -> bool:
        """Whether a container ends by then, while that is what the next job waits for."""
        left = until - time.monotonic()
        return self._listening is not None and bool(self._limit) and left > 0 and self._listening.wait(left)

    def _end(self) -> BatchResult:
        try:
            self._driver.raise_escaped()
        except DatabaseError as e:
            self._failure = self._failure or e
        if self._failure is not None:
            # What was done is told in any case; the next round meets the error again.
            if not self._result.launched and not self._result.ended:
                raise self._failure
            self._limit = f"the database failed: {self._failure}"
        return self._result + BatchResult(limit=self._limit)
