"""Which of an Engine's networks a job would join, and whether it may.

Docker takes a network's name, its id and any beginning of that id for one another. So what a job asks for is turned
into ids with the Engine's own list, and compared as ids.
"""

import re
from collections.abc import Callable, Sequence

from .exceptions import NetworkMissing, RequestRefused
from .types import Network

#: What an Engine has from its start. Nobody can remove these, or make another of that name.
_BUILT_IN = ("bridge", "none")
#: Docker's word for the network of a container that names none.
DEFAULT = "default"

_may_be_id = re.compile("[0-9a-f]{1,64}").fullmatch
#: An id as Engines print it, or more of it. What is shorter, such as `db`, is meant as a name in the settings.
_is_id = re.compile("[0-9a-f]{12,64}").fullmatch


def wanted(names: Sequence[str]) -> tuple[str, ...]:
    """`networks` of a job, with a name for what a job joins that names none."""
    first, *others = names or (DEFAULT,)
    return ("bridge" if first == DEFAULT else first, *others)


def joined(names: Sequence[str], denied: Sequence[str], look: Callable[[], Sequence[Network]]) -> tuple[Network, ...]:
    """The networks to join, each once, in the order of the names; none of them is denied.

    `look`: all that the Engine has. It is only asked where an id may be meant; else the names are taken as they are.
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
    """What an Engine is to know it by."""
    return network.id if _is_pinned(network) else network.name


def endpoint(network: Network) -> dict[str, str]:
    """Of a container in the network: binds it to the id.

    An Engine keeps only the name of a network that it was given by id, and looks for that name when it starts the
    container: by then it may be another's.
    """
    return {"NetworkID": network.id} if _is_pinned(network) else {}


def _is_pinned(network: Network) -> bool:
    # An Engine makes its bridge anew, with another id, at each start.
    return bool(network.id) and network.name not in _BUILT_IN


def _need_a_look(names: tuple[str, ...], denied: Sequence[str]) -> bool:
    if len(names) == 1 and names[0] in _BUILT_IN:
        return any(_is_id(entry) for entry in denied)
    # Without denied networks there is still the host's own, which an id may stand for.
    return bool(denied) or any(_may_be_id(name) for name in names)


def _meant(name: str, known: Sequence[Network] | None) -> list[Network]:
    """As Docker looks for it: an id, else a name, else the beginning of an id."""
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
        # An Engine can be told to do without its bridge.
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
