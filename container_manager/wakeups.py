"""Woken by the end of a container, instead of asking for it."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from .engine import EndWatch
from .exceptions import EngineError
from .hosts import HostConnection

#: seconds; how soon a stop is noticed.
_SLICE_SECONDS = 0.2
#: seconds; between two attempts to listen to a host again.
_RECONNECT_SECONDS = 1
#: seconds; how long an id is told again for. By then the list knows it, too.
_NAMED_SECONDS = 60


class Wakeups:
    """Listens to the hosts' events in daemon threads: one that hangs must not keep the process from ending."""

    def __init__(self, instance_id: str, is_stopping: Callable[[], bool]) -> None:
        self._instance_id = instance_id
        self._is_stopping = is_stopping
        self._woken = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._named: dict[str, float] = {}
        self._watches: dict[int, EndWatch | None] = {}

    def watch(self, connections: Mapping[int, HostConnection]) -> None:
        """Listen to these hosts, too."""
        for pk, connection in connections.items():
            if pk not in self._watches:
                self._watches[pk] = None
                threading.Thread(
                    target=self._listen, args=(pk, connection), name=f"events-{connection.host.name}", daemon=True
                ).start()

    def ended_ids(self) -> set[str]:
        """Containers whose end was told of late; a list may still show them as running."""
        now = time.monotonic()
        with self._lock:
            self._named = {name: until for name, until in self._named.items() if until > now}
            return set(self._named)

    def forget(self, container_ids: set[str]) -> None:
        """These have been looked at: an inspect, unlike the list, does not lag."""
        with self._lock:
            for container_id in container_ids:
                self._named.pop(container_id, None)

    def wait(self, seconds: float) -> None:
        """Until a container ends, `seconds` are over, or a stop is asked for."""
        until = time.monotonic() + seconds
        while not self._is_stopping() and (left := until - time.monotonic()) > 0:
            if self._woken.wait(min(left, _SLICE_SECONDS)):
                break
        self._woken.clear()

    def close(self) -> None:
        self._closed.set()
        for watch in self._watches.values():
            if watch is not None:
                watch.close()

    def _listen(self, pk: int, connection: HostConnection) -> None:
        while not self._closed.is_set():
            try:
                watch = self._watches[pk] = connection.engine.watch_ends(self._instance_id)
                # What ended while nobody listened is found by the list.
                self._woken.set()
                for container_id in watch:
                    with self._lock:
                        self._named[container_id] = time.monotonic() + _NAMED_SECONDS
                    self._woken.set()
            except EngineError:
                # The round that follows reports the host; here is only to try again.
                pass
            self._closed.wait(_RECONNECT_SECONDS)


@contextmanager
def wakeups(instance_id: str, is_stopping: Callable[[], bool]) -> Iterator[Wakeups]:
    listening = Wakeups(instance_id, is_stopping)
    try:
        yield listening
    finally:
        listening.close()
