"""Short jobs through one `process-queue` flow run that keeps the slots full, beside a raw pool that does as much."""

import time
from collections.abc import Iterator

from django.db import connection
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import queue_manager
from deployments.limits import see_to_limits
from flows.inline import quiet_console
from flows.process_queue import process_queue

from . import raw, rows
from .figures import Figure, repeats
from .prefect_server import prefect_server

JOBS, CAP, SLEEP, RUNS = 60, 10, "0.5", 3


def measure() -> Iterator[Figure]:
    quiet_console()
    ours, reference, tasks = [], [], []
    with (
        prefect_server() as server,
        server.used(),
        # The heartbeat's thread, as the command leaves it out, too, holds up the end of each run by a second.
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        _drain()
        for _ in range(repeats(RUNS)):
            reference.append(raw.drain(JOBS, CAP, SLEEP))
            rate, count = _drain()
            ours.append(rate)
            tasks.append(count)
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)
    name = f"{JOBS} × `sleep {SLEEP}`, cap {CAP}, one flow run"
    figure = Figure(name, connection.vendor, "jobs/s", ours, reference, "raw pool of 10", "≥ 0.8")
    yield figure.judged((figure.ratio or 0) >= 0.8)
    share = [count / JOBS for count in tasks]
    yield Figure("… its task runs per launch", connection.vendor, "", share, goal="< 0.5", is_reached=max(share) < 0.5)


def _drain() -> tuple[float, int]:
    rows.empty()
    DockerHost.objects.create(name="a", max_concurrent_jobs=JOBS)
    with get_client(sync_client=True) as client:
        see_to_limits(client, reset=True)
    jobs = [ContainerJob.objects.build(image=raw.IMAGE, command=["sleep", SLEEP]) for _ in range(JOBS)]
    queue_manager.queue_jobs(jobs)
    begin = time.perf_counter()
    state = process_queue(max_concurrent=CAP, work_seconds=120, return_state=True)
    seconds = time.perf_counter() - begin
    assert ContainerJob.objects.filter(status=Status.COMPLETED).count() == JOBS, state
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        return JOBS / seconds, len(client.read_task_runs(flow_run_filter=chosen))
