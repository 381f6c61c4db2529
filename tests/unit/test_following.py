"""What a container writes, told line by line, by an Engine that does as it is told."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from container_manager.engine import Stream
from container_manager.exceptions import ContainerGone, EngineError, HostUnavailable
from container_manager.following import MAX_CHARACTERS, MAX_LINES, LiveLog, LogLine
from tests.conftest import wait_until


class Follow:
    """A stream that ends by `None` or an error."""

    def __init__(self, chunks: Sequence[bytes | EngineError | None]) -> None:
        self.chunks: queue.SimpleQueue[bytes | EngineError | None] = queue.SimpleQueue()
        for chunk in chunks:
            self.chunks.put(chunk)

    def __iter__(self) -> Iterator[bytes]:
        while (chunk := self.chunks.get()) is not None:
            if isinstance(chunk, EngineError):
                raise chunk
            yield chunk

    def close(self) -> None:
        self.chunks.put(None)


class Writing:
    """The part of an Engine that is followed: stdout as in `follows`, one after the other; stderr is silent."""

    def __init__(self, *follows: Follow) -> None:
        self.follows = list(follows)

    def follow_log(self, container_id: str, stream: Stream) -> Follow:
        if stream == "stderr":
            return Follow([])
        if not self.follows:
            raise ContainerGone
        return self.follows.pop(0)


class Told:
    def __init__(self) -> None:
        self.lines: list[LogLine] = []
        self.takes = True

    def __call__(self, lines: Sequence[LogLine]) -> bool:
        if self.takes:
            self.lines += lines
        return self.takes

    @property
    def texts(self) -> list[str]:
        return [line.text for line in self.lines]


@pytest.fixture
def told() -> Told:
    return Told()


def follow(told: Told, *follows: Follow) -> LiveLog:
    live = LiveLog(told)
    live.follow(Writing(*follows), "id")
    return live


def stored(stdout: str) -> dict[Stream, str]:
    return {"stdout": stdout, "stderr": ""}


def test_lines_are_told_as_they_come_and_the_last_one_at_the_end(told: Told) -> None:
    live = follow(told, Follow([b"one\ntw", b"o\r\n\xc3", b"\xa9\0 and"]))
    wait_until(lambda: told.texts == ["one", "two"])

    live.finish(None)

    assert told.texts == ["one", "two", "é\ufffd and"]
    assert {line.stream for line in told.lines} == {"stdout"}


def test_a_stream_that_breaks_is_followed_again_where_it_was(told: Told) -> None:
    live = follow(told, Follow([b"one\nt", HostUnavailable()]), Follow([b"on", b"e\ntwo\n"]))

    wait_until(lambda: told.texts == ["one", "two"])

    live.finish(None)


def test_what_was_not_followed_is_told_by_what_was_stored(told: Told) -> None:
    live = follow(told, Follow([b"one\ntw"]))
    wait_until(lambda: told.texts == ["one"])

    live.finish(stored("one\ntwo\nthree\n"))

    assert told.texts == ["one", "two", "three"]


def test_a_container_that_was_never_followed_is_told_whole(told: Told) -> None:
    LiveLog(told).finish({"stdout": "out\n", "stderr": "err"})

    assert [(line.stream, line.text) for line in told.lines] == [("stdout", "out"), ("stderr", "err")]


def test_lines_that_are_not_taken_are_told_again_in_their_order(told: Told) -> None:
    told.takes = False
    live = follow(told, Follow([b"one\n", b"two\n"]))
    time.sleep(0.7)

    told.takes = True
    live.finish(stored("one\ntwo\nthree\n"))

    assert told.texts == ["one", "two", "three"]


def test_what_is_not_taken_keeps_the_engine_waiting(told: Told) -> None:
    told.takes = False
    stream = Follow([b"x" * 1023 + b"\n"] * 2000)
    live = follow(told, stream)
    time.sleep(1)

    left = stream.chunks.qsize()
    told.takes = True
    live.finish(None)

    assert left > 1000


@pytest.mark.parametrize(
    "chunk", [b"\n" * 1024, b"x" * 1023 + b"\n", b"x" * 1024], ids=["empty lines", "lines", "no line at all"]
)
def test_what_is_shown_has_an_end(told: Told, chunk: bytes) -> None:
    live = follow(told, Follow([chunk] * 2000))

    wait_until(lambda: told.texts and "not shown here" in told.texts[-1])
    live.finish(stored((chunk * 2000).decode()))

    assert len(told.lines) <= MAX_LINES + 1
    assert sum(len(text) for text in told.texts) <= MAX_CHARACTERS + 2 * len(chunk)
    assert sum("not shown here" in text for text in told.texts) == 1


def test_what_was_stored_is_shown_as_far(told: Told) -> None:
    LiveLog(told).finish(stored("x" * 3 * MAX_CHARACTERS))

    assert sum(len(text) for text in told.texts) < MAX_CHARACTERS + 200
    assert "not shown here" in told.texts[-1]


def test_nothing_of_it_goes_on_after_its_end(told: Told) -> None:
    before = threading.active_count()
    live = follow(told, Follow([b"one\n"]))

    live.finish(None)

    assert threading.active_count() == before
