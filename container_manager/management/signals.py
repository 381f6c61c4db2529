"""What signals ask of the command. A handler sets plain attributes, nothing else; the main loop looks at them."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

#: Windows has none.
_STATUS_SIGNAL: signal.Signals | None = getattr(signal, "SIGUSR1", None)


class SignalWatch:
    """Within, these signals are noted. Off the main thread nothing is installed, and nothing ever noted."""

    def __init__(self, *stops: signal.Signals) -> None:
        self._stops = stops
        self._usual: dict[signal.Signals, Any] = {}
        self.stopped_by: int | None = None
        self.stop_count = 0
        self.is_status_asked = False

    @property
    def is_stopping(self) -> bool:
        return self.stopped_by is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._stops:
                self._usual[number] = signal.signal(number, self._note_stop)
            if _STATUS_SIGNAL is not None:
                self._usual[_STATUS_SIGNAL] = signal.signal(_STATUS_SIGNAL, self._note_status)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._usual.items():
            # None: it was not Python that had set it, and Python can't put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._usual.clear()

    def end_at_next(self) -> None:
        """From now on a stop signal ends the process at once, whatever it is doing. One may have come already."""
        for number in self._stops:
            signal.signal(number, signal.SIG_DFL)
        if self.stop_count > 1 and self.stopped_by is not None:
            os.kill(os.getpid(), self.stopped_by)

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        self.stop_count += 1

    def _note_status(self, number: int, frame: FrameType | None) -> None:
        self.is_status_asked = True
