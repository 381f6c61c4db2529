"""A worker: a process of the product as a thread that moves when it is told to, and stops where it is told to."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from queue import SimpleQueue
from typing import Any, Literal

from django.db import OperationalError, connection, connections

from container_manager.engine import Engine
from container_manager.exceptions import HostUnavailable, OutcomeUnknown
from container_manager.queue import QueueManager
from container_manager.types import EngineAddress
from tests.fake_engine import SIDE_EFFECTS, FakeEngine, Fleet

#: seconds; only a defect takes so long.
_PATIENCE = 60
_ANSWER = "answer to "

Kind = Literal["dies", "stalls", "meets a database error", "gets no answer", "freezes its Engine", "loses its Engine"]
Task = Callable[[QueueManager], Any]


class Killed(BaseException):
    """What nobody catches; and after which nobody gets anything done."""


class DatabaseFailed(OperationalError):
    """Thrown in by a worker's fault."""


@dataclass(frozen=True)
class Fault:
    """It befalls the worker at the first step that it can, after so many others: of those named `at`, or of all.

    A step is a call to an Engine, its answer, or the beginning of what writes to the database.
    """

    kind: Kind
    after: int
    at: str | None = None


#: Those at which a worker has something to lose.
STEPS = ("statement", *SIDE_EFFECTS, *(_ANSWER + name for name in SIDE_EFFECTS), "inspect", "answer to inspect")


class Worker:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._tasks: SimpleQueue[tuple[Task, Fault | None] | None] = SimpleQueue()
        self._told: SimpleQueue[BaseException | str] = SimpleQueue()
        self._may_go_on = threading.Semaphore(0)
        self._fault: Fault | None = None
        self._passed = 0
        self._is_dead = False
        self.is_stalled = False
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def do(self, task: Task, fault: Fault | None = None) -> None:
        """Until it is done, or has stalled, or died. Raises what the task raises, but for what was thrown in."""
        self._tasks.put((task, fault))
        self._wait()

    def resume(self) -> None:
        self.is_stalled = False
        self._may_go_on.release()
        self._wait()

    def kill(self) -> None:
        """While it stalls: it never wakes."""
        self._is_dead = True
        self.resume()

    def close(self) -> None:
        if self.is_stalled:
            self.kill()
        self._tasks.put(None)
        self._thread.join(_PATIENCE)

    def _wait(self) -> None:
        told = self._told.get(timeout=_PATIENCE)
        self.is_stalled = told == "stalls"
        if isinstance(told, BaseException):
            raise told

    # In its thread.

    def _live(self) -> None:
        manager = self._born()
        while (given := self._tasks.get()) is not None:
            task, self._fault = given
            self._passed = 0
            try:
                _run_inline(manager)
                with connection.execute_wrapper(self._statement):
                    task(manager)
            except Killed:
                manager = self._born()
                self._told.put("is dead")
            except DatabaseFailed:
                self._told.put("has failed")
            except BaseException as e:  # noqa: BLE001 (the test raises it)
                self._told.put(e)
            else:
                self._told.put("is done")
        connections.close_all()

    def _born(self) -> QueueManager:
        connections.close_all()
        self._is_dead = False
        return QueueManager(self._engine)

    def _engine(self, address: EngineAddress, timeout: float) -> Engine:
        return Watched(self, self._fleet(address, timeout), self._fleet.at(address.base_url))

    def _statement(self, execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        if not sql.startswith(("SELECT", "PRAGMA")):
            # A transaction may be waited for by all the others: who stalls in one stalls them, too.
            self.step("statement", can_stall=not connection.in_atomic_block)
        return execute(sql, params, many, context)

    def step(self, name: str, *, can_stall: bool = False, machine: FakeEngine | None = None) -> None:
        """It is about to make a call to `machine` or to the database, or has the answer to one."""
        if self._is_dead:
            raise Killed
        fault = self._fault
        if fault is None or fault.at not in (None, name):
            return
        self._passed += 1
        if self._passed > fault.after:
            # Whatever it is, it befalls the worker once.
            self._fault = None
            if not self._befalls(fault.kind, name, can_stall, machine):
                self._fault = fault

    def _befalls(self, kind: Kind, name: str, can_stall: bool, machine: FakeEngine | None) -> bool:
        """Let it happen; False: it can't, at this step."""
        match kind:
            case "dies":
                self._is_dead = True
                raise Killed
            case "stalls" if can_stall:
                self._told.put("stalls")
                self._may_go_on.acquire()
                if self._is_dead:
                    raise Killed
            case "meets a database error" if machine is None:
                raise DatabaseFailed("thrown in")
            case "gets no answer" if machine:
                has_effects = name.removeprefix(_ANSWER) in SIDE_EFFECTS
                raise (OutcomeUnknown if has_effects else HostUnavailable)("thrown in")
            case "freezes its Engine" if machine:
                machine.freeze()
            case "loses its Engine" if machine:
                machine.down()
            case _:
                return False
        return True


class Watched:
    """An Engine of which each call is two steps of the worker: the call, and its answer."""

    def __init__(self, worker: Worker, engine: Engine, machine: FakeEngine) -> None:
        self._worker = worker
        self._engine = engine
        self._machine = machine

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._engine, name)
        # Asked by threads of their own.
        return call if name in ("identify", "watch_ends") else partial(self._in_steps, name, call)

    def _in_steps(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Between a recoverer's look at what has not run and its removal there is no time that anybody may use.
        is_removal = name == "remove" and args[0] in self._unstarted()
        self._worker.step(name, can_stall=not is_removal, machine=self._machine)
        answer = call(*args, **kwargs)
        self._worker.step(_ANSWER + name, can_stall=name in SIDE_EFFECTS, machine=self._machine)
        return answer

    def _unstarted(self) -> set[str]:
        return {container.id for container in self._machine.containers.values() if container.state == "created"}


class _Answer(Future[Any]):
    """In a set, which has no order of its own, these have the one in which they were made."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return self._number


class _Inline(Executor):
    """Runs each call at once, in the thread that asks for it."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        answer = _Answer(next(self._numbers))
        try:
            answer.set_result(call(*args, **kwargs))
        except Exception as e:  # noqa: BLE001 (it is raised where the answer is asked for)
            answer.set_exception(e)
        return answer


def _run_inline(manager: QueueManager) -> None:
    """Without the hosts' threads, which would mix the steps; and with hosts that have been reached just now."""
    manager._hosts.reach()
    numbers = count()
    for connected in manager._hosts._connections.values():
        connected.executor = _Inline(numbers)
