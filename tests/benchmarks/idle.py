"""What served deployments cost: CPU seconds per idle and per busy pass, and what the Prefect server adds."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from django.db import connection
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType

from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import QueueManager
from tests.conftest import PrefectServer, wait_until
from tests.integration.conftest import children_of, flow_runs_of

from . import raw, rows
from .figures import Figure
from .prefect_server import prefect_server

INTERVAL, IDLE, BUSY, JOBS = 3, 6, 4, 5


@dataclass(frozen=True)
class Usage:
    """CPU seconds: of the serving process itself, of the flow runs' processes that have ended, of the server."""

    serving: float
    passes: float
    server: float
    count: int
    at: float


def measure() -> Iterator[Figure]:
    rows.empty()
    DockerHost.objects.create(name="a")
    with prefect_server() as prefect, prefect.used(), _serving(prefect) as serving:
        server = prefect.pid
        wait_until(lambda: _completed() >= 2, 120)
        begin = _settled(serving, server)
        wait_until(lambda: _completed() >= begin.count + IDLE, 120)
        idle = _settled(serving, server)
        per_busy = []
        for _ in range(BUSY):
            before = _settled(serving, server)
            jobs = [ContainerJob.objects.build(image=raw.IMAGE, command=["true"]) for _ in range(JOBS)]
            QueueManager().queue_jobs(jobs)
            wait_until(lambda: not ContainerJob.objects.exclude(status=Status.COMPLETED).exists(), 120)
            after = _settled(serving, server)
            per_busy.append((after.passes - before.passes) / max(1, after.count - before.count))
    seconds, count = idle.at - begin.at, idle.count - begin.count
    per_pass = (idle.passes - begin.passes) / count
    base, server_share = (idle.serving - begin.serving) / seconds, (idle.server - begin.server) / count
    for interval, most in ((10, 0.15), (30, 0.05)):
        cores = base + per_pass / interval
        yield Figure(
            f"idle cost, a pass every {interval} s",
            connection.vendor,
            "cores",
            [cores],
            goal=f"≤ {most}",
            is_reached=cores <= most,
            note=f"{base:.3f} to serve; {per_pass:.2f} CPU s per pass, whose process is forked with all imported",
        )
    yield Figure(f"CPU of a pass that runs {JOBS} jobs", connection.vendor, "s", per_busy, [per_pass], "idle pass, s")
    yield Figure("… of the Prefect server per idle pass", connection.vendor, "s", [server_share])


@contextmanager
def _serving(prefect: PrefectServer) -> Iterator[int]:
    """`python -m deployments`; its process id."""
    with tempfile.TemporaryDirectory(prefix="container-manager-bench-") as home:
        environment = (
            os.environ
            | prefect.client
            | {
                "PREFECT_HOME": home,
                "CONTAINER_MANAGER": json.dumps({"POLL_INTERVAL_SECONDS": INTERVAL, "WORK_SECONDS": 2}),
            }
        )
        with (Path(home) / "served.log").open("w") as log:
            served = subprocess.Popen(
                [sys.executable, "-m", "deployments"], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            yield served.pid
        finally:
            served.terminate()
            served.wait(60)


def _settled(serving: int, server: int) -> Usage:
    """While nothing runs: the system counts what a process used once it has ended."""
    wait_until(lambda: not flow_runs_of(serving), 60)
    return _usage(serving, server)


def _completed() -> int:
    with get_client(sync_client=True) as client:
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED]))
        return client.count_flow_runs(flow_run_filter=FlowRunFilter(state=state))


def _usage(serving: int, server: int) -> Usage:
    own, _ = _cpu_seconds(serving)
    # The flow runs' processes are forked from one of these.
    passes = sum(sum(_cpu_seconds(child)) for child in children_of(serving))
    return Usage(own, passes, sum(_cpu_seconds(server)), _completed(), time.monotonic())


def _cpu_seconds(pid: int) -> tuple[float, float]:
    """Its own, and its ended children's."""
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, children_user, children_system = (int(value) / os.sysconf("SC_CLK_TCK") for value in values[11:15])
    return user + system, children_user + children_system
