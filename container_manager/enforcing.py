"""Deadlines and cancellation: TERM, and KILL after the grace. Never a call that blocks until a program ends."""

import logging
from functools import partial

from django.db.models.functions import Now

from .conf import get_settings
from .exceptions import ContainerGone, ContainerNotRunning, EngineError
from .hosts import HostConnection
from .models import ContainerJob, Reason, Status
from .observing import ObservedJob, View
from .steps import Steps, drive
from .transitions import amend, from_now

logger = logging.getLogger(__name__)


def enforce(view: View) -> list[int]:
    """Stop what runs past its deadline or is cancelled; the ids of the jobs that were sent a signal."""
    procedures = []
    for job, host in view.jobs():
        container = host.containers.get(job.row.container_id or "")
        if job.row.status != Status.RUNNING or container is None or container.has_ended:
            continue
        steps = _stop(job, host.connection)
        if steps is not None:
            procedures.append((steps, host.connection))
    return [job_id for job_id in drive(procedures) if job_id is not None]


def _stop(observed: ObservedJob, connection: HostConnection) -> Steps[int | None] | None:
    job = observed.row
    if job.stop_requested_at is not None:
        return _kill(job, connection) if observed.is_past_grace else None
    if job.cancel_requested_at is not None:
        return _terminate(job, connection, Reason.CANCELLED)
    return _terminate(job, connection, Reason.TIMEOUT) if observed.is_past_deadline else None


def _terminate(job: ContainerJob, connection: HostConnection, reason: Reason) -> Steps[int | None]:
    # The note first: a container that ends by our signal must never look as if it had ended by itself.
    if not amend(job, if_null="stop_requested_at", stop_requested_at=Now(), stop_reason=reason):
        return None
    try:
        yield partial(connection.engine.signal, job.container_id or "", "SIGTERM")
    except (ContainerNotRunning, ContainerGone):
        # It ended by itself before the signal, and its own exit code counts; unless the signal comes so late
        # that another pass may have killed it by then.
        if not _is_grace_over(job):
            amend(job, stop_requested_at=None, stop_reason="")
        return None
    except EngineError as e:
        _note(job, connection, e)
        return None
    logger.info("%s: told to stop (%s)", job.on(connection.host), reason, extra=job.log_extra(connection.host))
    return job.pk


def _is_grace_over(job: ContainerJob) -> bool:
    noted_before = from_now(-get_settings().STOP_GRACE_SECONDS)
    return bool(ContainerJob.objects.filter(pk=job.pk, stop_requested_at__lt=noted_before).exists())


def _kill(job: ContainerJob, connection: HostConnection) -> Steps[int | None]:
    try:
        yield partial(connection.engine.signal, job.container_id or "", "SIGKILL")
    except (ContainerNotRunning, ContainerGone):
        return None
    except EngineError as e:
        _note(job, connection, e)
        return None
    return job.pk


def _note(job: ContainerJob, connection: HostConnection, error: EngineError) -> None:
    """The signal is repeated by a later pass: as KILL, once the grace is over."""
    logger.warning("%s: not stopped yet: %s", job.on(connection.host), error, extra=job.log_extra(connection.host))
