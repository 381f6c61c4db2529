"""Woken by the end of a container, instead of asking for it."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from .exceptions import EngineError
from .hosts import HostConnection
from .streams import EndWatch

#: seconds; how soon a stop is noticed.
_SLICE_SECONDS = 0.2
#: seconds; between two attempts to listen to a host again.
_RECONNECT_SECONDS = 1
#: seconds; how long an id is told again for. By then the list knows it, too.
_NAMED_SECONDS = 60


class Wakeups:
    """What the hosts' events tell, for the one thread that does the rounds."""

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self._is_stopping = is_stopping
        self._woken = threading.Event()
        self._lock = threading.Lock()
        self._named: dict[str, float] = {}
        self._listeners: dict[int, _Listener] = {}

    def watch(self, connections: Mapping[int, HostConnection], instance_id: str) -> None:
        """Listen to these hosts, and to no others."""
        for pk, listener in list(self._listeners.items()):
            if connections.get(pk) is not listener.connection:
                self._listeners.pop(pk).close()
        for pk, connection in connections.items():
            if pk not in self._listeners:
                self._listeners[pk] = _Listener(connection, instance_id, self._note)

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

    def wait(self, seconds: float) -> bool:
        """Until a container ends, which is True, `seconds` are over, or a stop is asked for."""
        until = time.monotonic() + seconds
        while not self._is_stopping() and (left := until - time.monotonic()) > 0:
            if self._woken.wait(min(left, _SLICE_SECONDS)):
                break
        is_woken = self._woken.is_set()
        self._woken.clear()
        return is_woken

    def close(self) -> None:
        for listener in self._listeners.values():
            listener.close()

    def _note(self, container_id: str) -> None:
        if container_id:
            with self._lock:
                self._named[container_id] = time.monotonic() + _NAMED_SECONDS
        self._woken.set()


class _Listener:
    """Follows one host's events in a daemon thread: one that hangs must not keep the process from ending."""

    def __init__(self, connection: HostConnection, instance_id: str, note: Callable[[str], None]) -> None:
        """`note` is told the id of each container that ends, and an empty one when it begins to listen."""
        self.connection = connection
        self._instance_id = instance_id
        self._note = note
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watch: EndWatch | None = None
        threading.Thread(target=self._run, name=f"events-{connection.host.name}", daemon=True).start()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            watch = self._watch
        if watch is not None:
            watch.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            # The round that follows reports a host that fails; here is only to try again.
            with suppress(EngineError):
                self._follow()
            self._closed.wait(_RECONNECT_SECONDS)

    def _follow(self) -> None:
        watch = self.connection.engine.watch_ends(self._instance_id)
        with self._lock:
            self._watch = watch
            is_late = self._closed.is_set()
        if is_late:
            watch.close()
            return
        # What ended while nobody listened is found by the list.
        self._note("")
        for container_id in watch:
            self._note(container_id)


_current: ContextVar[Wakeups | None] = ContextVar("container_manager_wakeups", default=None)


def current_wakeups() -> Wakeups | None:
    """Those of the pass that this is called in, if it listens."""
    return _current.get()


@contextmanager
def wakeups(is_stopping: Callable[[], bool]) -> Iterator[Wakeups]:
    """Listen within; what is launched within may look, too."""
    listening = Wakeups(is_stopping)
    token = _current.set(listening)
    try:
        yield listening
    finally:
        _current.reset(token)
        listening.close()
