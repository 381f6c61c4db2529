"""To wait for one job: what it writes as it writes it, and how it ended."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pydantic
from django.core.exceptions import ValidationError

from . import secret_values
from .conf import get_settings
from .engine import Stream
from .exceptions import ContainerManagerError, EngineError
from .following import LiveLog, LogLine, Tell
from .models import ALIVE, ENDED, ContainerJob, DockerHost, JobAttempt, Status
from .policy import describe
from .queue import QueueManager, queue_manager
from .types import JobResult, JobSpec, RunSpec, describe_problems

logger = logging.getLogger(__name__)

#: characters of each stream in a result.
TAIL_LENGTH = 2000


class JobRefused(ContainerManagerError):
    """The job is not allowed, or not well-formed."""


class JobDeleted(ContainerManagerError):
    """The job's row was deleted while it was waited for."""


class JobFailed(ContainerManagerError):
    """The job ended as failed; `result` says all that is known of it."""

    def __init__(self, result: JobResult) -> None:
        super().__init__(describe_result(result))
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        # The way to a result storage; by default the message would be handed to `__init__`.
        return type(self), (self.result,)


class JobCancelled(JobFailed):
    """The job was cancelled; `result` says all that is known of it."""


def describe_result(result: JobResult) -> str:
    """One sentence."""
    where = f" on host {result.host}" if result.host else ""
    what = f": {result.error}" if result.error else ""
    return f"job {result.job_id} {result.status}{where}{what}"


def queue_spec(spec: RunSpec | dict[str, Any], *, flow_run_id: str | None = None, created_by: str = "") -> ContainerJob:
    """Queue a job for this spec. Raises `JobRefused`: one line, with each field and what is wrong with it."""
    spec = _read(spec)
    try:
        host = _host(spec.host)
        fields = {name: getattr(spec, name) for name in JobSpec.model_fields}
        job = ContainerJob.objects.build(pinned_host=host, created_by=created_by[:150], **fields)
        job.flow_run_id = flow_run_id
        return queue_manager.queue_job(job)
    except ValidationError as e:
        raise JobRefused(f"the job is refused: {describe(e)}") from e


def retry_for(job: ContainerJob, flow_run_id: str) -> None:
    """Run an ended job anew for the flow run. Raises `JobRefused`: what is allowed may have changed."""
    try:
        queue_manager.retry_job(job, flow_run_id=flow_run_id)
    except ValidationError as e:
        raise JobRefused(f"the job is refused: {describe(e)}") from e


def _read(spec: RunSpec | dict[str, Any]) -> RunSpec:
    try:
        return RunSpec.model_validate(spec)
    except pydantic.ValidationError as e:
        raise JobRefused(f"the job is refused: {'; '.join(describe_problems(e, RunSpec))}") from e


def _host(name: str) -> DockerHost | None:
    if not name:
        return None
    host = DockerHost.objects.filter(name=name).first()
    if host is None:
        known = ", ".join(DockerHost.objects.values_list("name", flat=True)) or "none"
        raise ValidationError({"host": f"{name}: no such host; there are: {known}"})
    return host


class JobWatch:
    """One job as its waiter sees it. To be used in one thread."""

    def __init__(self, job: ContainerJob, tell: Tell, *, queue: QueueManager = queue_manager) -> None:
        """`tell` takes what the container writes, in a thread of its own."""
        self.job = job
        self._queue = queue
        self._tell = tell
        self._seen: tuple[object, ...] = ()
        self._live: LiveLog | None = None
        #: Attempts up to this one have been told; those before it begins are of no interest any more.
        self._told = job.attempt - 1 if job.status in (*ALIVE, *ENDED) else job.attempt

    def has_ended(self) -> bool:
        """One query by key as long as nothing changes. Raises `JobDeleted`."""
        job = self.job
        try:
            job.refresh_from_db(fields=["status", "attempt", "container_id", "slot_host", "last_error"])
        except ContainerJob.DoesNotExist as e:
            raise JobDeleted(f"job {job.pk} was deleted") from e
        seen = (job.status, job.attempt)
        if seen != self._seen:
            self._seen = seen
            self._tell_ended()
            self._log_status()
            if job.status == Status.RUNNING:
                self._follow()
        return job.status in ENDED

    def close(self) -> None:
        """Stop following, whatever the job does; what is left is told."""
        if self._live is not None:
            self._live.finish(None)
            self._live = None

    def result(self) -> JobResult:
        """As it is now."""
        job = self.job
        job.refresh_from_db()
        attempt = JobAttempt.objects.filter(job=job, number=job.attempt).first() or JobAttempt(
            host_name=job.slot_host.name if job.slot_host else ""
        )
        return JobResult(
            job_id=job.pk,
            name=job.name,
            status=job.status,
            reason=job.reason,
            exit_code=job.exit_code,
            oom_killed=job.oom_killed,
            error=job.last_error,
            attempt=job.attempt,
            host=attempt.host_name,
            queued_at=job.queued_at,
            launched_at=job.launched_at,
            finished_at=job.finished_at,
            stdout_tail=attempt.stdout[-TAIL_LENGTH:],
            stderr_tail=attempt.stderr[-TAIL_LENGTH:],
        )

    def _log_status(self) -> None:
        job = self.job
        where = f" on host {job.slot_host.name}" if job.slot_host else ""
        why = f": {job.last_error}" if job.last_error else ""
        logger.info("job %s is %s%s%s", job.pk, job.status, where, why, extra={"job": job.pk, "attempt": job.attempt})

    def _follow(self) -> None:
        host = self.job.slot_host
        engine = self._queue.engine_of(host) if host is not None else None
        self.close()
        if engine is None:
            return
        container_id, tell = self.job.container_id or "", self._tell
        if self.job.secret_environment:
            try:
                secrets = secret_values.given(self.job.secret_environment, engine.inspect(container_id))
            except EngineError:
                # What it writes is told once it is stored.
                return
            tell = partial(_tell_masked, tell, secrets)
        self._live = LiveLog(tell)
        self._live.follow(engine, container_id)

    def _tell_ended(self) -> None:
        """What was written before it could be followed, and what of it was not told yet."""
        for attempt in JobAttempt.objects.filter(job=self.job, number__gt=self._told).order_by("number"):
            # Stars for secrets have changed the stored streams' length: what was followed can't be compared to them.
            is_comparable = self._live is None or not self.job.secret_environment
            live, self._live = self._live or LiveLog(self._tell), None
            live.finish(_stored(attempt) if is_comparable else None)
            self._told = attempt.number
            if attempt.error:
                logger.info("job %s: attempt %s: %s", self.job.pk, attempt.number, attempt.error)


def _tell_masked(tell: Tell, secrets: Mapping[str, str], lines: Sequence[LogLine]) -> bool:
    return tell([line._replace(text=secret_values.masked(line.text, secrets)) for line in lines])


def _stored(attempt: JobAttempt) -> dict[Stream, str] | None:
    """Both streams as they were, or None where something is missing in their midst."""
    settings = get_settings()
    kept = settings.LOG_HEAD_BYTES + settings.LOG_TAIL_BYTES
    stored: dict[Stream, str] = {"stdout": attempt.stdout, "stderr": attempt.stderr}
    return stored if all(len(text.encode()) <= kept for text in stored.values()) else None
