"""An Engine in memory: the contract's quirks, its own clock, and faults on demand. `test_engine_contract` holds
it to what a real Engine does.

`Fleet` is handed to `QueueManager`; each `FakeEngine` of it stands for one machine, and lives as long as the test.
"""

from .client import Call, FakeClient, FakeWatch
from .containers import PROGRAMS, Clock, FakeContainer, Program
from .engine import PATIENCE, SIDE_EFFECTS, FakeEngine, Gate, Hook, raising
from .fleet import (
    Fleet,
    in_background,
    launched,
    let_leases_end,
    one_round,
    queued,
    row,
    watched_fleet,
)

__all__ = [
    "PATIENCE",
    "PROGRAMS",
    "SIDE_EFFECTS",
    "Call",
    "Clock",
    "FakeClient",
    "FakeContainer",
    "FakeEngine",
    "FakeWatch",
    "Fleet",
    "Gate",
    "Hook",
    "Program",
    "in_background",
    "launched",
    "let_leases_end",
    "one_round",
    "queued",
    "raising",
    "row",
    "watched_fleet",
]
