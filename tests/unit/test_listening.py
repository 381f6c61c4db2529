"""Who can reach a port of this machine."""

import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress

import pytest

from flows.listening import beyond_loopback, is_loopback


def own_address() -> str:
    """By which this machine reaches others."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    pytest.skip("this machine is in no network")


def listen(stack: ExitStack, address: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = stack.enter_context(socket.socket(family))
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((address, port))
    listener.listen()
    return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("127.1", False),
        ("", False),
        ("prefect", False),
        ("localhost.example", False),
        # Whatever it means here and now.
        (socket.gethostname(), False),
    ],
)
def test_only_an_address_of_loopback_is_loopback_and_its_one_name(host: str, is_ours: bool) -> None:
    assert is_loopback(host) is is_ours


@pytest.mark.parametrize(
    ("listens_on", "found"),
    [
        (["127.0.0.1"], []),
        (["127.1.2.3"], []),
        (["::1"], []),
        (["::ffff:127.0.0.1"], []),
        (["127.0.0.1", "::1"], []),
        (["0.0.0.0"], ["0.0.0.0"]),
        (["::"], ["::"]),
        (["own"], ["own"]),
        (["127.0.0.1", "own"], ["own"]),
        (["::ffff:own"], ["own"]),
        ([], []),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_tables", [True, False], ids=["by the sockets", "by trying"])
def test_a_port_is_beyond_loopback_if_anything_listens_there(
    listens_on: Sequence[str], found: list[str], has_tables: bool
) -> None:
    own = own_address()
    with ExitStack() as stack:
        port = 0
        for address in listens_on:
            port = listen(stack, address.replace("own", own), port)
        addresses = beyond_loopback(port) if has_tables else beyond_loopback(port, tables=())

    if has_tables:
        assert addresses == [address.replace("own", own) for address in found]
    else:
        assert (own in addresses) is bool(found)
