"""What is known of one job: its row, its containers, its workers. The statuses are the product's, as is their table."""

from typing import NamedTuple

from container_manager import models, transitions

# Plain strings: an Enum's hash is slow.
ALIVE, LEASED, ENDED, NOT_IF_CANCELLED = (
    frozenset(status.value for status in group)
    for group in (models.ALIVE, models.LEASED, models.ENDED, transitions._NOT_IF_CANCELLED)
)
MOVES = {source.value: frozenset(to.value for to in targets) for source, targets in transitions.MOVES.items()}
#: States of a container that exists.
HERE = ("created", "running", "ended")


class Row(NamedTuple):
    status: str = "queued"
    attempt: int = 0
    has_lease: bool = False
    #: The attempt whose container it names; 0: none.
    box: int = 0
    is_cancelled: bool = False
    is_stopped: bool = False
    tries: int = 0
    retries: int = 0


class Box(NamedTuple):
    """The container of one attempt; its name is the attempt's."""

    #: "", created, running, ended, gone (removed by us) or taken (removed by hand).
    state: str = ""
    code: int = 0
    is_recorded: bool = False
    #: What a client that gave up or died has asked of it, and is still to come.
    late: str = ""

    @property
    def has_run(self) -> bool:
        return self.state in ("running", "ended")


class Worker(NamedTuple):
    #: The step that comes next.
    at: str = "idle"
    #: The row as it last knew it, …
    attempt: int = 0
    status: str = ""
    #: … whether its token is still the row's, …
    holds: bool = False
    #: … and what it saw or means to do.
    note: str = ""


IDLE = Worker()


class State(NamedTuple):
    row: Row
    boxes: tuple[Box, ...]
    workers: tuple[Worker, ...]
    #: How often a person may still cancel, retry and remove a container, and how often the Engine may be away.
    cancels: int
    requeues: int
    removals: int
    outages: int

    def box(self, attempt: int) -> Box:
        return self.boxes[attempt - 1]

    def boxed(self, attempt: int, box: Box) -> "State":
        return self._replace(boxes=(*self.boxes[: attempt - 1], box, *self.boxes[attempt:]))

    def late(self, attempt: int, what: str) -> "State":
        return self.boxed(attempt, self.box(attempt)._replace(late=what))

    def with_worker(self, i: int, worker: Worker) -> "State":
        return self._replace(workers=(*self.workers[:i], worker, *self.workers[i + 1 :]))

    def at(self, i: int, at: str, note: str | None = None) -> "State":
        """The worker goes on there, …"""
        w = self.workers[i]
        return self.with_worker(i, w._replace(at=at, note=w.note if note is None else note))

    def idle(self, i: int) -> "State":
        """… or has ended, or died."""
        return self.with_worker(i, IDLE)
