"""What is seen of a run from outside: the Engine's own events, and samples of the database."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any

import docker
from django.db import connection

from container_manager.containers import INSTANCE_LABEL
from container_manager.models import ContainerJob

#: seconds
_SAMPLE_SECONDS = 0.03


class Events:
    """Every start and end of the installation's containers since it began to listen.

    All are heard live: an Engine remembers only its last 256 events.
    """

    def __init__(self, client: docker.DockerClient, instance_id: str) -> None:
        label = f"{INSTANCE_LABEL}={instance_id}"
        self._told: list[dict[str, Any]] = []
        self._stream = client.events(
            decode=True, since=int(time.time()),
            filters={"type": "container", "label": label, "event": ["start", "die"]},
        )  # fmt: skip
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        for event in self._stream:
            self._told.append(event)

    def close(self) -> None:
        self._stream.close()
        self._thread.join(10)

    @property
    def starts(self) -> Counter[tuple[str, str]]:
        """How often each container was started, by (name, id)."""
        return Counter((e["Actor"]["Attributes"]["name"], e["id"]) for e in self._told if e["status"] == "start")

    @property
    def ends(self) -> int:
        return sum(event["status"] == "die" for event in self._told)

    @property
    def changes(self) -> list[tuple[float, int]]:
        """1 for each start and -1 for each end, with its time in seconds, by the Engine's clock."""
        in_order = sorted(self._told, key=lambda event: event["timeNano"])
        return [(event["timeNano"] / 1e9, 1 if event["status"] == "start" else -1) for event in in_order]

    @property
    def most_alive(self) -> int:
        """How many ran at one time."""
        return max(accumulate(change for _, change in self.changes), default=0)


class Samples:
    """The most jobs that held a slot at one time, in a thread and a connection of their own."""

    def __init__(self) -> None:
        self.most_alive = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._is_over.wait(_SAMPLE_SECONDS):
            self.most_alive = max(self.most_alive, ContainerJob.objects.alive().count())
        connection.close()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join(10)


@contextmanager
def watching(client: docker.DockerClient, instance_id: str) -> Iterator[tuple[Events, Samples]]:
    events, samples = Events(client, instance_id), Samples()
    try:
        yield events, samples
    finally:
        samples.close()
        events.close()


def containers(client: docker.DockerClient, instance_id: str) -> list[str]:
    """Names with states, by one call: an object for each would be asked for one by one, and be gone by then."""
    rows = client.api.containers(all=True, filters={"label": f"{INSTANCE_LABEL}={instance_id}"})
    return [f"{row['Names'][0].removeprefix('/')} ({row['State']})" for row in rows]


def remove_leftovers(client: docker.DockerClient, instance_id: str) -> list[str]:
    left = containers(client, instance_id)
    for name in left:
        # Gone by now, or on its way.
        with suppress(docker.errors.APIError):
            client.api.remove_container(name.partition(" ")[0], force=True, v=True)
    return left
