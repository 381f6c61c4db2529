"""A worker: rounds without end, in a process of its own, on an Engine and a database that hold faults."""

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from django.db import connection
from django.db.utils import Error as DatabaseError

from container_manager.engine import DockerEngine
from container_manager.queue import QueueManager

from .faults import Chances, Faults, FaultyEngine, FaultyStatements

#: seconds
POLL_SECONDS, WORK_SECONDS, PAUSE_SECONDS = 0.5, 2, 0.2


@dataclass(frozen=True)
class Plan:
    """What all workers of a run know."""

    seed: int
    cap: int
    chances: Chances
    #: Where they write, a file each; they go on while it holds the file `go`.
    folder: Path

    @property
    def go(self) -> Path:
        return self.folder / "go"


class _Stop:
    """Set by the end of the run, or of the process that started this one."""

    def __init__(self, plan: Plan) -> None:
        self._go = plan.go
        self._parent = os.getppid()

    def is_set(self) -> bool:
        return not self._go.exists() or os.getppid() != self._parent


def run(plan: Plan, number: int, generation: int) -> None:
    """Until the run ends, or a fault ends it. `generation` counts the lives of worker `number`."""
    name = f"{number}-{generation}"
    output = os.open(plan.folder / f"{name}.output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    faults = Faults(f"{plan.seed} {name}", plan.chances, plan.folder / f"{name}.points")
    manager = QueueManager(lambda address, timeout: FaultyEngine(DockerEngine(address, timeout), faults))
    stop = _Stop(plan)
    with connection.execute_wrapper(FaultyStatements(faults)):
        if number % 2:
            manager.process_queue_continuous(plan.cap, POLL_SECONDS, stop)
        else:
            _passes(manager, plan.cap, stop)


def _passes(manager: QueueManager, cap: int, stop: _Stop) -> None:
    """As a schedule would make them, but closer together."""
    while not stop.is_set():
        # A pass ends with a database that fails; the next begins.
        with suppress(DatabaseError):
            manager.process_queue_continuous(cap, POLL_SECONDS, stop, work_seconds=WORK_SECONDS)
        time.sleep(PAUSE_SECONDS)
