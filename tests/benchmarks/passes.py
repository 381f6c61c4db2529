"""What a pass costs beside 5,000 running containers, and what ten thousand passes leave in memory."""

import gc
import json
import multiprocessing
import socketserver
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
from django.db import connection

from container_manager.containers import ATTEMPT_LABEL, INSTANCE_LABEL, JOB_LABEL, container_name
from container_manager.models import ContainerJob, DockerHost, Installation
from container_manager.queue import QueueManager
from tests.fake_engine import Fleet

from . import rows
from .figures import Figure
from .memory import resident_mib

CONTAINERS, RUNS = 5_000, 9
PASSES, WARM_UP = 10_000, 500


def measure() -> Iterator[Figure]:
    # As in a served flow run; when the collector walks all that is imported is luck.
    gc.collect()
    gc.freeze()
    yield _beside_many()
    yield _memory()


def _beside_many() -> Figure:
    """A pass that has nothing to do but to see so; the reference is docker-py's list of the same containers."""
    rows.empty()
    instance_id = Installation.load().instance_id
    with tempfile.TemporaryDirectory(prefix="container-manager-bench-") as folder:
        path = Path(folder) / "engine.sock"
        host = DockerHost.objects.create(name="a", base_url=f"unix://{path}", max_concurrent_jobs=CONTAINERS)
        rows.copies(
            CONTAINERS,
            status="'running'",
            slot_host_id=str(host.pk),
            container_id="n",
            attempt="1",
            launched_at=rows.moment("0"),
            deadline_at=rows.moment("86400"),
        )
        rows.analyze()
        jobs = ContainerJob.objects.order_by("pk").values_list("pk", "container_id")
        containers = [_listed(job_id, container_id, instance_id) for job_id, container_id in jobs]
        with _engine(path, json.dumps(containers).encode()):
            client = docker.APIClient(f"unix://{path}", version="1.41", timeout=60)
            queue = QueueManager()
            ours, reference = [], []
            for _ in range(RUNS):
                reference.append(_milliseconds(lambda: client.containers(all=True)))
                ours.append(_milliseconds(lambda: queue.process_queue_continuous(CONTAINERS, 1, work_seconds=0)))
    figure = Figure(
        f"idle pass beside {CONTAINERS:,} containers",
        connection.vendor,
        "ms",
        ours[1:],
        reference[1:],
        "docker-py's list",
        "≤ 2",
    )
    return figure.judged((figure.ratio or 0) <= 2)


def _memory() -> Figure:
    """A fake Engine, an idle queue, this one process."""
    rows.empty()
    fleet = Fleet()
    engine = fleet.add_host()
    queue = QueueManager(fleet)
    samples = []
    for number in range(PASSES + WARM_UP):
        queue.process_queue_continuous(5, 1, work_seconds=0)
        # What it remembers of each call is a test's.
        engine.calls.clear()
        if number >= WARM_UP and number % 500 == 0:
            samples.append(resident_mib())
    growth = samples[-1] - samples[0]
    return Figure(
        f"memory over {PASSES:,} passes",
        connection.vendor,
        "MiB more",
        [growth],
        goal="± 5 MiB",
        is_reached=abs(growth) <= 5,
    )


def _listed(job_id: int, container_id: str, instance_id: str) -> dict[str, Any]:
    """A line of an Engine's list, with all that it has."""
    name = container_name(instance_id, job_id, 1)
    network = {
        "IPAMConfig": None, "Links": None, "Aliases": None, "NetworkID": "d" * 64, "EndpointID": "e" * 64,
        "Gateway": "172.17.0.1", "IPAddress": "172.17.0.2", "IPPrefixLen": 16, "IPv6Gateway": "",
        "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0, "MacAddress": "02:42:ac:11:00:02", "DriverOpts": None,
    }  # fmt: skip
    return {
        "Id": container_id,
        "Names": [f"/{name}"],
        "Image": "busybox:latest",
        "ImageID": f"sha256:{'f' * 64}",
        "Command": "/sbin/docker-init -- sleep 3600",
        "Created": 1760000000,
        "Ports": [],
        "Labels": {
            INSTANCE_LABEL: instance_id,
            JOB_LABEL: str(job_id),
            ATTEMPT_LABEL: "1",
            "container-manager.token": "a" * 32,
        },
        "State": "running",
        "Status": "Up 2 hours",
        "HostConfig": {"NetworkMode": "default"},
        "NetworkSettings": {"Networks": {"bridge": network}},
        "Mounts": [],
    }


@contextmanager
def _engine(path: Path, containers: bytes) -> Iterator[None]:
    """A process that answers as an Engine with these containers does: its work must not be counted as ours."""
    server = multiprocessing.get_context("fork").Process(target=_serve, args=(path, containers), daemon=True)
    server.start()
    while not path.exists():
        time.sleep(0.01)
    try:
        yield
    finally:
        server.terminate()
        server.join()


def _serve(path: Path, containers: bytes) -> None:
    answers = {"/version": {"ApiVersion": "1.41"}, "/info": {"ID": "engine"}}

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                while self.rfile.readline().strip():
                    pass
                where = line.split()[1].decode().partition("?")[0]
                known = next((answer for key, answer in answers.items() if where.endswith(key)), {})
                body = containers if where.endswith("/containers/json") else json.dumps(known).encode()
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                self.wfile.write(head.encode() + body)

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    Server(str(path), Handler).serve_forever()


def _milliseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000
