"""What a running container writes, told as it writes it: by threads of its own, in memory that is bounded."""

import codecs
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from datetime import UTC, datetime
from typing import NamedTuple

from .engine import Engine, Stream
from .exceptions import ContainerGone, EngineError
from .streams import LogFollow

STREAMS: tuple[Stream, Stream] = ("stdout", "stderr")
#: Of each stream of an attempt. The whole is stored with the attempt; this is to watch it.
MAX_CHARACTERS, MAX_LINES = 1024 * 1024, 10_000
#: bytes of one stream that wait to be told. Then the Engine waits, too.
_WAITING_BYTES = 256 * 1024
#: characters; a longer line is told in parts.
_LINE_LENGTH = 16 * 1024
#: seconds; between two times that something is told.
_TELL_SECONDS = 0.5
#: seconds; between two attempts to follow again, doubled by each.
_RETRY_SECONDS, _MAX_RETRY_SECONDS = 1.0, 30.0
#: seconds; how long the end waits for threads, and for whom it tells.
_FINISH_SECONDS = 5.0


class LogLine(NamedTuple):
    at: datetime
    stream: Stream
    text: str


#: Takes lines in their order. False: not now; the same are told again. Called in one thread at a time.
Tell = Callable[[Sequence[LogLine]], bool]


class LiveLog:
    """What one container writes. Nothing that an Engine does is raised."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._untold: list[LogLine] = []
        self._finished = threading.Event()
        self._readers = [_Reader(stream) for stream in STREAMS]
        self._threads: list[threading.Thread] = []
        # `tell` belongs to the context that we are made in.
        self._teller = threading.Thread(target=copy_context().run, args=(self._keep_telling,), daemon=True)

    def follow(self, engine: Engine, container_id: str) -> None:
        """Begin to; at most once."""
        self._threads = [
            *(
                threading.Thread(target=reader.run, args=(engine, container_id), daemon=True)
                for reader in self._readers
            ),
            self._teller,
        ]
        for thread in self._threads:
            thread.start()

    def finish(self, stored: dict[Stream, str] | None) -> None:
        """Stop following; tell the rest, by what was `stored` of a container that has ended."""
        self._finished.set()
        for reader in self._readers:
            reader.close()
        until = time.monotonic() + _FINISH_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if self._teller.is_alive():
            # It hangs in a call of its own, and no two may tell at once.
            return
        for reader in self._readers:
            reader.complete(None if stored is None else stored[reader.stream])
        # Twice: first what has waited, then the rest.
        while not (self._tell_once() and self._tell_once(is_last=True)) and time.monotonic() < until:
            time.sleep(_TELL_SECONDS)

    def _keep_telling(self) -> None:
        while not self._finished.wait(_TELL_SECONDS):
            self._tell_once()

    def _tell_once(self, *, is_last: bool = False) -> bool:
        """Whether all was told."""
        if not self._untold:
            taken = [line for reader in self._readers for line in reader.take(is_last=is_last)]
            self._untold = sorted(taken, key=lambda line: line.at)
        if self._untold and not self._tell(self._untold):
            return False
        self._untold = []
        return True


class _Reader:
    """One stream, as lines."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._follow: LogFollow | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._bytes = self._characters = self._line_count = 0
        self._lines: deque[LogLine] = deque()
        self._waiting = 0
        self._begun = ""

    def run(self, engine: Engine, container_id: str) -> None:
        seconds = _RETRY_SECONDS
        while not self._closed.is_set() and not self._is_full:
            try:
                self._follow_once(engine, container_id)
            except ContainerGone:
                return
            except EngineError:
                # It may come back, and the container with it; what it wrote meanwhile is not lost.
                pass
            self._closed.wait(seconds)
            seconds = min(2 * seconds, _MAX_RETRY_SECONDS)

    def close(self) -> None:
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
            follow = self._follow
        if follow is not None:
            follow.close()

    def take(self, *, is_last: bool) -> list[LogLine]:
        with self._changed:
            # An Engine tells whole lines: one without its end is the container's last.
            if self._begun and is_last:
                self._append(self._begun)
                self._begun = ""
            lines = list(self._lines)
            self._lines.clear()
            self._waiting = 0
            self._changed.notify_all()
        return lines

    def complete(self, stored: str | None) -> None:
        """Add what the followed stream still lacks of the stored one; None: the two can't be compared."""
        with self._changed:
            if stored is not None and not self._is_full:
                # One more than is shown makes it full.
                self._add(stored[self._characters :][: MAX_CHARACTERS - self._characters + 1])

    def _follow_once(self, engine: Engine, container_id: str) -> None:
        follow = engine.follow_log(container_id, self.stream)
        with self._changed:
            self._follow = follow
        try:
            skip = self._bytes
            # Whoever closed us before this knew of nothing to close.
            if self._closed.is_set():
                return
            for chunk in follow:
                new, skip = chunk[skip:], max(0, skip - len(chunk))
                self._take_in(new)
                if self._closed.is_set() or self._is_full:
                    return
        finally:
            follow.close()

    def _take_in(self, chunk: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting < _WAITING_BYTES or self._closed.is_set())
            self._bytes += len(chunk)
            self._add(self._decoder.decode(chunk).replace("\0", "\N{REPLACEMENT CHARACTER}"))

    def _add(self, text: str) -> None:
        self._characters += len(text)
        *lines, self._begun = (self._begun + text).split("\n")
        if len(self._begun) >= _LINE_LENGTH or self._characters > MAX_CHARACTERS:
            lines.append(self._begun)
            self._begun = ""
        for line in lines:
            self._append(line)
            if self._is_full:
                break
        if self._is_full:
            self._begun = ""
            self._append(f"[what {self.stream} says from here on is not shown here: it is stored with the job]")

    def _append(self, line: str) -> None:
        line = line.removesuffix("\r")
        for start in range(0, max(1, len(line)), _LINE_LENGTH):
            part = line[start : start + _LINE_LENGTH]
            self._lines.append(LogLine(datetime.now(UTC), self.stream, part))
            self._waiting += len(part)
        self._line_count += 1

    @property
    def _is_full(self) -> bool:
        return self._characters > MAX_CHARACTERS or self._line_count >= MAX_LINES
