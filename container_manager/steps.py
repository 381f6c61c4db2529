"""Many small procedures at once: their Docker calls in threads, everything else in the calling thread.

A procedure is a generator that yields calls. Each call runs in a thread; its value, or its exception, comes
back to the `yield`. So all queries of a round use the one connection of the thread that drives it.
"""

from collections import Counter, deque
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
    driver: Driver[_T] = Driver(is_stopping)
    driver.add(procedures)
    while driver.is_busy:
        yield from driver.go_on()
    driver.raise_escaped()


class Driver(Generic[_T]):
    """Drives procedures to their ends; more may be added meanwhile."""

    def __init__(self, is_stopping: Callable[[], bool] = lambda: False) -> None:
        self._is_stopping = is_stopping
        #: By the threads that they need, so that slow ones hold up only their own.
        self._waiting: dict[int, deque[Procedure[_T]]] = {}
        self._under_way: Counter[int] = Counter()
        self._in_flight: dict[Future[Any], Procedure[_T]] = {}
        self._escaped: list[Exception] = []

    def add(self, procedures: Iterable[Procedure[_T]], *, is_urgent: bool = False) -> None:
        """Urgent ones go before those that have not begun."""
        for steps, threads in procedures:
            queue = self._waiting.setdefault(id(threads), deque())
            if is_urgent:
                queue.appendleft((steps, threads))
            else:
                queue.append((steps, threads))

    @property
    def has_waiting(self) -> bool:
        """Whether some have not begun, and may."""
        return any(self._waiting.values()) and not self._is_stopping()

    @property
    def is_busy(self) -> bool:
        return bool(self._in_flight) or self.has_waiting

    def go_on(self, seconds: float | None = None) -> Iterator[_T]:
        """Wait until a call ends, `seconds` at most; the results of the procedures that have ended by that."""
        yield from self._admit()
        done, _ = wait(self._in_flight, timeout=seconds, return_when=FIRST_COMPLETED)
        for future in done:
            steps, threads = self._in_flight.pop(future)
            yield from self._advance(steps, threads, partial(_resume, steps, future))
        yield from self._admit()

    def raise_escaped(self) -> None:
        """Raise the first exception that a procedure let out, if any did."""
        if self._escaped:
            raise self._escaped[0]

    def _admit(self) -> Iterator[_T]:
        for queue in list(self._waiting.values()):
            while queue and self._has_room(queue[0][1]) and not self._is_stopping():
                steps, threads = queue.popleft()
                self._under_way[id(threads)] += 1
                yield from self._advance(steps, threads, partial(next, steps))

    def _has_room(self, threads: Threads) -> bool:
        return self._under_way[id(threads)] < threads.width

    def _advance(self, steps: Steps[_T], threads: Threads, resume: Callable[[], Call]) -> Iterator[_T]:
        try:
            self._in_flight[threads.submit(resume())] = (steps, threads)
        except StopIteration as end:
            self._under_way[id(threads)] -= 1
            yield end.value
        except Exception as e:  # noqa: BLE001 (a defect in one must not abandon the others half-way)
            self._under_way[id(threads)] -= 1
            self._escaped.append(e)


def _resume(steps: Steps[_T], future: "Future[Any]") -> Call:
    error = future.exception()
    if error is None:
        return steps.send(future.result())
    return steps.throw(error)
