"""What workers do, a method per step: `_x(state, number, worker)` is what one may do that is at `x`."""

from dataclasses import dataclass

from .state import ALIVE, HERE, IDLE, LEASED, Box, State, Worker
from .world import Steps, Violation, World

#: Steps that do something whoever has the row by now: a request that was decided on before, or a look at a leftover.
EFFECTS = frozenset(("asking_for_one", "asking_to_run", "removing", "clearing", "killing", "judging"))


@dataclass(frozen=True)
class Model(World):
    def steps(self, s: State) -> Steps:
        yield from self.surroundings(s)
        for i, w in enumerate(s.workers):
            if w != IDLE:
                for is_fault, what, after in getattr(self, f"_{w.at}")(s, i, w):
                    yield is_fault, f"{i}: {what}", after
                yield True, f"{i}: dies at {w.at}", s.idle(i)
            elif i in (0, self.launchers) or s.workers[i - 1] != IDLE:
                # One of several that are alike.
                yield from self._idle(s, i)

    def canonical(self, s: State) -> State:
        """Workers of a kind are alike, and one that can only lose is as good as idle."""
        workers = [w if w.holds or w.at in EFFECTS else IDLE for w in s.workers]
        return s._replace(workers=(*sorted(workers[: self.launchers]), *sorted(workers[self.launchers :])))

    def _idle(self, s: State, i: int) -> Steps:
        row = s.row
        if row.status == "queued" and i < self.launchers:
            claimed = self._changed(s, "launching", attempt=row.attempt + 1)
            claimed = claimed._replace(boxes=(*s.boxes, Box()))
            yield False, f"{i}: claims", self._taken(claimed, i, "creating")
        if row.status in LEASED and not row.has_lease:
            # Without a container there is nothing to ask a host for.
            at = "handing_back" if row.status == "launching" else "inspecting"
            yield False, f"{i}: takes over", self._taken(s, i, at)
        if row.status == "running":
            seen = Worker("looking", row.attempt, row.status, True, "stopped" if row.is_stopped else "")
            yield False, f"{i}: harvests", s.with_worker(i, seen)
            if row.is_cancelled:
                at = "killing" if row.is_stopped else "terminating"
                yield False, f"{i}: enforces", s.with_worker(i, seen._replace(at=at, note=""))
        for attempt, box in enumerate(s.boxes, 1):
            # What the row names, too: rows are read before the list.
            if box.state in HERE:
                yield False, f"{i}: lists {attempt}", s.with_worker(i, Worker("judging", attempt, note=box.state))

    # Launch.

    def _creating(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "checks its lease", s.at(i, "asking_for_one") if self._is_safe(s, w) else s.idle(i)

    def _asking_for_one(self, s: State, i: int, w: Worker) -> Steps:
        made = self._created(s, w.attempt)
        if made is None:
            yield False, "finds the name taken", s.idle(i)
            return
        yield False, "creates", made.at(i, "naming")
        yield True, "creates, and the answer is lost", made.idle(i)
        yield True, "creates later than it waits", s.late(w.attempt, "create").idle(i)
        if s.outages:
            yield True, "finds the host down", s._replace(outages=s.outages - 1).at(i, "handing_back_uncounted")
        if self.has_errors:
            yield True, "fails to create", s.at(i, "charging")
            yield True, "is refused", s.at(i, "failing")

    def _naming(self, s: State, i: int, w: Worker) -> Steps:
        moved = self._moved(s, i, "starting", box=w.attempt)
        yield False, "records what it created", moved.at(i, "starting") if moved else s.at(i, "withdrawing")

    def _withdrawing(self, s: State, i: int, w: Worker) -> Steps:
        is_asked = w.holds and s.row.is_cancelled
        yield False, "withdraws", s.at(i, "discarding", "cancelling") if is_asked else s.idle(i)

    def _starting(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "checks its lease", s.at(i, "asking_to_run") if self._is_safe(s, w) else s.idle(i)

    def _asking_to_run(self, s: State, i: int, w: Worker) -> Steps:
        started = self._started(s, w.attempt)
        if started is None:
            yield False, "finds it gone", s.idle(i)
            return
        yield False, "starts", started.at(i, "adopting")
        yield True, "starts, and the answer is lost", started.idle(i)
        yield True, "starts later than it waits", s.late(w.attempt, "start").idle(i)
        box = s.box(w.attempt)
        if self.has_errors and box.state == "created":
            yield True, "can't execute it", s.boxed(w.attempt, box._replace(code=127)).at(i, "failing")
            yield True, "fails to start", s.at(i, "noting", "charging")

    # Recover, and what launches do after a start that failed.

    def _inspecting(self, s: State, i: int, w: Worker) -> Steps:
        box = s.box(w.attempt)
        if box.has_run:
            at = "adopting"
        elif w.status == "recovering":
            at = "discarding" if box.state in HERE else "handing_back"
        elif box.state not in HERE:
            at = "losing"
        else:
            at = "failing" if box.code == 127 else "noting"
        yield False, f"sees it {box.state}", s.at(i, at, "handing_back")

    def _noting(self, s: State, i: int, w: Worker) -> Steps:
        moved = self._moved(s, i, "recovering")
        yield False, "notes that it will remove it", moved.at(i, "discarding") if moved else s.idle(i)

    def _discarding(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "checks its lease", s.at(i, "removing") if self._is_safe(s, w) else s.idle(i)

    def _removing(self, s: State, i: int, w: Worker) -> Steps:
        if s.box(w.attempt).has_run:
            yield False, "sees that it ran", s.at(i, "adopting")
            return
        removed = self._removed(s, w.attempt)
        yield False, "removes it", removed.at(i, w.note)
        yield True, "removes it, and the answer is lost", removed.idle(i)
        yield True, "asks in vain for its removal", s.idle(i)

    def _adopting(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "records that it runs", (self._moved(s, i, "running", tries=0) or s).idle(i)

    def _handing_back(self, s: State, i: int, w: Worker, *, is_counted: bool = True) -> Steps:
        tries = s.row.tries + is_counted
        if tries > self.max_tries:
            yield False, "hands back no more", s.at(i, "charging")
            return
        moved = self._moved(s, i, "queued", tries=tries)
        yield False, "hands back", moved.idle(i) if moved else s.at(i, "cancelling")

    def _handing_back_uncounted(self, s: State, i: int, w: Worker) -> Steps:
        yield from self._handing_back(s, i, w, is_counted=False)

    def _charging(self, s: State, i: int, w: Worker) -> Steps:
        moved = self._charged(s, i)
        yield False, "charges a try", moved.idle(i) if moved else s.at(i, "cancelling")

    def _charged(self, s: State, i: int) -> State | None:
        if s.row.retries >= self.max_retries:
            return self._moved(s, i, "failed")
        return self._moved(s, i, "scheduled", retries=s.row.retries + 1, tries=0)

    def _cancelling(self, s: State, i: int, w: Worker) -> Steps:
        moved = self._moved(s, i, "cancelled") if s.row.is_cancelled else None
        yield False, "ends it as cancelled", (moved or s).idle(i)

    def _failing(self, s: State, i: int, w: Worker) -> Steps:
        moved = self._moved(s, i, "failed")
        yield False, "ends it as failed", moved.at(i, "clearing") if moved else s.idle(i)

    def _losing(self, s: State, i: int, w: Worker) -> Steps:
        if self._owns(s, w) and s.box(w.attempt).state != "taken":
            raise Violation("it is lost, though nobody removed it")
        if not self.reruns_lost and not s.row.is_cancelled:
            yield False, "ends it as lost", (self._moved(s, i, "failed") or s).idle(i)
        elif w.status == "starting":
            moved = self._moved(s, i, "recovering")
            yield False, "notes that it is lost", moved.at(i, "losing") if moved else s.idle(i)
        else:
            yield False, "knows it lost", s.at(i, "cancelling" if s.row.is_cancelled else "charging")

    # Harvest, enforce, collect.

    def _looking(self, s: State, i: int, w: Worker) -> Steps:
        state = s.box(w.attempt).state
        after = s.idle(i) if state == "running" else s.at(i, "harvesting" if state == "ended" else "losing")
        yield False, f"sees it {state}", after

    def _harvesting(self, s: State, i: int, w: Worker) -> Steps:
        if not w.note and s.row.is_stopped and self._owns(s, w):
            yield False, "reads that it was stopped", s.at(i, "harvesting", "stopped")
            return
        box = s.box(w.attempt)
        recorded = s.boxed(w.attempt, box._replace(is_recorded=True))
        if w.note:
            moved = self._moved(recorded, i, "cancelled")
        elif box.code == 7:
            moved = self._charged(recorded, i)
        else:
            moved = self._moved(recorded, i, "failed" if box.code else "completed")
        if moved is None and s.row.is_cancelled:
            moved = self._moved(recorded, i, "cancelled")
        yield False, "records its end", moved.at(i, "clearing") if moved else s.idle(i)

    def _clearing(self, s: State, i: int, w: Worker) -> Steps:
        yield False, "removes what is left", self._removed(s, w.attempt).idle(i)

    def _terminating(self, s: State, i: int, w: Worker) -> Steps:
        if not self._owns(s, w) or s.row.is_stopped:
            yield False, "finds it stopped by another", s.idle(i)
            return
        yield False, "notes that it stops it", s._replace(row=s.row._replace(is_stopped=True)).at(i, "killing", "noted")

    def _killing(self, s: State, i: int, w: Worker) -> Steps:
        box = s.box(w.attempt)
        if box.state == "running":
            yield False, "stops it", s.boxed(w.attempt, box._replace(state="ended", code=143)).idle(i)
            yield True, "signals in vain", s.idle(i)
            return
        unsaid = s._replace(row=s.row._replace(is_stopped=False)) if w.note and self._owns(s, w) else s
        yield False, "finds that it ended by itself", unsaid.idle(i)

    def _judging(self, s: State, i: int, w: Worker) -> Steps:
        # The row is read again, after the list.
        is_left = self._is_of_now(s, w.attempt) or w.note == "running"
        yield False, "judges it", s.idle(i) if is_left else s.at(i, "clearing")

    # What more than one step asks.

    def _is_safe(self, s: State, w: Worker) -> bool:
        """By its own clock, which ends before the row's lease does."""
        return w.holds and s.row.has_lease

    def _is_of_now(self, s: State, attempt: int) -> bool:
        return s.row.status in ALIVE and s.row.attempt == attempt
