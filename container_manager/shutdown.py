"""Whether the work of this context was asked to stop. Never a flow's parameter, never a global."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

_asked: ContextVar[Callable[[], bool]] = ContextVar("container_manager_shutdown", default=lambda: False)


class ShutdownEvent(Protocol):
    """A `threading.Event`, or anything else that can be asked."""

    def is_set(self) -> bool: ...


def is_stopping() -> bool:
    """True: start nothing new, finish what was begun."""
    return _asked.get()()


@contextmanager
def stopping_when(asked: Callable[[], bool]) -> Iterator[None]:
    """Within, `is_stopping` also asks `asked`, which must be quick and callable from any thread."""
    outer = _asked.get()
    token = _asked.set(lambda: outer() or asked())
    try:
        yield
    finally:
        _asked.reset(token)


def signal() -> Callable[[], bool]:
    """What `is_stopping` asks in this context, to be handed to other threads: they don't inherit it."""
    return _asked.get()
