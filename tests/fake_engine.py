"""An Engine in memory: the contract's quirks, its own clock, and faults on demand. `test_engine_contract` holds
it to what a real Engine does.

`Fleet` is handed to `QueueManager`; each `FakeEngine` of it stands for one machine, and lives as long as the test.
"""

import queue
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from django.db import connections
from django.utils.timezone import now

from container_manager.containers import ATTEMPT_LABEL, INSTANCE_LABEL, JOB_LABEL, TOKEN_LABEL
from container_manager.engine import Engine, Stream
from container_manager.exceptions import (
    ContainerGone,
    ContainerNotRunning,
    ContainerRunning,
    EngineError,
    EngineFailed,
    HostUnavailable,
    ImageMissing,
    NameTaken,
    OutcomeUnknown,
    RequestRefused,
)
from container_manager.images import qualified
from container_manager.logs import BoundedLog
from container_manager.models import ContainerJob, DockerHost
from container_manager.queue import QueueManager, ShutdownEvent
from container_manager.types import ContainerSpec, ContainerSummary, EngineAddress, Hardening, LoopStats, Observation

#: seconds; only a test that fails waits so long.
PATIENCE = 10
#: seconds; a transaction of the driver's that is still open then waits for the call.
TRANSACTION_SECONDS = 2
#: After these a lost answer leaves open what happened.
SIDE_EFFECTS = ("create", "start", "signal", "remove")
CPUS = 64


@dataclass(frozen=True)
class Program:
    """What a command does. `code` None: it runs until it is told to end."""

    code: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    oom_killed: bool = False
    is_deaf: bool = False


#: The commands that the contract's cases use; every other one runs until the test says how it ends.
PROGRAMS: dict[tuple[str, ...], Program] = {
    (): Program(0),
    ("true",): Program(0),
    ("false",): Program(1),
    ("sh", "-c", "exit 42"): Program(42),
    ("sh", "-c", "echo out; echo err >&2"): Program(0, b"out\n", b"err\n"),
    ("sh", "-c", "trap '' TERM; echo up; while true; do sleep 1; done"): Program(None, b"up\n", is_deaf=True),
    ("no-such-program",): Program(127, stderr=b"[FATAL tini (7)] exec no-such-program failed: No such file\n"),
    ("/etc",): Program(126, stderr=b"[FATAL tini (7)] exec /etc failed: Permission denied\n"),
    ("tail", "/dev/zero"): Program(137, oom_killed=True),
}


class Clock:
    """The Engine's own: far from ours, so that nobody compares the two by accident. It moves when it is told to."""

    def __init__(self) -> None:
        self._now = datetime(2031, 5, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)


@dataclass
class FakeContainer:
    id: str
    name: str
    spec: ContainerSpec
    environment: dict[str, str]
    labels: dict[str, str]
    program: Program
    state: str = "created"
    exit_code: int = 0
    oom_killed: bool = False
    error: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    stdout: bytes = b""
    stderr: bytes = b""


@dataclass(frozen=True)
class Call:
    step: str
    subject: str
    #: The thread that drives the queue waited for it inside a transaction: forbidden (P15).
    in_transaction: bool


