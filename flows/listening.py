"""Finds out whether only this machine can reach one of its ports, or other machines as well."""

import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

#: Linux's tables of TCP sockets, one for each address family.
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
#: Linux's code for a socket that listens.
_LISTENS = "0A"
#: Addresses for documentation (RFC 5737, RFC 3849). A UDP socket shows its own address without sending to them.
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
#: seconds; an address of this machine answers at once, unless a firewall drops the packets.
_CONNECT_SECONDS = 0.3


def is_loopback(host: str) -> bool:
    """Whether it is a loopback address, or `localhost` if that resolves only to such addresses.

    Other names do not count: what they resolve to may change, and may differ between processes.
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
    """The addresses other than loopback at which this machine accepts connections to the port.

    Looking at sockets is not enough: Docker can publish a port with kernel rules, without a socket that listens.
    """
    listening = [str(address) for address in _listening(port, tables) if not address.is_loopback]
    return listening or [address for address in _own_addresses(tables) if _accepts(address, port)]


def _listening(port: int, tables: Sequence[Path]) -> list[IPv4Address | IPv6Address]:
    """Empty on systems without these tables, which only Linux has."""
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
    """The tables print an address as 32-bit words in the machine's byte order."""
    words = (int(text[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(text), 8))
    return _plain(ip_address(b"".join(words)))


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """`::ffff:127.0.0.1` is 127.0.0.1, in a socket of both families."""
    return getattr(address, "ipv4_mapped", None) or address


def _own_addresses(tables: Sequence[Path]) -> list[str]:
    """The addresses from which this machine sends. Without the tables, also those of its host name."""
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
