"""Who can reach a port of this machine: only its own programs, or other machines too."""

import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

#: Linux's tables of TCP sockets; each has those of one address family.
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
#: Linux's code for a socket that listens.
_LISTENS = "0A"
#: Addresses that nothing has (RFC 5737, RFC 3849): which address we would send from is known without sending.
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
#: seconds; an address of our own answers at once, unless a firewall drops what is sent to it.
_CONNECT_SECONDS = 0.3


def is_loopback(host: str) -> bool:
    """Whether it is an address of loopback, or `localhost` where that is one.

    Any other name is not, whatever it means now: that may change, and may differ from one process to the next.
    """
    if host.lower() == "localhost":
        found = _resolved(host)
        return bool(found) and all(map(is_loopback, found))
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return _plain(address).is_loopback


def beyond_loopback(port: int, tables: Sequence[Path] = TABLES) -> list[str]:
    """The addresses, other than loopback's, at which this machine takes connections to the port.

    The sockets are not all: where Docker forwards a published port by rules of the kernel, none listens.
    """
    listening = [str(address) for address in _listening(port, tables) if not address.is_loopback]
    return listening or [address for address in _own_addresses(tables) if _accepts(address, port)]


def _listening(port: int, tables: Sequence[Path]) -> list[IPv4Address | IPv6Address]:
    """Empty where there are no such tables: on other systems than Linux."""
    found = []
    for table in tables:
        with suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                address, _, its_port = local.partition(":")
                if state == _LISTENS and int(its_port, 16) == port:
                    found.append(_from_table(address))
    return found


def _from_table(text: str) -> IPv4Address | IPv6Address:
    """Words of 32 bits in the machine's order of bytes, though the address itself is in the network's."""
    words = (int(text[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(text), 8))
    return _plain(ip_address(b"".join(words)))


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """`::ffff:127.0.0.1` is 127.0.0.1, in a socket of both families."""
    return getattr(address, "ipv4_mapped", None) or address


def _own_addresses(tables: Sequence[Path]) -> list[str]:
    """Those by which this machine reaches others; where sockets can't be looked up, all that its name has, too."""
    found = [] if any(table.exists() for table in tables) else _resolved(socket.gethostname())
    for family, elsewhere in _ELSEWHERE:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))
            found.append(probe.getsockname()[0])
    return [address for address in dict.fromkeys(found) if not is_loopback(address)]


def _resolved(name: str) -> list[str]:
    try:
        return [str(address[0]) for *_, address in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def _accepts(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