class Gate:
    """Where a call hangs until the test opens it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.waiting = 0
        self.most_waiting = 0
        self._lock = threading.Lock()
        self._opened = threading.Event()

    def __call__(self) -> None:
        with self._lock:
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
        self.reached.set()
        self._opened.wait(PATIENCE)
        with self._lock:
            self.waiting -= 1

    def open(self) -> None:
        self._opened.set()


Hook = Callable[[], object]


def raising(error: Exception) -> Hook:
    def hook() -> None:
        raise error

    return hook


class FakeEngine:
    """One machine. What is asked of it comes through `client`s."""

    def __init__(self, engine_id: str = "engine-1") -> None:
        self.clock = Clock()
        self.engine_id = engine_id
        self.containers: dict[str, FakeContainer] = {}
        self.images = {qualified("busybox")}
        #: Images that a pull brings.
        self.registry: set[str] = set()
        self.networks = {"bridge", "none"}
        #: seconds of the Engine's clock; for how long the list shows an ended container as running.
        self.list_lag = 0.0
        self.new_id: Callable[[], str] = lambda: uuid.uuid4().hex * 2
        self.calls: list[Call] = []
        #: The name of each container, each time that it was started.
        self.starts: list[str] = []
        self.watches: list[FakeWatch] = []
        self._elsewhere: dict[str, dict[str, FakeContainer]] = {}
        self._lock = threading.RLock()
        self._is_down = False
        self._thawed = threading.Event()
        self._thawed.set()
        self._late: list[Callable[[], object]] = []
        self._before: dict[str, deque[Hook]] = defaultdict(deque)
        self._after: dict[str, deque[Hook]] = defaultdict(deque)
        self._always: dict[str, Hook] = {}

    def client(self, timeout: float = PATIENCE) -> Engine:
        """To be made in the thread that drives the queue: its transactions are watched."""
        return FakeClient(self, timeout)

    # What the test knows.

    def count(self, step: str) -> int:
        return Counter(call.step for call in list(self.calls))[step]

    def subjects(self, step: str) -> list[str]:
        return [call.subject for call in list(self.calls) if call.step == step]

    def forbidden_calls(self) -> list[Call]:
        return [call for call in self.calls if call.in_transaction]

    def started_twice(self) -> list[str]:
        return [name for name, count in Counter(self.starts).items() if count > 1]

    # What the test does to it.

    def before(self, step: str, *hooks: Hook) -> None:
        """The next calls of the step run one of these each, in their thread, before anything happens."""
        self._before[step].extend(hooks)

    def after(self, step: str, *hooks: Hook) -> None:
        self._after[step].extend(hooks)

    def always(self, step: str, hook: Hook | None) -> None:
        """Each call of the step runs it first; None: no more."""
        self._always[step] = hook or (lambda: None)

    def lose_answer(self, step: str, *, happens: bool) -> None:
        (self.after if happens else self.before)(step, raising(OutcomeUnknown(f"{step}: the answer was lost")))

    def break_start(self, exit_code: int, error: EngineError) -> None:
        """The next start is refused; its container stays `created`, with this code."""

        def refuse() -> None:
            created = [container for container in self.containers.values() if container.state == "created"]
            created[-1].exit_code, created[-1].error = exit_code, str(error)
            raise error

        self.before("start", refuse)

    def down(self) -> None:
        self._is_down = True
        for watch in list(self.watches):
            watch.close()

    def up(self) -> None:
        self._is_down = False

    def freeze(self) -> None:
        """It takes requests and answers none; what was asked for meanwhile happens at the thaw."""
        self._thawed.clear()

    def thaw(self) -> None:
        with self._lock:
            late, self._late = self._late, []
        for do in late:
            try:
                do()
            except EngineError:
                continue
        self._thawed.set()

    def replace(self, engine_id: str) -> None:
        """Another Engine answers from now on, with containers of its own."""
        with self._lock:
            self._elsewhere[self.engine_id] = self.containers
            self.engine_id, self.containers = engine_id, self._elsewhere.pop(engine_id, {})

    def end(self, container_id: str | None, code: int = 0, *, oom_killed: bool = False) -> None:
        with self._lock:
            container = self.containers[container_id or ""]
            container.state, container.exit_code, container.oom_killed = "exited", code, oom_killed
            container.finished_at = self.clock.now()
        for watch in list(self.watches):
            if watch.instance_id == container.labels.get(INSTANCE_LABEL):
                watch.tell(container.id)

    def vanish(self, container_id: str | None) -> FakeContainer:
        """Removed by hand, whatever it does."""
        with self._lock:
            return self.containers.pop(container_id or "")

    # What it does when it is asked.

    def serve(self, call: Call, timeout: float, do: Callable[[], Any]) -> Any:
        self.calls.append(call)
        assert not call.in_transaction, f"{call.step} while a transaction is open"
        self._always.get(call.step, lambda: None)()
        if self._is_down:
            raise HostUnavailable(f"{call.step}: connection refused")
        if not self._thawed.wait(timeout):
            if call.step not in SIDE_EFFECTS:
                raise HostUnavailable(f"{call.step}: read timed out")
            self._late.append(do)
            raise OutcomeUnknown(f"{call.step}: read timed out")
        for hook in _next(self._before[call.step]):
            hook()
        with self._lock:
            answer = do()
        for hook in _next(self._after[call.step]):
            hook()
        return answer

    def create(self, name: str, spec: ContainerSpec, environment: Mapping[str, str], labels: Mapping[str, str]) -> str:
        if qualified(spec.image) not in self.images:
            raise ImageMissing(f"create: No such image: {spec.image}")
        if (spec.cpu_limit or 0) > CPUS:
            raise RequestRefused(f"create: there are only {CPUS} CPUs available")
        if any(container.name == name for container in self.containers.values()):
            raise NameTaken(f'create: Conflict. The container name "/{name}" is already in use')
        program = PROGRAMS.get(spec.command, Program())
        made = FakeContainer(self.new_id(), name, spec, dict(environment), dict(labels), program)
        self.containers[made.id] = made
        return made.id

    def start(self, container_id: str) -> None:
        container = self.find(container_id)
        if container.state == "running":
            return
        if container.spec.user == "no-such-user":
            container.exit_code, container.error = 128, "unable to find user no-such-user"
            raise EngineFailed(f"start: {container.error}")
        missing = [name for name in container.spec.networks if name not in self.networks]
        if missing:
            container.exit_code, container.error = 128, f"network {missing[0]} not found"
            raise ContainerGone(f"start: {container.error}")
        # One that has ended runs again: a start is not idempotent.
        self.starts.append(container.name)
        program = container.program
        container.state, container.exit_code, container.started_at = "running", 0, self.clock.now()
        container.stdout += program.stdout
        container.stderr += program.stderr
        if program.code is not None:
            self.end(container.id, program.code, oom_killed=program.oom_killed)

    def signal(self, container_id: str, name: str) -> None:
        container = self.find(container_id)
        if container.state != "running":
            raise ContainerNotRunning(f"signal: container {container_id} is not running")
        if name == "SIGKILL":
            self.end(container_id, 137)
        elif not container.program.is_deaf:
            self.end(container_id, 143)

    def remove(self, container_id: str) -> None:
        container = self.containers.get(container_id)
        if container is not None and container.state == "running":
            raise ContainerRunning(f"remove: container {container_id} is running")
        self.containers.pop(container_id, None)

    def find(self, container: str) -> FakeContainer:
        """By id or exact name."""
        for known in self.containers.values():
            if container in (known.id, known.name):
                return known
        raise ContainerGone(f"No such container: {container}")

    def summary(self, container: FakeContainer) -> ContainerSummary:
        lags = container.finished_at and self.clock.now() < container.finished_at + timedelta(seconds=self.list_lag)
        return ContainerSummary(
            id=container.id,
            name=container.name,
            state="running" if lags else container.state,
            job_id=int(container.labels[JOB_LABEL]),
            attempt=int(container.labels[ATTEMPT_LABEL]),
        )

    def pull(self, image: str) -> None:
        if qualified(image) not in {qualified(known) for known in self.registry} | self.images:
            raise EngineFailed(f"pull: no registry has {image}")
        self.images.add(qualified(image))


class FakeClient:
    """`engine.Engine`, as one thread that drives the queue has it."""

    def __init__(self, engine: FakeEngine, timeout: float) -> None:
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

    def create(
        self,
        name: str,
        spec: ContainerSpec,
        *,
        environment: Mapping[str, str],
        labels: Mapping[str, str],
        hardening: Hardening,
    ) -> str:
        return self._call("create", name, lambda: self._engine.create(name, spec, environment, labels))

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
            )

        return self._call("inspect", container, look)

    def read_log(self, container_id: str, stream: Stream, log: BoundedLog, seconds: float) -> None:
        data = self._call("read_log", container_id, lambda: getattr(self._engine.find(container_id), stream))
        log.feed(data)

    def signal(self, container_id: str, name: Literal["SIGTERM", "SIGKILL"]) -> None:
        self._call("signal", f"{name} {container_id}", lambda: self._engine.signal(container_id, name))

    def remove(self, container_id: str) -> None:
        self._call("remove", container_id, lambda: self._engine.remove(container_id))

    def has_image(self, image: str) -> bool:
        return self._call("has_image", image, lambda: qualified(image) in self._engine.images)

    def pull(self, image: str, seconds: float) -> None:
        self._call("pull", image, lambda: self._engine.pull(image))

    def watch_ends(self, instance_id: str) -> "FakeWatch":
        return self._call("watch_ends", instance_id, lambda: FakeWatch(self._engine, instance_id))


class FakeWatch:
    """`engine.EndWatch`; it is among the Engine's `watches` until it is closed."""

    def __init__(self, engine: FakeEngine, instance_id: str) -> None:
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


