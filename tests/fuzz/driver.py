"""One run: jobs are queued, workers die and stall over them, and what is left is held against what must be."""

import multiprocessing
import os
import random
import time

import docker
from django.db import connection

from container_manager.models import ENDED, ContainerJob, DockerHost, Installation, JobAttempt
from container_manager.queue import queue_manager

from . import worker, workload
from .cancelling import Cancellation
from .faults import LONGEST_STALL_SECONDS, tally
from .verdict import Seen, Verdict, judge
from .watching import containers, remove_leftovers, watching

#: seconds; a worker that was told to end has at most a stall and a round before it.
_END_SECONDS = 30
_TICK_SECONDS = 0.1
#: seconds; for how long nothing may be left to do before the run is over. Who stalls wakes within them, and may create
#: a container that the others must collect.
_SETTLED_SECONDS = LONGEST_STALL_SECONDS + 2

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.fuzz.nursery"])


class Workers:
    """So many at a time, whatever becomes of each."""

    def __init__(self, plan: worker.Plan, count: int) -> None:
        self._plan = plan
        self._lives = [0] * count
        #: What the workers said that ended by themselves, which none may.
        self.crashes: list[str] = []
        plan.go.touch()
        self._alive = [self._begin(number) for number in range(count)]

    def _begin(self, number: int) -> multiprocessing.process.BaseProcess:
        self._lives[number] += 1
        arguments = (self._plan, number, self._lives[number])
        process = _processes.Process(target=worker.run, args=arguments, daemon=True)
        process.start()
        return process

    def renew(self) -> None:
        for number, process in enumerate(self._alive):
            if process.exitcode is not None:
                self._note(number, process)
                self._alive[number] = self._begin(number)

    def end(self) -> None:
        self._plan.go.unlink()
        until = time.monotonic() + _END_SECONDS
        for number, process in enumerate(self._alive):
            process.join(max(0.0, until - time.monotonic()))
            if process.exitcode is None:
                self.crashes.append(f"worker {number} did not end within {_END_SECONDS} s")
                process.kill()
            self._note(number, process)

    def _note(self, number: int, process: multiprocessing.process.BaseProcess) -> None:
        if process.exitcode and process.exitcode > 0:
            output = self._plan.folder / f"{number}-{self._lives[number]}.output"
            self.crashes.append(f"worker {number} ended with {process.exitcode}: {output.read_text()[-2000:]}")


def run(plan: worker.Plan, count: int, workers: int, deadline_seconds: float) -> Verdict:
    """On the default database, which is emptied, and the Engine of this machine."""
    for model in (JobAttempt, ContainerJob, DockerHost, Installation):
        model.objects.all().delete()
    plan.folder.mkdir()
    draw = random.Random(plan.seed)
    client = docker.from_env(timeout=60)
    address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    DockerHost.objects.create(name="local", base_url=address, max_concurrent_jobs=2 * plan.cap)
    instance_id = Installation.load().instance_id
    began = time.monotonic()
    with watching(client, instance_id) as (events, samples):
        jobs = queue_manager.queue_jobs(workload.build(count, draw))
        cancellation = Cancellation(draw)
        cancellation.add(jobs)
        crew = Workers(plan, workers)
        try:
            now = unsettled_at = began
            while now - unsettled_at < _SETTLED_SECONDS and now - began < deadline_seconds:
                crew.renew()
                cancellation.go_on()
                time.sleep(_TICK_SECONDS)
                now = time.monotonic()
                if not _is_settled(client, instance_id):
                    unsettled_at = now
            seconds = unsettled_at - began
        finally:
            crew.end()
            leftovers = remove_leftovers(client, instance_id)
        # The stream lags what it tells of.
        until = time.monotonic() + 5
        while events.ends < sum(events.starts.values()) and time.monotonic() < until:
            time.sleep(_TICK_SECONDS)
    faults = tally(plan.folder.glob("*.points"))
    return judge(plan, connection.vendor, Seen(events, samples, faults, leftovers, crew.crashes, seconds))


def _is_settled(client: docker.DockerClient, instance_id: str) -> bool:
    return not ContainerJob.objects.exclude(status__in=ENDED).exists() and not containers(client, instance_id)
