"""What a dead or stalled launcher left: taken over once its lease is over, and never started by anyone else."""

import logging
from collections.abc import Collection
from functools import partial
from typing import Any

from django.db.models.functions import Now

from .attempts import GONE, AttemptRecord, discard_unstarted, end_attempt, end_lost, hand_back
from .conf import get_settings
from .containers import NOT_EXECUTABLE
from .exceptions import ContainerGone, EngineError, LeaseExpired
from .hosts import HostConnection
from .leases import Lease, holder
from .models import LEASED, ContainerJob, DockerHost, Reason, Status
from .observing import View
from .steps import Steps, drive
from .transitions import amend, from_now, move
from .types import Observation

logger = logging.getLogger(__name__)

_DIED = "its launcher stopped before the container was started"


def recover(view: View) -> list[int]:
    """Bring every job whose lease is over to where it belongs; the ids of those that moved."""
    recovered = _hand_back_launching(view.chosen)
    procedures = []
    for job, host in view.jobs():
        if job.row.status in (Status.STARTING, Status.RECOVERING) and job.is_lease_over:
            lease = _take_over(job.row)
            if lease is not None:
                procedures.append((_recover(job.row, host.connection, lease), host.connection))
    recovered += [job_id for job_id in drive(procedures) if job_id is not None]
    return recovered


def _hand_back_launching(chosen: Collection[int] | None) -> list[int]:
    """Jobs without a container need no Engine for it, and must not wait for one that is down.

    A container that was created all the same is of an attempt that is over, and is collected as such.
    """
    jobs = ContainerJob.objects.filter(status=Status.LAUNCHING).lease_over().select_related("slot_host").order_by("pk")
    if chosen is not None:
        jobs = jobs.filter(pk__in=chosen)
    handed_back = []
    for job in jobs:
        host = job.slot_host
        if _take_over(job) and hand_back(job, host, _DIED):
            handed_back.append(_told(job, host))
    return handed_back


def end_with_host(job: ContainerJob, host: DockerHost) -> Status | None:
    """End an alive job of a host that will not come back; what became of it."""
    error = f"host {host.name} was declared lost"
    if job.status in LEASED:
        _take_over(job)
        if job.status == Status.LAUNCHING:
            return hand_back(job, host, error, is_counted=False)
    return end_lost(job, host, error)


def _take_over(job: ContainerJob) -> Lease | None:
    """A new token, so that the former holder loses every compare-and-set; None if another was first."""
    seconds = get_settings().LEASE_SECONDS
    lease = Lease.begin(seconds)
    taken = amend(job, claim_token=lease.token, claimed_by=holder(), claimed_until=from_now(seconds))
    return lease if taken else None


def _recover(job: ContainerJob, connection: HostConnection, lease: Lease) -> Steps[int | None]:
    host, engine = connection.host, connection.engine
    container_id = job.container_id or ""
    try:
        seen: Observation | None = yield partial(engine.inspect, container_id)
    except ContainerGone:
        seen = None
    except EngineError as e:
        _postpone(job, host, e)
        return None
    if seen is not None and seen.has_run:
        return _adopt(job, host)
    if job.status == Status.STARTING:
        if seen is None:
            return _id_if(job, host, end_lost(job, host, GONE))
        if seen.exit_code in NOT_EXECUTABLE:
            record = AttemptRecord(Reason.LAUNCH, seen.error or "its command can't be executed", seen)
            return _id_if(job, host, end_attempt(job, Status.FAILED, host, record))
        # The note before the removal: whoever recovers this row next knows that we removed it.
        if not move(job, Status.RECOVERING):
            return None
    try:
        ran = yield from discard_unstarted(engine, container_id, lease.guard)
    except (EngineError, LeaseExpired) as e:
        _postpone(job, host, e)
        return None
    return _adopt(job, host) if ran is not None else _id_if(job, host, hand_back(job, host, _DIED))


def _adopt(job: ContainerJob, host: DockerHost) -> int | None:
    """It runs, or ran: the next harvest takes it from here. Its deadline counts from when it was to start."""
    return _id_if(job, host, move(job, Status.RUNNING, launched_at=Now(), launch_tries=0, last_error=""))


def _postpone(job: ContainerJob, host: DockerHost, error: Exception) -> None:
    """Leave it to a later pass, which finds this lease over."""
    logger.warning("%s: not recovered yet: %s", job.on(host), error, extra=job.log_extra(host))


def _id_if(job: ContainerJob, host: DockerHost, moved: Any) -> int | None:
    return _told(job, host) if moved else None


def _told(job: ContainerJob, host: DockerHost | None) -> int:
    logger.warning("%s: recovered", job.on(host), extra=job.log_extra(host))
    return job.pk
