"""Launches per second, beside docker-py with as many threads."""

import time
from collections.abc import Iterator

from django.db import connection

from container_manager.conf import get_settings
from container_manager.models import ContainerJob, DockerHost
from container_manager.queue import QueueManager

from . import raw, rows
from .figures import Figure, repeats

JOBS, RUNS = 40, 3
#: jobs/s of others, measured once on two shared cores on which docker-py did `THERE` with four threads: 12 no-op
#: containers through a work pool with limit 4, and the queue that this one descends from. What they would do here is
#: taken to scale with docker-py.
OTHERS = (("Prefect's Docker worker", 0.12, 50.0), ("the previous implementation", 3.05, 1.0))
THERE = 8.5


def measure() -> Iterator[Figure]:
    threads = get_settings().LAUNCH_THREADS
    ours, reference = [], []
    # In pairs, so that what slows the machine for a while slows both.
    for _ in range(repeats(RUNS)):
        reference.append(raw.launch(JOBS, threads))
        ours.append(_launch())
    figure = Figure(
        f"launch of `true`, {threads} threads", connection.vendor, "jobs/s", ours, reference, "raw docker-py", "≥ 0.9"
    )
    yield figure.judged((figure.ratio or 0) >= 0.9)
    for name, rate, goal in OTHERS:
        scaled = [rate * raw_rate / THERE for raw_rate in reference]
        beside = Figure(f"… beside {name}", connection.vendor, "jobs/s", ours, scaled, "scaled", f"≥ {goal:g}")
        yield beside.judged((beside.ratio or 0) >= goal)


def _launch() -> float:
    rows.empty()
    DockerHost.objects.create(name="a", max_concurrent_jobs=JOBS)
    queue = QueueManager()
    queue.queue_jobs([ContainerJob.objects.build(image=raw.IMAGE, command=["true"]) for _ in range(JOBS)])
    begin, launched = time.perf_counter(), 0
    while launched < JOBS:
        # Each for five seconds at most.
        batch = queue.launch_next_batch(JOBS)
        assert batch.launched, batch
        launched += batch.launched
    seconds = time.perf_counter() - begin
    queue.process_queue_continuous(JOBS, 1, work_seconds=60)
    return JOBS / seconds
