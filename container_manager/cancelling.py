"""To cancel: at once what does not run, by the next pass what does; by a person, or with the flow run that waits."""

import logging
from collections.abc import Callable
from contextlib import suppress

from django.db.models.functions import Coalesce, Now

from .exceptions import DatabaseBusy, InvalidTransition
from .models import ALIVE, ContainerJob, Reason, Status
from .transitions import move

logger = logging.getLogger(__name__)

#: Times that a cancellation runs after a job that moves.
_TRIES = 20

#: Those of the flow runs (ids) that were cancelled; none if nobody can say.
CancelledRuns = Callable[[set[str]], set[str]]


def cancel(job: ContainerJob) -> Status:
    """The status after the call; an alive job is stopped by the next pass.

    Raises `InvalidTransition` if it has ended.
    """
    for _ in range(_TRIES):
        job.refresh_from_db()
        if job.status not in ALIVE:
            if move(job, Status.CANCELLED, reason=Reason.CANCELLED, last_error="cancelled before it started"):
                return Status.CANCELLED
            continue
        asked = ContainerJob.objects.filter(pk=job.pk, status__in=ALIVE).update(
            cancel_requested_at=Coalesce("cancel_requested_at", Now()), updated_at=Now()
        )
        if asked:
            job.refresh_from_db()
            return Status(job.status)
    raise DatabaseBusy(f"job {job.pk} moved too often to be cancelled: try again")


def cancel_with_runs(cancelled_runs: CancelledRuns) -> None:
    """Cancel the jobs whose flow runs were, whatever became of the processes that waited for them."""
    awaited = ContainerJob.objects.awaited().filter(cancel_requested_at__isnull=True)
    run_ids = set(awaited.order_by().values_list("flow_run_id", flat=True).distinct())
    cancelled = cancelled_runs(run_ids) if run_ids else set()
    if not cancelled:
        return
    for job in awaited.filter(flow_run_id__in=cancelled).order_by("pk"):
        # One that has just ended, or is deleted, needs nothing; the next round looks again.
        with suppress(InvalidTransition, DatabaseBusy, ContainerJob.DoesNotExist):
            status = cancel(job)
            logger.info("job %s: cancelled with its flow run; it is %s", job.pk, status, extra={"job": job.pk})
