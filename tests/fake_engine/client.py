"""What the product gets in place of a Docker client, and of its stream of events."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from django.db import connections

from container_manager.containers import INSTANCE_LABEL, TOKEN_LABEL
from container_manager.engine import Stream
from container_manager.exceptions import HostUnavailable
from container_manager.logs import BoundedLog
from container_manager.types import ContainerSpec, ContainerSummary, Daemon, Hardening, Observation

if TYPE_CHECKING:
    from .containers import FakeContainer
    from .engine import FakeEngine

#: seconds; a transaction of the driver's that is still open then waits for the call.
TRANSACTION_SECONDS = 2


@dataclass(frozen=True)
class Call:
    step: str
    subject: str
    #: The thread that drives the queue waited for it inside a transaction: forbidden (P15).
    in_transaction: bool


class FakeClient:
    """`engine.Engine`, as one thread that drives the queue has it."""

    def __init__(self, engine: "FakeEngine", timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout
        self._driver = connections["default"]

    def _call(self, step: str, subject: str, do: Callable[[], Any]) -> Any:
        return self._engine.serve(Call(step, subject, self._is_in_transaction()), self._timeout, do)

    def _is_in_transaction(self) -> bool:
        """Whether the driver waits for this very call inside a transaction: one of another job's ends meanwhile."""
        until = time.monotonic() + TRANSACTION_SECONDS
        while self._driver.in_atomic_block:
            if time.monotonic() >= until:
                return True
            time.sleep(0.001)
        return False

    def identify(self) -> str:
        return self._call("identify", "", lambda: self._engine.engine_id)

    def daemon(self) -> Daemon:
        def look() -> Daemon:
            now = self._engine.clock.now()
            return Daemon(now=now, started_at=self._engine.started_at, spares_containers=False)

        return self._call("daemon", "", look)

    def create(
        self,
        name: str,
        spec: ContainerSpec,
        *,
        environment: Mapping[str, str],
        labels: Mapping[str, str],
        hardening: Hardening,
    ) -> str:
        denied = hardening.denied_networks if hardening else ()
        return self._call("create", name, lambda: self._engine.create(name, spec, environment, labels, denied))

    def start(self, container_id: str) -> None:
        self._call("start", container_id, lambda: self._engine.start(container_id))

    def list(self, instance_id: str) -> list[ContainerSummary]:
        def ours() -> list[ContainerSummary]:
            known = [c for c in self._engine.containers.values() if c.labels.get(INSTANCE_LABEL) == instance_id]
            return [self._engine.summary(container) for container in known]

        return self._call("list", instance_id, ours)

    def inspect(self, container: str) -> Observation:
        def look() -> Observation:
            seen = self._engine.find(container)
            return Observation(
                container_id=seen.id,
                state=seen.state,
                exit_code=seen.exit_code,
                oom_killed=seen.oom_killed,
                error=seen.error,
                started_at=seen.started_at,
                finished_at=seen.finished_at,
                image_digest=f"sha256:{seen.spec.image}",
                token=seen.labels.get(TOKEN_LABEL, ""),
                has_endpoint=seen.has_endpoint,
                environment=seen.environment,
            )

        return self._call("inspect", container, look)

    def read_log(self, container_id: str, stream: Stream, log: BoundedLog, seconds: float) -> None:
        data = self._call("read_log", container_id, lambda: getattr(self._engine.find(container_id), stream))
        log.feed(data)

    def read_end(self, container_id: str, stream: Stream, log: BoundedLog, lines: int, seconds: float) -> None:
        data = self._call("read_end", container_id, lambda: getattr(self._engine.find(container_id), stream))
        log.feed(b"".join(data.splitlines(keepends=True)[-lines:]))

    def follow_log(self, container_id: str, stream: Stream) -> "FakeFollow":
        return self._call("follow_log", container_id, lambda: FakeFollow(self._engine.find(container_id), stream))

    def signal(self, container_id: str, name: Literal["SIGTERM", "SIGKILL"]) -> None:
        self._call("signal", f"{name} {container_id}", lambda: self._engine.signal(container_id, name))

    def remove(self, container_id: str) -> None:
        self._call("remove", container_id, lambda: self._engine.remove(container_id))

    def pull(self, image: str, seconds: float) -> None:
        self._call("pull", image, lambda: self._engine.pull(image))

    def watch_ends(self, instance_id: str) -> "FakeWatch":
        return self._call("watch_ends", instance_id, lambda: FakeWatch(self._engine, instance_id))


class FakeWatch:
    """`engine.EndWatch`; it is among the Engine's `watches` until it is closed."""

    def __init__(self, engine: "FakeEngine", instance_id: str) -> None:
        self.instance_id = instance_id
        self._engine = engine
        self._told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        engine.watches.append(self)

    def tell(self, container_id: str) -> None:
        self._told.put(container_id)

    def __iter__(self) -> Iterator[str]:
        while (told := self._told.get()) is not None:
            yield told
        # To its reader a stream that is closed looks like one that broke.
        raise HostUnavailable("events: the stream broke off")

    def close(self) -> None:
        if self in self._engine.watches:
            self._engine.watches.remove(self)
        self._told.put(None)


class FakeFollow:
    """`engine.LogFollow`."""

    def __init__(self, container: "FakeContainer", stream: Stream) -> None:
        self._container = container
        self._stream = stream
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        told = 0
        while not self._closed.wait(0.01):
            has_ended = self._container.state != "running"
            data = getattr(self._container, self._stream)[told:]
            if data:
                told += len(data)
                yield data
            if has_ended:
                return

    def close(self) -> None:
        self._closed.set()
