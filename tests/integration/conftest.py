"""The Engine's own word on what ran, and Prefect as the flows' tests need it."""

import threading
from collections.abc import Iterator
from itertools import accumulate

import docker
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from container_manager.containers import INSTANCE_LABEL
from container_manager.models import DockerHost, Installation


@pytest.fixture
def events(docker_host: DockerHost, engine: docker.DockerClient) -> Iterator[list[dict]]:
    """What happens to this installation's containers, as it happens: the Engine remembers only 256 events."""
    label = f"{INSTANCE_LABEL}={Installation.load().instance_id}"
    stream = engine.events(decode=True, filters={"type": "container", "label": label, "event": ["start", "die"]})
    told: list[dict] = []

    def listen() -> None:
        for event in stream:
            told.append(event)

    listener = threading.Thread(target=listen)
    listener.start()
    yield told
    stream.close()
    listener.join(10)


def most_alive(events: list[dict]) -> int:
    """How many containers ran at one time, by the Engine's clock."""
    in_order = sorted(events, key=lambda event: event["timeNano"])
    return max(accumulate(1 if event["status"] == "start" else -1 for event in in_order), default=0)


@pytest.fixture
def prefect_api(prefect_server: str) -> Iterator[str]:
    """This process uses the real server. The tags' limits that a test sets end with it."""
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        yield prefect_server
        with get_client(sync_client=True) as client:
            for limit in client.read_global_concurrency_limits(limit=200):
                client.delete_global_concurrency_limit_by_name(limit.name)
