"""An Engine's stand-in for the tests of what is made of its answers."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from container_manager.engine import DockerEngine
from tests.unit.fake_server import TIMEOUT, FakeServer, serving


@pytest.fixture(scope="module")
def collected_sockets() -> Iterator[None]:
    """docker-py leaves a socket that does not connect to the garbage collector: it comes while it is expected."""
    yield
    gc.collect()


@pytest.fixture
def server(tmp_path: Path, collected_sockets: None) -> Iterator[FakeServer]:
    with serving(tmp_path / "s") as fake:
        yield fake


@pytest.fixture
def engine(server: FakeServer) -> DockerEngine:
    return DockerEngine(server.address, TIMEOUT)
