"""What the Engine itself can do: docker-py and a pool of threads, with nothing else in the way."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import docker

IMAGE = "busybox:latest"
LABEL = "container-manager.benchmark"


def launch(count: int, threads: int) -> float:
    """Containers created and started, per second; they are removed after the clock has stopped."""
    client = docker.APIClient(version="auto", timeout=60)
    ids: list[str] = []

    def one() -> None:
        # With the options that ours get: an init and a log driver are not free.
        config = client.create_host_config(
            init=True, security_opt=["no-new-privileges"], pids_limit=512, log_config={"Type": "local", "Config": {}}
        )
        created = client.create_container(IMAGE, ["true"], labels={LABEL: "1"}, host_config=config)
        client.start(created["Id"])
        ids.append(created["Id"])

    rate = _rate(count, threads, one)
    for container_id in ids:
        client.remove_container(container_id, force=True, v=True)
    return rate


def drain(count: int, threads: int, seconds: str) -> float:
    """Containers created, started, waited for, their logs read, removed, per second."""
    client = docker.APIClient(version="auto", timeout=60)

    def one() -> None:
        config = client.create_host_config(
            init=True, security_opt=["no-new-privileges"], pids_limit=512, log_config={"Type": "local", "Config": {}}
        )
        created = client.create_container(IMAGE, ["sleep", seconds], labels={LABEL: "1"}, host_config=config)
        client.start(created["Id"])
        client.wait(created["Id"])
        client.logs(created["Id"], stdout=True, stderr=False)
        client.logs(created["Id"], stdout=False, stderr=True)
        client.remove_container(created["Id"], v=True)

    return _rate(count, threads, one)


def _rate(count: int, threads: int, call: Callable[[], None]) -> float:
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        for future in [pool.submit(call) for _ in range(count)]:
            future.result()
        return count / (time.perf_counter() - begin)
