"""The protocol as a small machine: one job, its containers, and workers of which any may stop at any step.

It mirrors what `launching`, `recovering`, `harvesting`, `enforcing` and `collecting` do, a method per step that
another worker may get in before or after. A stall is a worker that is not chosen for a while. A guard and the call
behind it are two steps, so that any time may pass between them. A look at a container and its removal are one: a
container that starts, runs and ends between the two is the one thing that the protocol does not see.
"""

from .search import Found, TooManyStates, search
from .state import ALIVE, LEASED, MOVES, Box, Row, State, Worker
from .workers import Model
from .world import Steps

__all__ = [
    "ALIVE",
    "LEASED",
    "MOVES",
    "Box",
    "Found",
    "Model",
    "Row",
    "State",
    "Steps",
    "TooManyStates",
    "Worker",
    "search",
]
