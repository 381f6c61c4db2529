"""Answers that need a second look: odd JSON, streams that break off or fall silent, what is done already."""

import json
import time
from contextlib import suppress
from typing import Any

import pytest

from container_manager.engine import DockerEngine
from container_manager.exceptions import (
    ContainerRunning,
    EngineError,
    EngineFailed,
    HostMisconfigured,
    HostUnavailable,
    ImageMissing,
    OutcomeUnknown,
    RequestRefused,
)
from tests.unit.fake_server import (
    CALLS,
    HANG,
    ID,
    FakeServer,
    answer,
    chunked,
    create,
    inspected,
    raised,
)

# docker-py leaves a socket that does not connect to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.mark.parametrize("body", [{"message": "hello"}, [{}], [1], "text", None], ids=repr)
@pytest.mark.parametrize("step", ["identify", "networks", "create", "inspect", "list"])
def test_json_that_lacks_what_was_asked_for_is_no_engine(
    server: FakeServer, engine: DockerEngine, step: str, body: Any
) -> None:
    server.set(step, answer(200, json.dumps(body)))

    assert raised(step, engine) is HostMisconfigured


@pytest.mark.parametrize("networks", [answer(403, "no"), answer(200, []), answer(500, "broken")])
def test_an_engine_whose_networks_can_not_be_seen_tells_the_rest(
    server: FakeServer, engine: DockerEngine, networks: bytes
) -> None:
    server.answers["/info"] = answer(200, {"SystemTime": "2026-11-24T13:00:00.123456789Z", "LiveRestoreEnabled": True})
    server.answers["/networks"] = networks

    daemon = engine.daemon()

    assert (daemon.now is not None, daemon.started_at, daemon.spares_containers) == (True, None, True)


@pytest.mark.parametrize(("step", "status"), [("start", 304), ("start", 204), ("remove", 404), ("remove", 204)])
def test_what_is_done_already_is_done(server: FakeServer, engine: DockerEngine, step: str, status: int) -> None:
    server.set(step, answer(status, ""))

    assert CALLS[step](engine) is None


@pytest.mark.parametrize("look", [inspected("removing"), answer(404, "gone")], ids=["going", "gone"])
def test_a_container_that_another_removes_is_done(server: FakeServer, engine: DockerEngine, look: bytes) -> None:
    server.set("remove", answer(409, {"message": "removal is in progress"}))
    server.answers[f"/{ID}/json"] = look

    assert CALLS["remove"](engine) is None


def test_a_container_that_runs_is_not_removed(server: FakeServer, engine: DockerEngine) -> None:
    server.set("remove", answer(409, {"message": "whatever"}))
    server.answers[f"/{ID}/json"] = inspected("running")

    assert raised("remove", engine) is ContainerRunning


def test_a_pull_that_fails_half_way_has_failed(server: FakeServer, engine: DockerEngine) -> None:
    lines = b'{"status": "layer"}\r\n{"error": "no space"}\r\n'
    server.set("pull", chunked(lines, b"0\r\n\r\n"))

    with pytest.raises(EngineFailed, match="pull of busybox: no space"):
        engine.pull("busybox", 1)


FRAME = b"\x01\0\0\0\0\0\0\x02ab"


@pytest.mark.parametrize(
    "reply",
    [chunked(FRAME), chunked(FRAME[:5]), chunked(FRAME[:9]), chunked(FRAME + FRAME[:3])],
    ids=["after a frame", "in a header", "in a frame", "in a second header"],
)
def test_a_log_that_breaks_off_is_a_host_that_went_away(server: FakeServer, engine: DockerEngine, reply: bytes) -> None:
    server.set("logs", reply)

    assert raised("logs", engine) is HostUnavailable


@pytest.mark.parametrize(
    ("step", "reply"),
    [("logs", chunked(FRAME)), ("logs", b""), ("pull", b""), ("pull", chunked(b"")), ("pull", chunked(b"{}\r\n"))],
    ids=["logs after a frame", "logs", "pull", "pull after its header", "pull after a line"],
)
def test_a_stream_that_falls_silent_ends_in_time(
    server: FakeServer, engine: DockerEngine, step: str, reply: bytes
) -> None:
    server.hangs = True
    server.set(step, reply)

    begin = time.monotonic()
    with suppress(EngineError):
        CALLS[step](engine)

    assert time.monotonic() - begin < 0.8 * HANG


@pytest.mark.parametrize("body", [{"error": "no route"}, [], "null"], ids=repr)
@pytest.mark.parametrize(("status", "kind"), [(400, RequestRefused), (404, ImageMissing), (502, OutcomeUnknown)])
def test_a_status_counts_whatever_the_body_says(
    server: FakeServer, engine: DockerEngine, status: int, kind: type[EngineError], body: Any
) -> None:
    server.set("create", answer(status, body))

    assert raised("create", engine) is kind


@pytest.mark.parametrize("message", ["bad\0name", "x" * 1_000_000, "a\ud800b"], ids=["NUL", "a megabyte", "surrogate"])
def test_what_an_engine_says_can_be_stored(server: FakeServer, engine: DockerEngine, message: str) -> None:
    server.set("create", answer(400, {"message": message}))

    with pytest.raises(RequestRefused) as caught:
        create(engine)

    assert "\0" not in str(caught.value)
    assert len(str(caught.value).encode()) < 100_000
