"""Many machines, and what the tests of faults do with them again and again."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from django.db import connections
from django.utils.timezone import now

from container_manager.engine import Engine
from container_manager.models import ContainerJob, DockerHost
from container_manager.queue import QueueManager
from container_manager.shutdown import ShutdownEvent
from container_manager.types import EngineAddress, LoopStats

from .engine import PATIENCE, FakeEngine


@dataclass
class Fleet:
    """Makes the engines' clients by address: `QueueManager(fleet)`. An engine is made for each new address."""

    engines: dict[str, FakeEngine] = field(default_factory=dict)
    #: seconds that a call waits for its answer, in place of the setting.
    timeout: float = PATIENCE

    def __call__(self, address: EngineAddress, timeout: float) -> Engine:
        return self.at(address.base_url).client(min(timeout, self.timeout))

    def at(self, base_url: str) -> FakeEngine:
        return self.engines.setdefault(base_url, FakeEngine(f"engine-{len(self.engines) + 1}"))

    def check(self) -> None:
        """What must hold after every test, whatever it did."""
        for engine in self.engines.values():
            assert engine.forbidden_calls() == []
            assert engine.started_twice() == []

    def add_host(self, name: str = "local", **fields: object) -> FakeEngine:
        host = DockerHost.objects.create(name=name, base_url=f"unix:///{name}.sock", **fields)
        return self.at(host.base_url)


def watched_fleet() -> Iterator[Fleet]:
    """A fixture's body: no host yet; at the end what always holds is checked."""
    fleet = Fleet()
    yield fleet
    for engine in fleet.engines.values():
        engine.thaw()
    fleet.check()


# What the tests of faults do again and again.


def queued(manager: QueueManager, **fields: Any) -> ContainerJob:
    return manager.queue_job(ContainerJob.objects.create_job(**{"image": "busybox", "command": ["run"]} | fields))


def launched(manager: QueueManager, **fields: Any) -> ContainerJob:
    job = queued(manager, **fields)
    assert manager.launch_next_batch(1000).job_ids == (job.pk,)
    job.refresh_from_db()
    return job


def one_round(manager: QueueManager) -> LoopStats:
    return manager.process_queue_continuous(1000, 1, work_seconds=0)


def row(job: ContainerJob) -> ContainerJob:
    return ContainerJob.objects.get(pk=job.pk)


def let_leases_end() -> None:
    ContainerJob.objects.filter(claimed_until__isnull=False).update(claimed_until=now() - timedelta(seconds=1))


@contextmanager
def in_background(call: Callable[[ShutdownEvent], Any]) -> Iterator[Future[Any]]:
    """`call` in a thread, with a database connection of its own; it is told to stop at the end of the block."""
    stop = threading.Event()
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(call(stop))
        except BaseException as e:  # noqa: BLE001 (the test raises it)
            done.set_exception(e)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    done.result()