@dataclass
class Fleet:
    """Makes the engines' clients by address: `QueueManager(fleet)`. An engine is made for each new address."""

    engines: dict[str, FakeEngine] = field(default_factory=dict)
    #: seconds that a call waits for its answer, in place of the setting.
    timeout: float = PATIENCE

    def __call__(self, address: EngineAddress, timeout: float) -> Engine:
        return self.at(address.base_url).client(min(timeout, self.timeout))

    def at(self, base_url: str) -> FakeEngine:
        return self.engines.setdefault(base_url, FakeEngine(f"engine-{len(self.engines) + 1}"))

    def check(self) -> None:
        """What must hold after every test, whatever it did."""
        for engine in self.engines.values():
            assert engine.forbidden_calls() == []
            assert engine.started_twice() == []

    def add_host(self, name: str = "local", **fields: object) -> FakeEngine:
        host = DockerHost.objects.create(name=name, base_url=f"unix:///{name}.sock", **fields)
        return self.at(host.base_url)


def watched_fleet() -> Iterator[Fleet]:
    """A fixture's body: no host yet; at the end what always holds is checked."""
    fleet = Fleet()
    yield fleet
    for engine in fleet.engines.values():
        engine.thaw()
    fleet.check()


# What the tests of faults do again and again.


def queued(manager: QueueManager, **fields: Any) -> ContainerJob:
    return manager.queue_job(ContainerJob.objects.create_job(**{"image": "busybox", "command": ["run"]} | fields))


def launched(manager: QueueManager, **fields: Any) -> ContainerJob:
    job = queued(manager, **fields)
    assert manager.launch_next_batch(1000).job_ids == (job.pk,)
    job.refresh_from_db()
    return job


def one_round(manager: QueueManager) -> LoopStats:
    return manager.process_queue_continuous(1000, 1, work_seconds=0)


def row(job: ContainerJob) -> ContainerJob:
    return ContainerJob.objects.get(pk=job.pk)


def let_leases_end() -> None:
    ContainerJob.objects.filter(claimed_until__isnull=False).update(claimed_until=now() - timedelta(seconds=1))


@contextmanager
def in_background(call: Callable[[ShutdownEvent], Any]) -> Iterator[Future[Any]]:
    """`call` in a thread, with a database connection of its own; it is told to stop at the end of the block."""
    stop = threading.Event()
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(call(stop))
        except BaseException as e:  # noqa: BLE001 (the test raises it)
            done.set_exception(e)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    done.result()


def _next(hooks: deque[Hook]) -> list[Hook]:
    try:
        return [hooks.popleft()]
    except IndexError:
        return []
