"""Somebody who cancels jobs, at all moments of their lives."""

import random
from collections.abc import Iterable
from contextlib import suppress

from container_manager.exceptions import InvalidTransition
from container_manager.models import ENDED, ContainerJob, Status
from container_manager.queue import queue_manager

from . import workload

#: In which state a job is cancelled; one that moved past it while nobody looked, in a later one.
_CANCELLED_IN = (Status.QUEUED, Status.LAUNCHING, Status.STARTING, Status.RUNNING)


class Cancellation:
    """The jobs that are cancelled, each when it is first seen in the state that was drawn for it, or past that."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._waiting: dict[int, int] = {}

    def add(self, jobs: Iterable[ContainerJob]) -> None:
        """Those of them whose kind is cancelled."""
        chosen = [job.pk for job in jobs if workload.kind_of(job).is_cancelled]
        self._waiting |= {job_id: self._draw.randrange(len(_CANCELLED_IN)) for job_id in chosen}

    def go_on(self) -> None:
        for job in ContainerJob.objects.filter(pk__in=self._waiting):
            rank = _CANCELLED_IN.index(Status(job.status)) if job.status in _CANCELLED_IN else -1
            if rank >= self._waiting[job.pk] or job.status in ENDED:
                del self._waiting[job.pk]
                with suppress(InvalidTransition):
                    queue_manager.cancel_job(job)
