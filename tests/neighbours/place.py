"""All that the people of a run share."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import docker
from prefect.client.orchestration import SyncPrefectClient

from tests.fuzz.cancelling import Cancellation

from .installation import HOST_SLOTS, Neighbour
from .landscape import Landscape
from .runs import Runs
from .stranger import Stranger

#: seconds; between two looks of one who waits.
_LOOK_SECONDS = 0.7
#: What the names of jobs begin with that never ran, and are old from the start.
OLD = "old."
#: What a person does: a generator that yields whenever it waits, so that one thread plays them all.
Person = Iterator[None]


@dataclass
class Home:
    """One of the two installations in a run."""

    site: Neighbour
    cancellation: Cancellation
    #: When a limit of `container-job` was set, by the clock of the day, and what it was; first, that of the product.
    limits: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, HOST_SLOTS)])
    queued: set[int] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    #: Runs that were asked for at its deployment, but with the labels of the other one.
    misdirected: set[UUID] = field(default_factory=set)

    def __str__(self) -> str:
        return self.site.title


@dataclass
class Place:
    homes: tuple[Home, Home]
    #: With a database of its own and no name: there is no room for it on the server.
    third: Neighbour
    api: SyncPrefectClient
    engine: docker.DockerClient
    runs: Runs
    stranger: Stranger
    landscape: Landscape
    draw: random.Random
    #: By the clock that never jumps: when no more is begun.
    load_until: float
    violations: list[str] = field(default_factory=list)
    _ids: dict[str, UUID] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.load_until

    def other(self, home: Home) -> Home:
        return self.homes[self.homes[0] is home]

    def deployment_id(self, home: Home, flow: str, name: str) -> UUID:
        """As it was when it was first asked for: no id may ever change."""
        full_name = f"{flow}/{home.site.named(name)}"
        if full_name not in self._ids:
            self._ids[full_name] = self.api.read_deployment_by_name(full_name).id
        return self._ids[full_name]


def waited(condition: Callable[[], Any], seconds: float) -> Person:
    """Yields until it is true, or the time is over."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        yield from pause(_LOOK_SECONDS)


def pause(seconds: float) -> Person:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield
