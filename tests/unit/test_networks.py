"""When an Engine is asked for its networks: only where the names do not tell."""

import pytest

from container_manager import networks
from container_manager.exceptions import RequestRefused
from container_manager.types import Network


@pytest.mark.parametrize(
    ("names", "denied", "looks"),
    [
        ([], [], 0),
        (["none"], [], 0),
        (["backend"], [], 0),
        (["front", "back"], [], 0),
        # What may be the beginning of an id may be that of the host's network.
        (["cafe"], [], 1),
        (["front", "db"], [], 1),
        (["f" * 64], [], 1),
        (["F00D"], [], 0),
        (["f" * 65], [], 0),
        ([], ["internal"], 0),
        (["none"], ["internal"], 0),
        (["bridge"], ["internal"], 0),
        (["default"], ["internal"], 0),
        (["backend"], ["internal"], 1),
        (["bridge", "backend"], ["internal"], 1),
        # Only the Engine knows whose id it is.
        ([], ["0" * 12], 1),
        (["none"], ["0" * 64], 1),
        ([], ["db"], 0),
    ],
)
def test_an_engine_is_asked_once_and_only_where_an_id_may_be_meant(
    names: list[str], denied: list[str], looks: int
) -> None:
    asked = []
    known = [Network(id=f"{number:064x}", name=name) for number, name in enumerate(names, 16)]
    known += [Network(id="0" * 63 + "1", name="other")]

    def look() -> list[Network]:
        asked.append(1)
        return known

    joined = networks.joined(names, denied, look)

    assert len(asked) == looks
    assert [network.name for network in joined] == [
        "bridge" if name == "default" else name for name in names or ["default"]
    ]


@pytest.mark.parametrize("names", [[], ["bridge"], ["default"], ["none"], ["host"]])
def test_what_is_built_in_is_refused_by_its_name_without_a_look(names: list[str]) -> None:
    def look() -> list[Network]:
        raise AssertionError

    with pytest.raises(RequestRefused, match="no job may join"):
        networks.joined(names, ["bridge", "none"] if names != ["host"] else [], look)
