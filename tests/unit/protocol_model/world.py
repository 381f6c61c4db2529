"""What workers find: the row and what the database makes of a move, the Engine, the people, the time that passes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .state import ALIVE, ENDED, HERE, IDLE, LEASED, MOVES, NOT_IF_CANCELLED, Box, Row, State, Worker

#: Whether it is a fault, what happens, and what then is.
Steps = Iterator[tuple[bool, str, State]]


class Violation(Exception):
    """Something happened that never may."""


@dataclass(frozen=True)
class World:
    launchers: int = 2
    #: Workers that do all but claim.
    recoverers: int = 0
    max_tries: int = 1
    max_retries: int = 0
    cancels: int = 0
    requeues: int = 0
    removals: int = 0
    outages: int = 0
    #: Whether an Engine may refuse, and programs may fail.
    has_errors: bool = False
    reruns_lost: bool = False

    def first(self) -> State:
        workers = (IDLE,) * (self.launchers + self.recoverers)
        return State(Row(), (), workers, self.cancels, self.requeues, self.removals, self.outages)

    def is_done(self, s: State) -> bool:
        """Ended, nothing left behind, nobody busy with it."""
        is_clean = not any(box.state in HERE or box.late for box in s.boxes)
        return s.row.status in ENDED and is_clean and all(worker == IDLE for worker in s.workers)

    # What is nobody's of ours.

    def surroundings(self, s: State) -> Steps:
        if s.row.has_lease:
            yield False, "the lease ends", s._replace(row=s.row._replace(has_lease=False))
        if s.row.status == "scheduled":
            yield False, "it is due", self._changed(s, "queued")
        yield from self._people(s)
        for attempt, box in enumerate(s.boxes, 1):
            if box.state == "running":
                for code in (0, 7) if self.has_errors else (0,):
                    yield False, f"{attempt} ends with {code}", s.boxed(attempt, box._replace(state="ended", code=code))
            if box.late:
                dropped = s.late(attempt, "")
                yield False, f"the late {box.late} of {attempt} is dropped", dropped
                do = self._created if box.late == "create" else self._started
                yield False, f"the late {box.late} of {attempt} happens", do(dropped, attempt) or dropped

    def _people(self, s: State) -> Steps:
        row = s.row
        if s.cancels and row.status in ALIVE:
            yield True, "cancelled", s._replace(row=row._replace(is_cancelled=True), cancels=s.cancels - 1)
        elif s.cancels and row.status not in ENDED:
            yield True, "cancelled", self._changed(s, "cancelled")._replace(cancels=s.cancels - 1)
        if s.requeues and row.status in ENDED:
            again = self._changed(s, "queued", by_hand=True, is_cancelled=False, tries=0, retries=0)
            yield True, "retried by hand", again._replace(requeues=s.requeues - 1)
        for attempt, box in enumerate(s.boxes, 1):
            if s.removals and box.state in HERE:
                taken = s.boxed(attempt, Box("taken", late=box.late))
                yield True, f"{attempt} is removed by hand", taken._replace(removals=s.removals - 1)

    # The Engine.

    def _created(self, s: State, attempt: int) -> State | None:
        """None: the name is taken."""
        return None if s.box(attempt).state in HERE else s.boxed(attempt, Box("created"))

    def _started(self, s: State, attempt: int) -> State | None:
        """None: it is gone."""
        box = s.box(attempt)
        if box.state not in HERE:
            return None
        if box.state == "ended":
            raise Violation("an attempt is started twice")
        if any(other.state == "running" for number, other in enumerate(s.boxes, 1) if number != attempt):
            raise Violation("two containers of the job run at once")
        return s.boxed(attempt, box._replace(state="running"))

    def _removed(self, s: State, attempt: int) -> State:
        """Unless it runs."""
        box = s.box(attempt)
        if box.state == "ended" and not box.is_recorded:
            raise Violation("a result is removed before it is recorded")
        return s.boxed(attempt, Box("gone", late=box.late)) if box.state in ("created", "ended") else s

    # The row.

    def _moved(self, s: State, i: int, to: str, **fields: Any) -> State | None:
        """Compare-and-set by a worker; None: it lost."""
        if not self._owns(s, s.workers[i]) or (to in NOT_IF_CANCELLED and s.row.is_cancelled):
            return None
        s = self._changed(s, to, **fields)
        return s.with_worker(i, s.workers[i]._replace(status=to))

    def _owns(self, s: State, w: Worker) -> bool:
        return w.holds and w.status == s.row.status

    def _changed(self, s: State, to: str, *, by_hand: bool = False, **fields: Any) -> State:
        row = s.row
        if to not in MOVES[row.status]:
            raise Violation(f"no job that is {row.status} may become {to}")
        if row.status in ENDED and not by_hand:
            raise Violation(f"what was {row.status} changes")
        row = row._replace(status=to, has_lease=row.has_lease and to in LEASED)
        if to in ALIVE:
            return s._replace(row=row._replace(**fields))
        if s.row.status in ALIVE and s.box(row.attempt).has_run and not s.box(row.attempt).is_recorded:
            raise Violation("a run is forgotten")
        row = row._replace(**{"box": 0, "is_stopped": False} | fields)
        return s._replace(row=row, workers=self._estranged(s.workers))

    def _taken(self, s: State, i: int, at: str) -> State:
        """With a lease and a token of the worker's own, so that all others lose."""
        row = s.row._replace(has_lease=True)
        s = s._replace(row=row, workers=self._estranged(s.workers))
        return s.with_worker(i, Worker(at, row.attempt, row.status, True))

    def _estranged(self, workers: tuple[Worker, ...]) -> tuple[Worker, ...]:
        return tuple(w._replace(holds=False) if w.holds else w for w in workers)
