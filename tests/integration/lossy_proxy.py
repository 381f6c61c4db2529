"""What stands between a client and an Engine's socket, and loses answers: the Engine does what is asked of it."""

import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class LossyProxy(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads, block_on_close = True, False

    def __init__(self, path: Path, engine: str) -> None:
        self.engine = engine
        self.base_url = f"unix://{path}"
        #: Answers that were lost.
        self.lost = 0
        self._pattern: re.Pattern[bytes] | None = None
        self._lock = threading.Lock()
        super().__init__(str(path), _Connection)

    def lose_next(self, request: str) -> None:
        """The answer to the next request whose first line this matches."""
        self._pattern = re.compile(request.encode())

    def is_lost(self, sent: bytes) -> bool:
        with self._lock:
            if self._pattern is None or not self._pattern.match(sent.partition(b"\r\n")[0]):
                return False
            self._pattern = None
            self.lost += 1
            return True


class _Connection(socketserver.BaseRequestHandler):
    server: LossyProxy

    def handle(self) -> None:
        with socket.socket(socket.AF_UNIX) as engine, suppress(OSError):
            engine.connect(self.server.engine)
            self._loses = False
            answers = threading.Thread(target=self._bring_back, args=(engine,), daemon=True)
            answers.start()
            while sent := self.request.recv(65536):
                self._loses |= self.server.is_lost(sent)
                engine.sendall(sent)
            engine.shutdown(socket.SHUT_WR)
            answers.join()

    def _bring_back(self, engine: socket.socket) -> None:
        with suppress(OSError):
            # The first bytes of the answer say that it is done.
            while (answer := engine.recv(65536)) and not self._loses:
                self.request.sendall(answer)
            self.request.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxying(path: Path, engine: str) -> Iterator[LossyProxy]:
    with LossyProxy(path, engine) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        yield proxy
        proxy.shutdown()
