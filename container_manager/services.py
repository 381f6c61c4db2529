"""One job at a time, for the command's legacy mode and for people."""

from typing import Literal

from django.core.exceptions import ValidationError
from django.db.models import Q
from django.db.models.functions import Now

from .exceptions import ContainerManagerError
from .models import ALIVE, LEASED, ContainerJob, ContainerJobQuerySet, Status
from .policy import describe
from .queue import QueueManager, queue_manager
from .types import ProcessResult

#: What people name a group of jobs by.
StatusGroup = Literal["pending", "running", "failed"]

_IN_GROUP: dict[StatusGroup, Q] = {
    # What waits for nothing but a slot.
    "pending": Q(status__in=(Status.PENDING, Status.QUEUED)) | Q(status=Status.SCHEDULED, scheduled_for__lte=Now()),
    "running": Q(slot_host__isnull=False),
    "failed": Q(status=Status.FAILED),
}


class JobService:
    def __init__(self, queue: QueueManager) -> None:
        self._queue = queue

    def select(self, *, job_id: int | None = None, status: StatusGroup | None = None) -> ContainerJobQuerySet:
        """The jobs that are meant, in the order of their ids; without arguments those that are alive."""
        jobs: ContainerJobQuerySet = ContainerJob.objects.order_by("pk")
        if job_id is not None:
            jobs = jobs.filter(pk=job_id)
        if status is not None or job_id is None:
            jobs = jobs.filter(_IN_GROUP[status or "running"])
        return jobs

    def process_job(
        self, job: ContainerJob, *, max_concurrent: int = 5, timeout: float = 30, always_retry: bool = False
    ) -> ProcessResult:
        """Do for one job what its status asks for; never raises for what is wrong with the job.

        `success` means that the work on the job was done, whatever the job's own exit code. A failed job is
        queued again while retries are left, or whatever they are with `always_retry`.
        """
        job.refresh_from_db()
        try:
            message = self._process(job, max_concurrent, timeout, always_retry)
        except ValidationError as e:
            return ProcessResult(success=False, error=describe(e))
        except ContainerManagerError as e:
            return ProcessResult(success=False, error=str(e))
        return ProcessResult(success=True, message=message)

    def _process(self, job: ContainerJob, max_concurrent: int, timeout: float, always_retry: bool) -> str:
        match Status(job.status):
            case Status.COMPLETED | Status.CANCELLED:
                return f"nothing to do: it is {job.status}"
            case Status.FAILED:
                if not always_retry and job.retry_count >= job.max_retries:
                    raise ContainerManagerError(f"no retries left; process it with --job-id {job.pk} to run it anew")
                self._queue.retry_job(job, is_charged=not always_retry)
            case Status.PENDING:
                self._queue.queue_job(job)
            case Status.SCHEDULED if not _is_due(job):
                return f"left: it is scheduled for {job.scheduled_for:%Y-%m-%d %H:%M:%S %Z}"
            case status if status in ALIVE:
                return self._look_after(job)
        return self._launch(job, max_concurrent, timeout)

    def _launch(self, job: ContainerJob, max_concurrent: int, timeout: float) -> str:
        batch = self._queue.launch_next_batch(max_concurrent, timeout, only=[job.pk])
        if batch.errors:
            raise ContainerManagerError(batch.errors[0].error)
        if batch.launched:
            return "launched"
        job.refresh_from_db()
        return f"stays {job.status}: {batch.limit or job.last_error or 'another worker is at it'}"

    def _look_after(self, job: ContainerJob) -> str:
        ended = self._queue.look_after(job)
        if ended:
            return f"harvested: {ended[0].status} ({ended[0].reason})"
        was = job.status
        job.refresh_from_db()
        if was in LEASED and job.status == was:
            return f"left: its launcher ({job.claimed_by}) is at it"
        return f"is {job.status}"


def _is_due(job: ContainerJob) -> bool:
    return bool(ContainerJob.objects.due().filter(pk=job.pk).exists())


job_service = JobService(queue_manager)
