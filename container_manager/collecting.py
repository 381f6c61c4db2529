"""Leftovers: containers of attempts that are over. What does not run is removed, what runs is stopped or reported."""

import logging
from functools import partial
from typing import NamedTuple

from .conf import get_settings
from .containers import container_name
from .exceptions import EngineError
from .hosts import HostConnection
from .models import ALIVE, ContainerJob, JobAttempt, Status
from .observing import View
from .steps import Steps, drive
from .transitions import from_now
from .types import ContainerSummary

logger = logging.getLogger(__name__)

_NOT_RUNNING = ("created", "exited", "dead")


class Leftovers(NamedTuple):
    #: How many were removed.
    removed: int = 0
    #: What a person should look at, a sentence each.
    anomalies: tuple[str, ...] = ()


def collect(view: View, instance_id: str, *, dry_run: bool = False) -> Leftovers:
    """Remove what attempts that are over have left; with `dry_run` only say so."""
    strays = [
        (container, host.connection)
        for host in view.hosts
        for container in _unclaimed(host.containers, host.claimed_ids)
    ]
    if not strays:
        return Leftovers()
    # Read after the lists: a job that was launched meanwhile is known by now.
    job_ids = {container.job_id for container, _ in strays if container.job_id is not None}
    rows = {row.pk: row for row in ContainerJob.objects.filter(pk__in=job_ids)}
    kept = _kept(set(rows))
    removals, kills = [], []
    anomalies = []
    for container, connection in strays:
        row = rows.get(container.job_id or 0)
        if row is None:
            anomalies.append(_says(container, connection, "belongs to no job of this database; left as it is"))
        elif row.status in ALIVE and row.attempt == container.attempt:
            continue
        elif container.name != container_name(instance_id, row.pk, container.attempt or 0):
            anomalies.append(
                _says(container, connection, f"says it is of job {row.pk}, its name does not; left as it is")
            )
        elif container.state in _NOT_RUNNING:
            if container.id not in kept:
                removals.append((_remove(container, connection), connection))
        elif container.id in _known_ids(row, container):
            anomalies.append(_says(container, connection, "ran on after its attempt was over; stopped"))
            kills.append((_kill(container, connection), connection))
        else:
            anomalies.append(_says(container, connection, f"is {container.state}, its attempt is over; left as it is"))
    removed = len(removals) if dry_run else sum(drive([*removals, *kills]))
    return Leftovers(removed, tuple(anomalies))


def _unclaimed(containers: dict[str, ContainerSummary], claimed: set[str]) -> list[ContainerSummary]:
    return [container for container in containers.values() if container.id not in claimed]


def _kept(job_ids: set[int]) -> set[str | None]:
    """Containers of failed jobs that are kept for a look."""
    seconds = get_settings().KEEP_FAILED_CONTAINERS_SECONDS
    if not seconds:
        return set()
    rows = ContainerJob.objects.filter(pk__in=job_ids, status=Status.FAILED, finished_at__gt=from_now(-seconds))
    return set(rows.order_by().values_list("container_id", flat=True))


def _remove(container: ContainerSummary, connection: HostConnection) -> Steps[bool]:
    """Whether it was removed."""
    try:
        yield partial(connection.engine.remove, container.id)
    except EngineError as e:
        # A later pass tries again.
        logger.info("container %s: not removed yet: %s", container.name, e)
        return False
    return True


def _known_ids(row: ContainerJob, container: ContainerSummary) -> set[str]:
    """The container that the attempt had, by its record: a name and labels can be forged, an id can't."""
    attempts = JobAttempt.objects.filter(job=row, number=container.attempt or 0)
    return set(attempts.values_list("container_id", flat=True))


def _kill(container: ContainerSummary, connection: HostConnection) -> Steps[bool]:
    """Without a grace: what it was to do is over, and may be done again elsewhere. False: it is not removed yet."""
    try:
        yield partial(connection.engine.signal, container.id, "SIGKILL")
    except EngineError as e:
        logger.info("container %s: not stopped yet: %s", container.name, e)
    return False


def _says(container: ContainerSummary, connection: HostConnection, what: str) -> str:
    return f"host {connection.host.name}: container {container.name} {what}"
