"""SIGTERM in a worker: finish what was begun, then end. Prefect's own handler would abort it half-way."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from container_manager.shutdown import stopping_when


@contextmanager
def graceful_termination() -> Iterator[None]:
    """Within, the first SIGTERM only asks to stop; a second one does what it would have done.

    Off the main thread signals are somebody else's, and nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False
    usual = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: FrameType | None) -> None:
        # Nothing but a flag: whatever else a handler does may run in the middle of it.
        nonlocal asked
        asked = True
        signal.signal(signal.SIGTERM, usual)

    signal.signal(signal.SIGTERM, ask)
    try:
        with stopping_when(lambda: asked):
            yield
    finally:
        signal.signal(signal.SIGTERM, usual)
