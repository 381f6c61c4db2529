"""What stands in an Engine's place, and a call for each thing that is asked of it."""

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from container_manager.engine import DockerEngine
from container_manager.exceptions import EngineError
from container_manager.logs import BoundedLog
from container_manager.types import ContainerSpec, EngineAddress, Hardening

ID = "c" * 64
#: seconds; the client's, and how long a server that hangs does so at most.
TIMEOUT, HANG = 0.3, 3


def answer(status: int, body: Any, *, missing_bytes: int = 0) -> bytes:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(data) + missing_bytes}\r\n\r\n".encode() + data


VERSION = answer(200, {"ApiVersion": "1.41"})
CREATED = answer(201, {"Id": ID})


def inspected(state: str) -> bytes:
    return answer(200, {"Id": ID, "Config": {"Tty": False}, "State": {"Status": state}})


class FakeServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Gives each request the answer whose key is in its path, `otherwise` if there is none."""

    daemon_threads, block_on_close = True, False

    def __init__(self, path: Path) -> None:
        self.address = EngineAddress(base_url=f"unix://{path}")
        self.answers = {"/version": VERSION}
        self.otherwise = answer(200, {})
        #: Hang after these bytes instead of closing.
        self.hangs = False
        self.may_end = threading.Event()
        super().__init__(str(path), Handler)

    def set(self, step: str, reply: bytes) -> None:
        self.otherwise = reply
        self.answers = {"/version": VERSION} | BEFORE.get(step, {})


class Handler(socketserver.StreamRequestHandler):
    server: FakeServer

    def handle(self) -> None:
        path, length = self.rfile.readline().split()[1].decode(), 0
        while (line := self.rfile.readline().strip()) != b"":
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        self.rfile.read(length)
        reply = next((reply for key, reply in self.server.answers.items() if key in path), None)
        with suppress(OSError):
            self.wfile.write(self.server.otherwise if reply is None else reply)
            if reply is None and self.server.hangs:
                self.server.may_end.wait(HANG)


#: What answers well, so that the step itself is reached.
BEFORE = {"connect": {"/containers/create": CREATED}, "logs": {f"/{ID}/json": inspected("exited")}}


def create(engine: DockerEngine, *networks: str) -> str:
    hardening = Hardening(pids_limit=8, cap_drop_all=False, log_driver="local", log_options={})
    spec = ContainerSpec(image="busybox", networks=networks)
    return engine.create("cm-1", spec, environment={}, labels={}, hardening=hardening)


CALLS: dict[str, Callable[[DockerEngine], Any]] = {
    "identify": lambda engine: engine.identify(),
    "daemon": lambda engine: engine.daemon(),
    # What may be an id is looked for.
    "networks": lambda engine: create(engine, "cafe"),
    "create": create,
    "connect": lambda engine: create(engine, "front", "back"),
    "start": lambda engine: engine.start(ID),
    "list": lambda engine: engine.list("abc"),
    "inspect": lambda engine: engine.inspect(ID),
    "logs": lambda engine: engine.read_log(ID, "stdout", BoundedLog(10, 10), 1),
    "signal": lambda engine: engine.signal(ID, "SIGTERM"),
    "remove": lambda engine: engine.remove(ID),
    "pull": lambda engine: engine.pull("busybox", 1),
    "events": lambda engine: list(engine.watch_ends("abc")),
}
SIDE_EFFECTS = {"create", "connect", "start", "signal", "remove"}


@contextmanager
def serving(path: Path) -> Iterator[FakeServer]:
    with FakeServer(path) as fake:
        threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True).start()
        yield fake
        fake.may_end.set()
        fake.shutdown()


def raised(step: str, engine: DockerEngine) -> type[EngineError]:
    with pytest.raises(EngineError) as caught:
        CALLS[step](engine)
    return caught.type


def chunked(data: bytes, end: bytes = b"") -> bytes:
    """The beginning of an answer that goes on, unless there is an `end`."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + (b"%x\r\n" % len(data) + data + b"\r\n" if data else b"") + end
