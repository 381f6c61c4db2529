"""What an Engine, or what stands in its place, answers, and the one class of ours that each caller then sees."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from container_manager.engine import DockerEngine
from container_manager.exceptions import (
    ContainerGone,
    ContainerNotRunning,
    EngineError,
    EngineFailed,
    HostMisconfigured,
    HostUnavailable,
    ImageMissing,
    LogsUnavailable,
    NameTaken,
    NetworkMissing,
    OutcomeUnknown,
    RequestRefused,
)
from container_manager.types import EngineAddress
from tests.conftest import free_port
from tests.unit.fake_server import (
    CALLS,
    ID,
    SIDE_EFFECTS,
    TIMEOUT,
    VERSION,
    FakeServer,
    answer,
    raised,
)

# docker-py leaves a socket that does not connect to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


#: Written out again; an answer that is added must be added here.
OF_ONE_STEP: dict[tuple[str, int], type[EngineError]] = {
    ("networks", 404): EngineFailed,
    ("create", 404): ImageMissing,
    ("create", 409): NameTaken,
    ("connect", 404): NetworkMissing,
    ("signal", 409): ContainerNotRunning,
    ("pull", 404): ImageMissing,
    ("logs", 409): ContainerGone,
    ("logs", 500): LogsUnavailable,
    ("logs", 501): LogsUnavailable,
}
OF_ANY: dict[int, type[EngineError]] = {400: RequestRefused, 404: ContainerGone, 409: EngineFailed, 500: EngineFailed}
#: The answers to these say that it is done, or need a second look.
DONE = {("remove", 404), ("remove", 409)}
BY_STATUS = (
    [
        (step, status, OF_ONE_STEP.get((step, status), kind))
        for step in CALLS
        for status, kind in (OF_ANY | {501: EngineFailed}).items()
        if (step, status) not in DONE and step != "events"
    ]
    + [
        (step, status, OutcomeUnknown if step in SIDE_EFFECTS else HostUnavailable)
        for step in CALLS
        for status in (502, 503, 504)
        if step not in ("events", "pull")
    ]
    # Some Engines hand on what the registry says.
    + [("pull", status, EngineFailed) for status in (401, 403, 407, 502, 503, 504)]
    # A proxy that lets nobody look at networks lets everything else through.
    + [("networks", status, EngineFailed) for status in (401, 403, 407)]
    + [("events", 500, EngineFailed), ("events", 503, HostUnavailable)]
)


@pytest.mark.parametrize(("step", "status", "kind"), BY_STATUS)
def test_a_status_means_what_it_means_at_this_step(
    server: FakeServer, engine: DockerEngine, step: str, status: int, kind: type[EngineError]
) -> None:
    server.set(step, answer(status, {"message": "no such image, name conflict, not running"}))

    assert raised(step, engine) is kind


LOST: dict[str, tuple[bytes, bool]] = {
    "closed": (b"", False),
    "garbage": (b"\x00\xff\xfe not HTTP at all\r\n\r\n", False),
    "cut body": (answer(200, "[", missing_bytes=100), False),
    "no answer in time": (b"", True),
}


@pytest.mark.parametrize("situation", LOST)
@pytest.mark.parametrize("step", sorted(CALLS.keys() - {"events", "pull"}))
def test_a_lost_answer_is_unknown_only_where_something_may_have_happened(
    server: FakeServer, engine: DockerEngine, step: str, situation: str
) -> None:
    reply, server.hangs = LOST[situation]
    server.set(step, reply)

    assert raised(step, engine) is (OutcomeUnknown if step in SIDE_EFFECTS else HostUnavailable)


@pytest.mark.parametrize("step", CALLS)
@pytest.mark.parametrize(
    "reply", [b"", b"garbage\r\n\r\n", answer(503, "busy"), answer(500, "no")], ids=["", "garbage", "503", "500"]
)
def test_nothing_was_sent_to_a_host_that_does_not_tell_its_version(
    server: FakeServer, engine: DockerEngine, step: str, reply: bytes
) -> None:
    server.answers["/version"] = reply

    assert raised(step, engine) is HostUnavailable


@pytest.mark.parametrize("step", ["identify", "create", "pull"])
@pytest.mark.parametrize("body", ["<html>log in</html>", "{}", "[]"])
def test_what_tells_no_version_is_no_engine(server: FakeServer, engine: DockerEngine, step: str, body: str) -> None:
    server.answers["/version"] = answer(200, body)

    assert raised(step, engine) is HostMisconfigured


@pytest.mark.parametrize("step", ["identify", "networks", "create", "list", "inspect"])
def test_a_page_in_place_of_an_answer_is_no_engine(server: FakeServer, engine: DockerEngine, step: str) -> None:
    server.set(step, answer(200, "<html>log in</html>"))

    assert raised(step, engine) is HostMisconfigured


@pytest.mark.parametrize("has_file", [False, True], ids=["missing", "refused"])
@pytest.mark.parametrize("is_known", [False, True], ids=["never reached", "reached before"])
@pytest.mark.parametrize("step", CALLS)
def test_a_host_where_nobody_listens_is_unavailable(tmp_path: Path, step: str, is_known: bool, has_file: bool) -> None:
    server = FakeServer(tmp_path / "s")
    engine = DockerEngine(server.address, TIMEOUT)
    if is_known:
        threading.Thread(target=lambda: [server.handle_request() for _ in range(2)], daemon=True).start()
        engine.start(ID)
    server.server_close()
    if not has_file:
        (tmp_path / "s").unlink()

    assert raised(step, engine) is HostUnavailable


@pytest.fixture
def is_nobody(server: FakeServer) -> Iterator[None]:
    """This process may not use the server's socket: not as its owner, and not as root, who may do everything."""
    Path(server.server_address).chmod(0)
    usual = os.geteuid()
    if usual == 0:
        os.seteuid(65534)
    yield
    os.seteuid(usual)


@pytest.mark.parametrize("step", CALLS)
def test_a_socket_that_may_not_be_used_is_a_host_that_is_misconfigured(
    engine: DockerEngine, step: str, is_nobody: None
) -> None:
    with pytest.raises(HostMisconfigured, match="Permission denied"):
        CALLS[step](engine)


def test_a_host_that_comes_back_is_reached_again(server: FakeServer, engine: DockerEngine) -> None:
    server.answers["/version"] = b""
    assert raised("identify", engine) is HostUnavailable

    server.answers |= {"/version": VERSION, "/info": answer(200, {"ID": "X"})}

    assert engine.identify() == "X"


@pytest.mark.parametrize(
    ("base_url", "kind"),
    [
        (f"tcp://127.0.0.1:{free_port()}", HostUnavailable),
        ("ftp://127.0.0.1", HostMisconfigured),
        ("tcp://127.0.0.1:99999", HostMisconfigured),
    ],
    ids=["refused", "scheme", "port"],
)
def test_an_address_that_is_no_use(base_url: str, kind: type[EngineError]) -> None:
    engine = DockerEngine(EngineAddress(base_url=base_url), TIMEOUT)

    assert raised("create", engine) is kind


@pytest.mark.parametrize("content", ["no certificate", None], ids=["garbage", "missing"])
def test_a_certificate_that_is_no_use(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "file.pem"
    if content:
        file.write_text(content)
    paths = dict.fromkeys(["tls_ca_path", "tls_cert_path", "tls_key_path"], str(file))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = EngineAddress(base_url=f"tcp://127.0.0.1:{listener.getsockname()[1]}", **paths)
        kind = raised("create", DockerEngine(address, TIMEOUT))

    assert kind is HostMisconfigured
