"""The jobs of a run, and how each kind must end whatever befell its workers."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from container_manager.attempts import MAX_LAUNCH_TRIES
from container_manager.models import ContainerJob, JobAttempt, Reason, Status

IMAGE = "busybox"
#: Exit codes of a program that was told to stop, and of one that had to be killed.
STOPPED = (143, 137)


def witness(job: ContainerJob) -> str:
    return f"witness of {job.name}"


@dataclass(frozen=True)
class Kind:
    """`after_echo` is what its shell does once it has written the witness line."""

    name: str
    after_echo: str
    status: Status
    exit_codes: tuple[int, ...]
    reason: Reason = Reason.EXIT_CODE
    fields: dict[str, Any] = field(default_factory=dict)
    #: Somebody cancels it at some moment of its life.
    is_cancelled: bool = False

    def spec(self, name: str) -> dict[str, Any]:
        command = ["sh", "-c", f"echo 'witness of {name}'; {self.after_echo}"]
        return {"name": name, "image": IMAGE, "command": command, **self.fields}


KINDS = {
    kind.name: kind
    for kind in (
        Kind("ends", "true", Status.COMPLETED, (0,)),
        Kind("sleeps", "sleep 1", Status.COMPLETED, (0,)),
        Kind("fails", "exit 3", Status.FAILED, (3,), fields={"retry_exit_codes": [3], "max_retries": 2}),
        Kind("late", "sleep 600", Status.FAILED, STOPPED, Reason.TIMEOUT, {"timeout_seconds": 1}),
        Kind("deaf", "trap '' TERM; while true; do sleep 1; done", Status.FAILED, STOPPED, Reason.TIMEOUT,
             {"timeout_seconds": 1}),
        Kind("cancelled", "sleep 600", Status.CANCELLED, STOPPED, Reason.CANCELLED, is_cancelled=True),
        Kind("cancelled-late", "sleep 1", Status.COMPLETED, (0,), is_cancelled=True),
        Kind("cancelled-retry", "exit 3", Status.FAILED, (3,), is_cancelled=True,
             fields={"retry_exit_codes": [3], "max_retries": 3}),
    )
}  # fmt: skip
#: Of twelve jobs.
_MIX = (
    "ends", "ends", "ends", "ends", "sleeps", "sleeps", "fails", "late", "deaf",
    "cancelled", "cancelled-late", "cancelled-retry",
)  # fmt: skip


def build(count: int, draw: random.Random, of: str = "") -> list[ContainerJob]:
    """`of` is a part of the jobs' names, to tell one workload from another."""
    kinds = [_MIX[number % len(_MIX)] for number in range(count)]
    draw.shuffle(kinds)
    return [ContainerJob.objects.build(**KINDS[kind].spec(f"{kind}.{of}{number}")) for number, kind in enumerate(kinds)]


def kind_of(job: ContainerJob) -> Kind:
    return KINDS[job.name.partition(".")[0]]


def wrongs(job: ContainerJob, attempts: list[JobAttempt]) -> list[str]:
    """What is wrong with an ended job's record, by its row and its attempts alone."""
    kind = kind_of(job)
    ran = [attempt for attempt in attempts if attempt.started_at is not None]
    checks: dict[str, Callable[[], bool]] = {
        "an attempt's exit code": lambda: all(_is_exit_right(kind, attempt) for attempt in ran),
        "an attempt's log": lambda: all(_is_log_right(job, attempt) for attempt in ran),
        "an attempt's reason": lambda: all(_is_reason_right(job, kind, attempt) for attempt in attempts),
        "how often it ran": lambda: len(ran) <= (job.max_retries + 1 if job.retry_exit_codes else 1),
        "retry_count": lambda: job.retry_count <= job.max_retries and _are_retries_right(job, attempts),
        "the end": lambda: _is_end_right(job, kind, attempts),
        "the row's exit code": lambda: not attempts or job.status == Status.CANCELLED
        or job.exit_code == attempts[-1].exit_code,
    }  # fmt: skip
    return [what for what, is_right in checks.items() if not is_right()]


def _is_exit_right(kind: Kind, attempt: JobAttempt) -> bool:
    allowed = kind.exit_codes + (STOPPED if attempt.reason == Reason.CANCELLED else ())
    return attempt.exit_code in allowed


def _is_log_right(job: ContainerJob, attempt: JobAttempt) -> bool:
    # One that is told to stop as soon as it starts may not have come to write it.
    allowed = [f"{witness(job)}\n"] + ([""] if attempt.reason in (Reason.CANCELLED, Reason.TIMEOUT) else [])
    return attempt.stdout in allowed and attempt.stderr == ""


def _is_reason_right(job: ContainerJob, kind: Kind, attempt: JobAttempt) -> bool:
    if attempt.reason == Reason.CANCELLED:
        return kind.is_cancelled and job.status == Status.CANCELLED
    if attempt.started_at is None:
        # Its launchers died or stalled again and again, each before the start.
        return attempt.reason == Reason.LAUNCH and f"launched {MAX_LAUNCH_TRIES} times" in attempt.error
    return attempt.reason == kind.reason


def _are_retries_right(job: ContainerJob, attempts: list[JobAttempt]) -> bool:
    """Each attempt after the first was charged; one that was cancelled before its launch left none."""
    charged = len(attempts) - 1
    return job.retry_count == charged or (job.status == Status.CANCELLED and job.retry_count == charged + 1)


def _is_end_right(job: ContainerJob, kind: Kind, attempts: list[JobAttempt]) -> bool:
    if job.status == Status.CANCELLED:
        return kind.is_cancelled and job.reason == Reason.CANCELLED
    if attempts and job.reason == Reason.LAUNCH:
        # Whether its attempts were to end so, `_is_reason_right` judges.
        return job.status == Status.FAILED and job.retry_count == job.max_retries
    if not attempts or job.status != kind.status or job.reason != kind.reason:
        return False
    is_retried = bool(job.retry_exit_codes)
    return attempts[-1].number == job.attempt and (not is_retried or job.retry_count == job.max_retries)
