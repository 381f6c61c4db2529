"""What stands before a Prefect server: it lets requests through, or answers in its place."""

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

#: By the headers of a request, with names in lower case: the answer in the server's place, or None to let it through.
Guard = Callable[[dict[str, str]], tuple[int, dict[str, str]] | None]


class _Gateway(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, server_port: int, guard: Guard) -> None:
        self.behind, self.guard = server_port, guard
        # At more than loopback, so that it counts as any other API.
        super().__init__(("0.0.0.0", 0), _Handler)

    def server_bind(self) -> None:
        # The usual one looks its own name up, which may take seconds.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "gateway", self.server_address[1]

    def handle_error(self, *arguments: object) -> None:
        """A client that does not trust our certificate hangs up."""


class _Handler(BaseHTTPRequestHandler):
    server: _Gateway

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = self.server.guard({name.lower(): value for name, value in self.headers.items()})
        if answer is not None:
            self._reply(*answer, b"")
            return
        connection = HTTPConnection("127.0.0.1", self.server.behind, timeout=10)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        told = {name: value for name, value in response.getheaders() if name.lower() == "content-type"}
        self._reply(response.status, told, response.read())
        connection.close()

    def do_POST(self) -> None:
        self.do_GET()

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def gateway(server_port: int, guard: Guard = lambda headers: None, certificate: Path | None = None) -> Iterator[str]:
    """The address of the API behind it; with a certificate, as `make_certificate` leaves it, by https."""
    with _Gateway(server_port, guard) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}/api"
        finally:
            server.shutdown()
            thread.join()


def make_certificate(path: Path) -> None:
    """A key and a certificate for 127.0.0.1, which is its own CA's."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
