"""Many small procedures at once: their Docker calls in threads, everything else in the calling thread.

A procedure is a generator that yields calls. Each call runs in a thread; its value, or its exception, comes
back to the `yield`. So all queries of a round use the one connection of the thread that drives it.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any, TypeVar

_T = TypeVar("_T")

Call = Callable[[], Any]
Steps = Generator[Call, Any, _T]


def drive(procedures: Iterable[tuple[Steps[_T], Executor]]) -> Iterator[_T]:
    """Yield the procedures' results as they end. An exception that one lets out is raised after all have ended."""
    in_flight: dict[Future[Any], tuple[Steps[_T], Executor]] = {}
    escaped: list[Exception] = []

    def advance(steps: Steps[_T], executor: Executor, resume: Callable[[], Call]) -> Iterator[_T]:
        try:
            call = resume()
        except StopIteration as end:
            yield end.value
        except Exception as e:  # noqa: BLE001 (a defect in one must not abandon the others half-way)
            escaped.append(e)
        else:
            try:
                in_flight[executor.submit(call)] = (steps, executor)
            except RuntimeError as e:
                # The pool was shut down with the process.
                escaped.append(e)

    for steps, executor in procedures:
        yield from advance(steps, executor, lambda steps=steps: next(steps))  # type: ignore[misc]
    while in_flight:
        done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
        for future in done:
            steps, executor = in_flight.pop(future)
            yield from advance(steps, executor, lambda steps=steps, future=future: _resume(steps, future))  # type: ignore[misc]
    if escaped:
        raise escaped[0]


def _resume(steps: Steps[_T], future: Future[Any]) -> Call:
    error = future.exception()
    if error is None:
        return steps.send(future.result())
    return steps.throw(error)
