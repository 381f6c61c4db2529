"""A call in a thread of its own, while the main thread stays free to answer signals."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TypeVar

from django.db import connections

#: seconds; between two looks at what signals ask.
TICK_SECONDS = 0.2

_T = TypeVar("_T")


def in_background(call: Callable[[], _T], tick: Callable[[], None]) -> _T:
    """What `call` returns or raises; meanwhile this thread calls `tick` again and again."""
    with ThreadPoolExecutor(1, thread_name_prefix="flow-run") as executor:
        future = executor.submit(copy_context().run, _with_own_connections, call)
        while not future.done():
            wait([future], TICK_SECONDS)
            tick()
        return future.result()


def _with_own_connections(call: Callable[[], _T]) -> _T:
    try:
        return call()
    finally:
        connections.close_all()
