"""What stands in a Prefect API's place: it answers as it is told to, and remembers what it was asked."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: seconds; how long one that hangs does so at most.
HANG = 20


@dataclass
class Answer:
    status: int = 200
    body: str = "0"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]


HANGS = Answer(status=0)
BREAKS_OFF = Answer(status=-1)
NOT_HTTP = Answer(status=-2)


class FakeApi(ThreadingHTTPServer):
    """Another answer for each request: by its method, its path and its headers, whose names are in lower case."""

    daemon_threads, block_on_close = True, False

    def __init__(self, answer: Callable[[Asked], Answer], bound_to: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in bound_to else socket.AF_INET
        self.answer, self.asked, self.may_end = answer, list[Asked](), threading.Event()
        super().__init__((bound_to, 0), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # The usual one looks its own name up, which may take seconds.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "fake", self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    server: FakeApi

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = Asked(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        self.server.asked.append(asked)
        answer = self.server.answer(asked)
        with suppress(OSError):
            if answer is HANGS:
                self.server.may_end.wait(HANG)
            elif answer is NOT_HTTP:
                self.wfile.write(b"\x15\x03\x01\x00\x02\x02\x46")
            elif answer is not BREAKS_OFF:
                self._reply(answer)

    def do_POST(self) -> None:
        self.do_GET()

    def _reply(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def fake_api(answer: Callable[[Asked], Answer] | Answer, bound_to: str = "127.0.0.1") -> Iterator[FakeApi]:
    with FakeApi(answer if callable(answer) else lambda asked: answer, bound_to) as api:
        thread = threading.Thread(target=api.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield api
        finally:
            api.may_end.set()
            api.shutdown()
            thread.join()
