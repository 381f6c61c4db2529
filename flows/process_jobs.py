"""Single jobs, one after the other: the older command's way to process them."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import logging
from typing import Annotated

from django.db.utils import Error as DatabaseError
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Failed
from pydantic import Field

from container_manager import shutdown
from container_manager.models import ContainerJob
from container_manager.queue import queue_manager
from container_manager.services import StatusGroup, job_service
from container_manager.types import ProcessedJob, ProcessReport

from . import identity, limits
from .api import without_patience
from .naming import jobs_name
from .process_queue import BACKSTOP_SECONDS, MaxConcurrent, Timeout
from .reports import completed, show_links
from .termination import graceful_termination

logger = logging.getLogger("container_manager.flows")

JobId = Annotated[int | None, Field(description="This job alone; a failed one is run anew whatever its retries.")]
Group = Annotated[
    StatusGroup | None,
    Field(description="pending: what waits for a slot; running: what holds one; failed: while retries are left."),
]


@flow(name="process-jobs", flow_run_name=jobs_name, timeout_seconds=BACKSTOP_SECONDS, persist_result=False)
def process_jobs(
    job_id: JobId = None, status: Group = None, max_concurrent: MaxConcurrent = 5, timeout: Timeout = 30
) -> "State[ProcessReport]":
    """Launch, look after or requeue the jobs in the order of their ids. Without arguments: those that are alive."""
    if problem := identity.why_not_ours():
        return Failed(message=problem)
    with graceful_termination(), without_patience():
        limits.refresh()
        done: list[ProcessedJob] = []
        for pk, found in list(job_service.select(job_id=job_id, status=status).values_list("pk", "status")):
            if shutdown.is_stopping():
                break
            done.append(_process(pk, found, max_concurrent, timeout, always_retry=job_id is not None))
        queue_manager.await_pulls()
        show_links([job.job_id for job in done])
    report = ProcessReport(jobs=tuple(done))
    for error in report.errors:
        logger.warning("job %d: %s", error.job_id, error.error, extra={"job": error.job_id})
    return completed(f"processed {report.processed}, errors {len(report.errors)}", report)


def _process(pk: int, found: str, max_concurrent: int, timeout: float, *, always_retry: bool) -> ProcessedJob:
    """One job's error, the database's too, is recorded and does not stop the others."""
    try:
        result = job_service.process_job(
            ContainerJob.objects.get(pk=pk), max_concurrent=max_concurrent, timeout=timeout, always_retry=always_retry
        )
    except (DatabaseError, ContainerJob.DoesNotExist) as e:
        return ProcessedJob(job_id=pk, status=found, success=False, error=str(e), was_raised=True)
    return ProcessedJob(job_id=pk, status=found, success=result.success, error=result.error, message=result.message)


if __name__ == "__main__":
    process_jobs()
