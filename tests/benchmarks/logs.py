"""200 MB of output in one container: how much memory its harvest takes, beside docker-py's `logs()` in one piece."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import docker
from django.db import connection

from container_manager.models import DockerHost, JobAttempt

from . import raw, rows
from .figures import Figure

BYTES = 200_000_000
SCRIPT = f"yes 'a line of the kind that programs print, again and again' | head -c {BYTES}"


def measure() -> Iterator[Figure]:
    rows.empty()
    client = docker.APIClient(version="auto", timeout=60)
    # What we create keeps 30 MB at most, by its driver's options; the pass must not rely on that.
    config = client.create_host_config(log_config={"Type": "json-file", "Config": {"max-size": "1g"}})
    container = client.create_container(raw.IMAGE, ["sh", "-c", SCRIPT], labels={raw.LABEL: "1"}, host_config=config)
    container_id = container["Id"]
    try:
        client.start(container_id)
        assert client.wait(container_id, timeout=300)["StatusCode"] == 0
        yield _figure(container_id)
    finally:
        with suppress(docker.errors.NotFound):
            client.remove_container(container_id, force=True)


def _figure(container_id: str) -> Figure:
    host = DockerHost.objects.create(name="a")
    rows.copies(
        1,
        status="'running'",
        slot_host_id=str(host.pk),
        container_id=f"'{container_id}'",
        attempt="1",
        launched_at=rows.moment("0"),
        deadline_at=rows.moment("86400"),
    )
    reference = _growth("reference", container_id)
    ours = _growth("ours", "")
    attempt = JobAttempt.objects.get()
    assert 2_000_000 < len(attempt.stdout) < 3_000_000, len(attempt.stdout)
    return Figure(
        "memory for 200 MB of log in one container",
        connection.vendor,
        "MiB more",
        [ours],
        [reference],
        "`logs()` in one piece",
        "< 50",
        ours < 50,
    )


def _growth(which: str, container_id: str) -> float:
    """In a process of its own, whose greatest size is not another figure's."""
    answer = subprocess.run(
        [sys.executable, "-m", f"{__package__}.log_memory", which, container_id],
        stdout=subprocess.PIPE,
        check=True,
    )
    return float(answer.stdout)
