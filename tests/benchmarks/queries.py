"""Statements, whatever the number of jobs: BEGIN and COMMIT are not counted."""

from collections.abc import Callable, Iterator

from django.db import connection
from django.test.utils import CaptureQueriesContext

from container_manager.claiming import claim
from container_manager.models import ContainerJob, DockerHost
from container_manager.queue import QueueManager
from tests.fake_engine import Fleet

from . import rows
from .figures import Figure

#: Twice as many jobs show what each one costs, whatever a call costs once.
FEW, MANY = 8, 16


def measure() -> Iterator[Figure]:
    claims = [_claim(count) for count in (1, 10, 100)]
    yield _figure("statements per claim of 1, 10, 100", claims, 8)
    launch_few, harvest_few = _launch_and_harvest(FEW)
    launch_many, harvest_many = _launch_and_harvest(MANY)
    yield _figure("statements per launch", [(launch_many - launch_few) / (MANY - FEW)], 2)
    yield _figure("statements per harvest", [(harvest_many - harvest_few) / (MANY - FEW)], 2)
    idle = [_idle_pass(beside) for beside in (0, 10, 100)]
    constant = Figure(
        "statements of an idle pass beside 0, 10, 100 running",
        connection.vendor,
        "",
        idle,
        goal="constant",
        is_reached=len(set(idle)) == 1,
    )
    yield constant


def _figure(name: str, counts: list[float], most: int) -> Figure:
    return Figure(name, connection.vendor, "", counts, goal=f"≤ {most}", is_reached=max(counts) <= most)


def _claim(count: int) -> float:
    rows.empty()
    host = DockerHost.objects.create(name="a", max_concurrent_jobs=1000)
    QueueManager(Fleet()).queue_jobs(_jobs(count))
    return _statements(lambda: claim(1000, {host.pk}, limit=count))


def _launch_and_harvest(count: int) -> tuple[float, float]:
    rows.empty()
    fleet = Fleet()
    fleet.add_host(max_concurrent_jobs=1000)
    queue = QueueManager(fleet)
    queue.queue_jobs(_jobs(count))
    launches = _statements(lambda: queue.launch_next_batch(1000))
    return launches, _statements(lambda: queue.process_queue_continuous(1000, 1, work_seconds=0))


def _idle_pass(beside: int) -> float:
    rows.empty()
    fleet = Fleet()
    fleet.add_host(max_concurrent_jobs=1000)
    queue = QueueManager(fleet)
    queue.queue_jobs(_jobs(beside, "run"))
    while beside and queue.launch_next_batch(1000).launched:
        pass
    queue.process_queue_continuous(1000, 1, work_seconds=0)
    return _statements(lambda: queue.process_queue_continuous(1000, 1, work_seconds=0))


def _jobs(count: int, command: str = "true") -> list[ContainerJob]:
    return [ContainerJob.objects.build(image="busybox", command=[command]) for _ in range(count)]


def _statements(call: Callable[[], object]) -> float:
    with CaptureQueriesContext(connection) as queries:
        call()
    frame = ("BEGIN", "COMMIT", "SAVEPOINT", "RELEASE", "PRAGMA", "SELECT set_config")
    return float(sum(not query["sql"].startswith(frame) for query in queries.captured_queries))
