"""Finds the networks that a job would join, and refuses the denied ones.

Docker accepts a network's name, its id, or the beginning of its id. So the names in a job are looked up in the
Engine's own list of networks first, and the networks found there are checked.
"""

import re
from collections.abc import Callable, Sequence

from .exceptions import NetworkMissing, RequestRefused
from .types import Network

#: Networks that every Engine has. They can't be removed, and no other network can have their names.
_BUILT_IN = ("bridge", "none")
#: Docker's name for the network of a container that names none.
DEFAULT = "default"

_may_be_id = re.compile("[0-9a-f]{1,64}").fullmatch
#: An id as Engines print it, or more of it. A shorter entry of the settings, such as `db`, is a name.
_is_id = re.compile("[0-9a-f]{12,64}").fullmatch


def wanted(names: Sequence[str]) -> tuple[str, ...]:
    """The networks of a job, with the name of the network that it joins by default."""
    first, *others = names or (DEFAULT,)
    return ("bridge" if first == DEFAULT else first, *others)


def joined(names: Sequence[str], denied: Sequence[str], look: Callable[[], Sequence[Network]]) -> tuple[Network, ...]:
    """The networks to join, each once, in the order of the names. Raises `RequestRefused` if one is denied.

    `look` lists the Engine's networks. It is called only if networks are denied or a name may be an id; otherwise the
    names are used as they are.
    """
    names = wanted(names)
    known = look() if _need_a_look(names, denied) else None
    found: list[Network] = []
    for name in names:
        meant = _meant(name, known)
        for network in meant:
            _refuse(name, network, denied)
        if len(meant) > 1:
            raise RequestRefused(f"network {name} is ambiguous: {len(meant)} networks fit; give the full id of one")
        found += [network for network in meant if network not in found]
    return tuple(found)


def handle(network: Network) -> str:
    """The id or name to give to the Engine."""
    return network.id if _is_pinned(network) else network.name


def endpoint(network: Network) -> dict[str, str]:
    """The settings of a container's endpoint in the network; they bind it to the network's id.

    Without them an Engine keeps only the name, and looks it up when it starts the container. By then another network
    may have that name.
    """
    return {"NetworkID": network.id} if _is_pinned(network) else {}


def _is_pinned(network: Network) -> bool:
    # An Engine creates its bridge at each start, with a new id.
    return bool(network.id) and network.name not in _BUILT_IN


def _need_a_look(names: tuple[str, ...], denied: Sequence[str]) -> bool:
    if len(names) == 1 and names[0] in _BUILT_IN:
        return any(_is_id(entry) for entry in denied)
    # Even if no network is denied, an id may be that of the host's network.
    return bool(denied) or any(_may_be_id(name) for name in names)


def _meant(name: str, known: Sequence[Network] | None) -> list[Network]:
    """The networks that fit, looked up as Docker does: by id, else by name, else by the beginning of an id."""
    if known is None:
        return [Network(name=name)]
    for fits in (
        [network for network in known if network.id == name],
        [network for network in known if network.name == name],
        [network for network in known if network.id.startswith(name)],
    ):
        if fits:
            return fits
    if name in _BUILT_IN:
        # An Engine can be configured without a bridge.
        return [Network(name=name)]
    raise NetworkMissing(f"network {name} not found")


def _refuse(name: str, network: Network, denied: Sequence[str]) -> None:
    if network.is_of_host:
        raise RequestRefused(f"network {name} is the host's own, which no job may join")
    if any(_fits(entry, network) for entry in denied):
        called = name if name == network.name else f"{name} is {network.name}"
        raise RequestRefused(f"network {called}, which no job may join (setting DENIED_NETWORKS)")


def _fits(entry: str, network: Network) -> bool:
    return entry in (network.name, network.id) or (bool(_is_id(entry)) and network.id.startswith(entry))
