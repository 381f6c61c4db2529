"""Many small procedures at once: their Docker calls in threads, everything else in the calling thread.

A procedure is a generator that yields calls. Each call runs in a thread; its value, or its exception, comes
back to the `yield`. So all queries of a round use the one connection of the thread that drives it.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

_T = TypeVar("_T")

Call = Callable[[], Any]
Steps = Generator[Call, Any, _T]


class Threads(Protocol):
    """Where a procedure's calls run."""

    @property
    def width(self) -> int:
        """Procedures that may be under way at once: what each has read is in memory until it has ended."""

    def submit(self, call: Call) -> "Future[Any]": ...


Procedure = tuple[Steps[_T], Threads]


def drive(procedures: Iterable[Procedure[_T]], is_stopping: Callable[[], bool] = lambda: False) -> Iterator[_T]:
    """Yield the procedures' results as they end. An exception that one lets out is raised after all have ended.

    Once `is_stopping`, those that have not begun are left out.
    """
    driver = _Driver(procedures, is_stopping)
    yield from driver.begin()
    while driver.in_flight:
        yield from driver.go_on()
    if driver.escaped:
        raise driver.escaped[0]


class _Driver(Generic[_T]):
    def __init__(self, procedures: Iterable[Procedure[_T]], is_stopping: Callable[[], bool]) -> None:
        self._is_stopping = is_stopping
        #: By the threads that they need, so that slow ones hold up only their own.
        self._waiting: dict[int, deque[Procedure[_T]]] = {}
        for steps, threads in procedures:
            self._waiting.setdefault(id(threads), deque()).append((steps, threads))
        self.in_flight: dict[Future[Any], Procedure[_T]] = {}
        self.escaped: list[Exception] = []

    def begin(self) -> Iterator[_T]:
        for queue in self._waiting.values():
            for _ in range(queue[0][1].width):
                yield from self._admit(queue)

    def go_on(self) -> Iterator[_T]:
        done, _ = wait(self.in_flight, return_when=FIRST_COMPLETED)
        for future in done:
            steps, threads = self.in_flight.pop(future)
            under_way = len(self.in_flight)
            yield from self._advance(steps, threads, partial(_resume, steps, future))
            if len(self.in_flight) == under_way:
                yield from self._admit(self._waiting[id(threads)])

    def _admit(self, queue: deque[Procedure[_T]]) -> Iterator[_T]:
        """Begin the next one; again, if that has ended without a call."""
        under_way = len(self.in_flight)
        while queue and len(self.in_flight) == under_way and not self._is_stopping():
            steps, threads = queue.popleft()
            yield from self._advance(steps, threads, partial(next, steps))

    def _advance(self, steps: Steps[_T], threads: Threads, resume: Callable[[], Call]) -> Iterator[_T]:
        try:
            self.in_flight[threads.submit(resume())] = (steps, threads)
        except StopIteration as end:
            yield end.value
        except Exception as e:  # noqa: BLE001 (a defect in one must not abandon the others half-way)
            self.escaped.append(e)


def _resume(steps: Steps[_T], future: "Future[Any]") -> Call:
    error = future.exception()
    if error is None:
        return steps.send(future.result())
    return steps.throw(error)
