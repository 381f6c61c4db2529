"""One machine of the stand-in: what it does when it is asked, and what a test does to it."""

import threading
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from container_manager.containers import INSTANCE_LABEL, summary
from container_manager.engine import Engine
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
from container_manager.networks import handle, joined
from container_manager.types import ContainerSpec, ContainerSummary, Network

from .client import Call, FakeClient, FakeWatch
from .containers import PROGRAMS, Clock, FakeContainer, Program

#: seconds; only a test that fails waits so long.
PATIENCE = 10
#: After these a lost answer leaves open what happened.
SIDE_EFFECTS = ("create", "start", "signal", "remove")
CPUS = 64


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
        self.started_at: datetime | None = self.clock.now()
        self.containers: dict[str, FakeContainer] = {}
        self.images = {qualified("busybox")}
        #: Images that a pull brings.
        self.registry: set[str] = set()
        self.networks = [
            Network(id=uuid.uuid4().hex * 2, name=name, driver=driver)
            for name, driver in (("bridge", "bridge"), ("host", "host"), ("none", "null"))
        ]
        #: seconds of the Engine's clock; for how long the list shows an ended container as running.
        self.list_lag = 0.0
        self.new_id: Callable[[], str] = lambda: uuid.uuid4().hex * 2
        self.calls: list[Call] = []
        #: The name of each container, each time that it was started.
        self.starts: list[str] = []
        #: … and ended, with its exit code.
        self.ends: list[tuple[str, int]] = []
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

    def restart(self) -> None:
        """Its daemon is told to stop, which ends its containers, and another starts."""
        for container in self._running():
            self.end(container.id, 137 if container.program.is_deaf else 143)
        self.started_at = self.clock.now()

    def crash(self) -> None:
        """All of it is killed at once, as by a machine that loses its power, and starts again."""
        self.started_at = self.clock.now()
        for container in self._running():
            container.state, container.exit_code, container.finished_at = "exited", 255, self.clock.now()
            self.ends.append((container.name, 255))

    @property
    def is_up(self) -> bool:
        """Whether it answers."""
        return self._thawed.is_set() and not self._is_down

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
            container.finished_at, container.has_endpoint = self.clock.now(), False
            self.ends.append((container.name, code))
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

    def create(
        self,
        name: str,
        spec: ContainerSpec,
        environment: Mapping[str, str],
        labels: Mapping[str, str],
        denied_networks: Sequence[str] = (),
    ) -> str:
        networks = joined(spec.networks, denied_networks, lambda: self.networks)
        if qualified(spec.image) not in self.images:
            raise ImageMissing(f"create: No such image: {spec.image}")
        if (spec.cpu_limit or 0) > CPUS:
            raise RequestRefused(f"create: there are only {CPUS} CPUs available")
        if any(container.name == name for container in self.containers.values()):
            raise NameTaken(f'create: Conflict. The container name "/{name}" is already in use')
        program = PROGRAMS.get(spec.command, Program())
        made = FakeContainer(self.new_id(), name, spec, dict(environment), dict(labels), program, networks)
        self.containers[made.id] = made
        return made.id

    def start(self, container_id: str) -> None:
        container = self.find(container_id)
        if container.state == "running":
            return
        if container.spec.user == "no-such-user":
            container.exit_code, container.error = 128, "unable to find user no-such-user"
            raise EngineFailed(f"start: {container.error}")
        for network in container.networks:
            self._find_network(container, network)
        # One that has ended runs again: a start is not idempotent.
        self.starts.append(container.name)
        program = container.program
        container.state, container.exit_code, container.started_at = "running", 0, self.clock.now()
        container.has_endpoint = True
        container.stdout += program.stdout
        container.stderr += program.stderr
        if program.code is not None:
            self.end(container.id, program.code, oom_killed=program.oom_killed)

    def _find_network(self, container: FakeContainer, wanted: Network) -> None:
        """By the id that the container is bound to, else by the name."""
        same = [network for network in self.networks if handle(wanted) in (network.id, network.name)]
        if len(same) == 1:
            return
        container.exit_code = 128
        container.error = f"network {handle(wanted)} {'is ambiguous' if same else 'not found'}"
        raise (RequestRefused if same else ContainerGone)(f"start: {container.error}")

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

    def _running(self) -> list[FakeContainer]:
        return [container for container in self.containers.values() if container.state == "running"]

    def find(self, container: str) -> FakeContainer:
        """By id or exact name."""
        for known in self.containers.values():
            if container in (known.id, known.name):
                return known
        raise ContainerGone(f"No such container: {container}")

    def summary(self, container: FakeContainer) -> ContainerSummary:
        lags = container.finished_at and self.clock.now() < container.finished_at + timedelta(seconds=self.list_lag)
        state = "running" if lags else container.state
        return summary(
            {"Id": container.id, "Names": [f"/{container.name}"], "State": state, "Labels": container.labels}
        )

    def pull(self, image: str) -> None:
        if qualified(image) not in {qualified(known) for known in self.registry} | self.images:
            raise EngineFailed(f"pull: no registry has {image}")
        self.images.add(qualified(image))


def _next(hooks: deque[Hook]) -> list[Hook]:
    try:
        return [hooks.popleft()]
    except IndexError:
        return []
