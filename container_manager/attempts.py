"""How an attempt ends: the row moves on, and what happened is written down beside it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .conf import get_settings
from .engine import Engine
from .exceptions import ContainerGone, ContainerRunning
from .locks import bounded_transaction
from .models import ContainerJob, DockerHost, JobAttempt, Reason, Status
from .retry import RetryPolicy
from .steps import Call, Steps
from .transitions import from_now, move
from .types import Observation

#: Claims in a row that a job may be handed back uncharged; then each costs a retry, so that a job that
#: kills whoever launches it comes to an end.
MAX_LAUNCH_TRIES = 5

#: Why a job is lost.
GONE = "its container is gone: somebody removed it, or the Engine lost it"

#: Puts a check of the lease right before a call.
Guard = Callable[[Call], Call]


@dataclass(frozen=True)
class AttemptRecord:
    """What is known of an attempt when it ends. `error` is a sentence for people, without secrets."""

    reason: Reason
    error: str = ""
    observation: Observation | None = None
    stdout: str = ""
    stderr: str = ""


def end_attempt(job: ContainerJob, to: Status, host: DockerHost, record: AttemptRecord, **fields: Any) -> bool:
    """Move the job and write its attempt, both or neither. False: the row belongs to another by now.

    `fields` are those of `transitions.move`.
    """
    seen = record.observation
    attempt = JobAttempt(
        job=job,
        number=job.attempt,
        host=host,
        host_name=host.name,
        container_id=job.container_id or (seen.container_id if seen else ""),
        image_digest=seen.image_digest if seen else "",
        flow_run_id=job.flow_run_id or "",
        started_at=seen.started_at if seen else None,
        finished_at=seen.finished_at if seen else None,
        exit_code=seen.exit_code if seen else None,
        oom_killed=seen.oom_killed if seen else False,
        reason=record.reason,
        error=record.error,
        stdout=record.stdout,
        stderr=record.stderr,
    )
    outcome: dict[str, Any] = {"last_error": record.error}
    if to != Status.SCHEDULED:
        outcome |= {"reason": record.reason, "exit_code": attempt.exit_code, "oom_killed": attempt.oom_killed}
    with bounded_transaction():
        if not move(job, to, **outcome | fields):
            return False
        attempt.save(force_insert=True)
    return True


def retry_or_fail(job: ContainerJob, host: DockerHost, record: AttemptRecord) -> Status | None:
    """Charge a try, or end the job if it was cancelled meanwhile; None: it lost the row."""
    return charge(job, host, record) or cancel_if_asked(job, host, record)


def charge(job: ContainerJob, host: DockerHost, record: AttemptRecord, **fields: Any) -> Status | None:
    """`scheduled` with backoff while retries are left, else `failed`; None: it lost the row.

    `fields` are those of `transitions.move`.
    """
    if job.retry_count >= job.max_retries:
        return Status.FAILED if end_attempt(job, Status.FAILED, host, record, **fields) else None
    settings = get_settings()
    policy = RetryPolicy(settings.RETRY_BASE_SECONDS, settings.RETRY_MAX_SECONDS)
    is_scheduled = end_attempt(
        job,
        Status.SCHEDULED,
        host,
        record,
        scheduled_for=from_now(policy.delay_seconds(job.retry_count)),
        retry_count=job.retry_count + 1,
        launch_tries=0,
        pulled_host=None,
        pull_error="",
        **fields,
    )
    return Status.SCHEDULED if is_scheduled else None


def hand_back(
    job: ContainerJob, host: DockerHost, why: str, *, is_counted: bool = True, hold_seconds: float | None = None
) -> Status | None:
    """Give an unstarted job back to the queue, uncharged; with `hold_seconds` to `scheduled`, held by its token.

    Counted ones come to an end after MAX_LAUNCH_TRIES. None: it lost the row.
    """
    tries = job.launch_tries + is_counted
    if tries > MAX_LAUNCH_TRIES:
        error = f"{why}; launched {MAX_LAUNCH_TRIES} times in a row without a start"
        return retry_or_fail(job, host, AttemptRecord(Reason.LAUNCH, error))
    fields: dict[str, Any] = {"launch_tries": tries, "last_error": why}
    to = Status.QUEUED
    if hold_seconds is not None:
        to = Status.SCHEDULED
        # The token stays until anything else moves the row, so that only its holder may shorten the wait.
        fields |= {"scheduled_for": from_now(hold_seconds), "claim_token": job.claim_token}
    return to if move(job, to, **fields) else cancel_if_asked(job, host)


def end_lost(job: ContainerJob, host: DockerHost, error: str) -> Status | None:
    """End a job whose container is gone, as it wishes; None: it lost the row."""
    if job.cancel_requested_at is None and not job.rerun_on_lost:
        return Status.FAILED if end_attempt(job, Status.FAILED, host, AttemptRecord(Reason.LOST, error)) else None
    if job.status == Status.STARTING and not move(job, Status.RECOVERING):
        return None
    if job.cancel_requested_at is None:
        return retry_or_fail(job, host, AttemptRecord(Reason.LOST, error))
    record = AttemptRecord(Reason.CANCELLED, f"cancelled; {error}")
    return Status.CANCELLED if end_attempt(job, Status.CANCELLED, host, record) else None


def cancel_if_asked(job: ContainerJob, host: DockerHost, record: AttemptRecord | None = None) -> Status | None:
    """After a lost move: end the job as cancelled if that is why it lost. Its container must be gone or ended.

    `record`: what would have been written had it not been cancelled.
    """
    if not is_cancel_requested(job):
        return None
    if record is None or record.observation is None or not record.observation.has_run:
        error = "cancelled before it started"
    else:
        error = f"cancelled before its retry; it {record.error}"
    record = replace(record or AttemptRecord(Reason.CANCELLED), reason=Reason.CANCELLED, error=error)
    return Status.CANCELLED if end_attempt(job, Status.CANCELLED, host, record) else None


def is_cancel_requested(job: ContainerJob) -> bool:
    row = ContainerJob.objects.filter(pk=job.pk, attempt=job.attempt, claim_token=job.claim_token)
    return bool(row.filter(cancel_requested_at__isnull=False).exists())


def discard_unstarted(engine: Engine, container_id: str, guard: Guard) -> Steps[Observation | None]:
    """Remove a container that never ran. The observation if it ran after all; None if it is gone."""

    def look_and_remove() -> Observation | None:
        # As one call: between two, the thread that drives them may wait for the database, and what starts and
        # ends meanwhile would be removed as one that never ran.
        seen = engine.inspect(container_id)
        if seen.has_run:
            return seen
        guard(lambda: engine.remove(container_id))()
        return None

    try:
        return (yield look_and_remove)  # type: ignore[no-any-return]
    except ContainerGone:
        return None
    except ContainerRunning:
        # It started between the look and the removal; whoever started it is late, but it runs.
        return (yield lambda: engine.inspect(container_id))  # type: ignore[no-any-return]
