"""Where a worker may die or stall: before and after each call to the Engine and each compare-and-set. And answers of
the Engine that are lost on the way.

All are met at seams that exist anyway: the Engine that `QueueManager` is handed, and Django's wrapper around
the execution of statements. The product holds nothing for it.
"""

import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from django.db import IntegrityError, connection

from container_manager.engine import Engine
from container_manager.exceptions import OutcomeUnknown
from container_manager.models import ContainerJob
from container_manager.types import Observation

#: seconds; longer than the lease of `settings`.
LONGEST_STALL_SECONDS = 4.5
_LONG_STALL = (2.2, LONGEST_STALL_SECONDS)
#: seconds; so short that whoever stalls may act after it, and long enough for a program to start and end meanwhile.
_SHORT_STALL = (0.4, 1.4)
#: Every run passes these, else a seam is gone and the fuzz is hollow.
CERTAIN = {
    f"{when} {what}"
    for what in ("create", "start", "list", "inspect", "read_log", "remove",
                 "move to launching", "move to starting", "move to running", "move to completed")
    for when in ("before", "after")
}  # fmt: skip
#: Every run of some length passes these, too: what recovery, retries, deadlines and cancellation do.
LIKELY = {
    f"{when} {what}"
    for what in ("signal", "take over", "note of a stop", "move to recovering", "move to queued", "move to scheduled",
                 "move to failed", "move to cancelled")
    for when in ("before", "after")
}  # fmt: skip


class _Odds(NamedTuple):
    """How much likelier faults are at a point than elsewhere."""

    kill: float = 1.0
    stall: float = 1.0
    #: One of these is drawn.
    stalls: Sequence[tuple[float, float]] = (_LONG_STALL, _SHORT_STALL)


#: Rounds list all the time, while recovery is rare; and what goes wrong with a protocol takes two faults: a launcher's
#: that stalls at its start until its lease is over, and another's that stalls in the recovery of the same job.
_ODDS = {
    "list": _Odds(0.5, 0.5),
    "start": _Odds(5.0, 14.0, [_LONG_STALL]),
    "move to recovering": _Odds(5.0, 25.0, [_LONG_STALL, _SHORT_STALL, _SHORT_STALL]),
    "take over": _Odds(2.0, 2.0),
    "move to queued": _Odds(2.0, 2.0),
    "signal": _Odds(3.0, 3.0),
    "note of a stop": _Odds(3.0, 3.0),
    "move to cancelled": _Odds(4.0, 4.0),
}

#: What an Engine may have done though it gave no answer.
_SIDE_EFFECTS = ("create", "start", "signal", "remove")
_UPDATE = re.compile(rf'UPDATE "{ContainerJob._meta.db_table}" SET "(\w+)" = ')
#: The first column of a compare-and-set without a change of status.
_AMENDMENTS = {"claim_token": "take over", "stop_requested_at": "note of a stop", "missing_at": "note of a gap"}


@dataclass(frozen=True)
class Chances:
    """The probabilities of faults."""

    #: At the passing of a point, but for the weights above.
    kill: float
    stall: float
    #: Of each answer to a call that changes something.
    lose: float
    #: By the clock that never jumps, which all processes of a machine share: no faults from then on.
    calm_at: float


class Faults:
    """What befalls one worker. Drawn per point, so that it does not depend on what other threads do meanwhile.

    Each passing of a point, and each fault, is a line of `log`.
    """

    def __init__(self, seed: str, chances: Chances, log: Path) -> None:
        self._seed, self._chances = seed, chances
        self._draws: dict[str, random.Random] = {}
        # Unbuffered: it must be written when the process dies.
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def at(self, point: str, *, may_stall: bool = True) -> None:
        draw = self._draw(point)
        odds = _ODDS.get(point.partition(" ")[2], _Odds())
        kill, stall = self._chances.kill * odds.kill, self._chances.stall * odds.stall
        chance = draw.random()
        self._note("pass", point)
        if self._is_calm:
            return
        if chance < kill:
            self._note("kill", point)
            os.kill(os.getpid(), signal.SIGKILL)
        if chance < kill + stall and may_stall:
            self._note("stall", point)
            time.sleep(draw.uniform(*draw.choice(odds.stalls)))

    def loses(self, step: str) -> bool:
        """Whether the answer to a call is lost."""
        point = f"answer to {step}"
        is_lost = self._draw(point).random() < self._chances.lose and not self._is_calm
        if is_lost:
            self._note("lose", point)
        return is_lost

    def refused(self, sql: str) -> None:
        """Not a fault of ours: the database kept a constraint which the product's own guards should have kept."""
        self._note("refuse", sql.partition(" (")[0][:80])

    @property
    def _is_calm(self) -> bool:
        return time.monotonic() >= self._chances.calm_at

    def _draw(self, point: str) -> random.Random:
        return self._draws.setdefault(point, random.Random(f"{self._seed} {point}"))

    def _note(self, what: str, point: str) -> None:
        os.write(self._log, f"{what} {point}\n".encode())


#: `pass`, `kill`, `stall`, `lose`, `refuse` -> point -> how often.
Tally = Mapping[str, Counter[str]]


def tally(logs: Iterable[Path]) -> Tally:
    counts: dict[str, Counter[str]] = {what: Counter() for what in ("pass", "kill", "stall", "lose", "refuse")}
    for log in logs:
        for line in log.read_text().splitlines():
            what, _, point = line.partition(" ")
            counts[what][point] += 1
    return counts


class FaultyEngine:
    """An Engine whose calls have a point before, after the last look at the lease, and one after."""

    _POINTS = ("create", "start", "list", "inspect", "read_log", "signal", "remove")

    def __init__(self, engine: Engine, faults: Faults) -> None:
        self._engine, self._faults = engine, faults
        self._unstarted: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._engine, name)
        return partial(self._between_points, name, call) if name in self._POINTS else call

    def _between_points(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The look that shows an unstarted container and its removal are one call, within which nobody stalls: a program
        # that starts and ends in that gap is the one thing that the protocol does not promise to notice.
        is_within = name == "remove" and args[0] in self._unstarted
        self._faults.at(f"before {name}", may_stall=not is_within)
        answer = call(*args, **kwargs)
        is_within = False
        if isinstance(answer, Observation):
            is_within = not answer.has_run
            (self._unstarted.add if is_within else self._unstarted.discard)(answer.container_id)
        self._faults.at(f"after {name}", may_stall=not is_within)
        if name in _SIDE_EFFECTS and self._faults.loses(name):
            raise OutcomeUnknown(f"{name}: the answer was lost")
        return answer


class FaultyStatements:
    """For `connection.execute_wrapper`: a point before each compare-and-set of a job, and one after its commit.

    One in a transaction has a third between the two, where nothing of it is visible to others yet.
    """

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def __call__(self, execute: Callable[..., Any], sql: str, params: Any, many: bool, context: Any) -> Any:
        write = _name(sql, params)
        if write is not None:
            self._faults.at(f"before {write}")
        try:
            result = execute(sql, params, many, context)
        except IntegrityError:
            self._faults.refused(sql)
            raise
        if write is None:
            return result
        if connection.in_atomic_block:
            self._faults.at(f"within {write}")
        connection.on_commit(partial(self._faults.at, f"after {write}"))
        return result


def _name(sql: str, params: Any) -> str | None:
    update = _UPDATE.match(sql)
    if update is None:
        return None
    return f"move to {params[0]}" if update[1] == "status" else _AMENDMENTS.get(update[1])
