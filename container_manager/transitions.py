"""The table of moves and the one mover: nothing else writes a job's status."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from django.db.models import DateTimeField, DurationField, ExpressionWrapper, F, Value
from django.db.models.expressions import Combinable
from django.db.models.functions import Now

from .exceptions import InvalidTransition
from .models import ALIVE, ENDED, LEASED, ContainerJob, ContainerJobQuerySet, Status

MOVES: dict[Status, frozenset[Status]] = {
    source: frozenset(targets)
    for source, targets in {
        Status.PENDING: (Status.QUEUED, Status.SCHEDULED, Status.CANCELLED),
        Status.SCHEDULED: (Status.QUEUED, Status.PENDING, Status.CANCELLED),
        Status.QUEUED: (Status.LAUNCHING, Status.SCHEDULED, Status.PENDING, Status.CANCELLED),
        Status.LAUNCHING: (Status.STARTING, Status.QUEUED, Status.SCHEDULED, Status.FAILED, Status.CANCELLED),
        Status.STARTING: (Status.RUNNING, Status.RECOVERING, Status.FAILED),
        Status.RECOVERING: (Status.QUEUED, Status.SCHEDULED, Status.RUNNING, Status.FAILED, Status.CANCELLED),
        Status.RUNNING: (Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.SCHEDULED),
        Status.COMPLETED: (Status.QUEUED, Status.SCHEDULED),
        Status.FAILED: (Status.QUEUED, Status.SCHEDULED),
        Status.CANCELLED: (Status.QUEUED, Status.SCHEDULED),
    }.items()
}

#: A cancelled job must not come back through one of these. `running` is not among them: a container that
#: runs is recorded as such, and then stopped.
_NOT_IF_CANCELLED = (Status.STARTING, Status.QUEUED, Status.SCHEDULED)

#: What one try leaves on the row, with the value it begins with.
_OF_ONE_TRY: dict[str, Any] = {
    "container_id": None,
    "launched_at": None,
    "finished_at": None,
    "deadline_at": None,
    "exit_code": None,
    "oom_killed": False,
    "reason": "",
    "stop_requested_at": None,
    "stop_reason": "",
    "missing_at": None,
}
#: What belongs to the image that a job had; one that is pending may get another.
_OF_ITS_IMAGE: dict[str, Any] = {"pulled_host": None, "pull_error": "", "last_error": ""}
#: What an explicit retry clears besides: the job begins anew.
_OF_ALL_TRIES: dict[str, Any] = {
    **_OF_ITS_IMAGE,
    "cancel_requested_at": None,
    "retry_count": 0,
    "launch_tries": 0,
    # It waited for the tries before.
    "flow_run_id": None,
}


def from_now(seconds: float) -> "ExpressionWrapper[Any]":
    """A time by the database's clock, the only one that all processes share."""
    return ExpressionWrapper(
        Now() + Value(timedelta(seconds=seconds), output_field=DurationField()), output_field=DateTimeField()
    )


def move(job: ContainerJob, to: Status, *, if_null: str = "", **fields: Any) -> bool:
    """Compare-and-set: move the job, unless its row is no longer what `job` says. False means that it lost.

    With `if_null` it also loses if that field has a value by now. `fields` are written with it. What the
    database computes is read again at its next use.
    Raises `InvalidTransition` if the table has no such move.
    """
    source = Status(job.status)
    _check(source, to)
    row = _unchanged(job, if_null)
    if _minds_cancellation(source, to):
        row = row.filter(cancel_requested_at__isnull=True)
    changes = _changes(source, to) | fields
    if not row.update(**changes):
        return False
    show(job, changes)
    return True


def move_many(job_ids: Iterable[int], source: Status, to: Status, **fields: Any) -> int:
    """Move those of the jobs that are still in `source`; how many. Their rows must be `locked`."""
    _check(source, to)
    rows = ContainerJob.objects.filter(pk__in=list(job_ids), status=source)
    if _minds_cancellation(source, to):
        rows = rows.filter(cancel_requested_at__isnull=True)
    moved: int = rows.update(**_changes(source, to) | fields)
    return moved


def amend(job: ContainerJob, *, if_null: str = "", **fields: Any) -> bool:
    """Compare-and-set of fields that leaves the status as it is. False means that the row has moved on.

    With `if_null` it also loses if that field has a value by now.
    """
    row = _unchanged(job, if_null)
    changes = fields | {"updated_at": Now()}
    if not row.update(**changes):
        return False
    show(job, changes)
    return True


def locked(job_ids: Iterable[int], source: Status, *, skip: bool = False) -> list[int]:
    """Lock the rows that are in `source`, in ascending order, which is what keeps writers from deadlock.

    With `skip` those that another holds are left out. On SQLite the transaction has the only lock there is.
    """
    return list(_locked(job_ids, source, skip=skip).values_list("pk", flat=True))


def locked_rows(job_ids: Iterable[int], source: Status) -> list[ContainerJob]:
    """The rows themselves, those that another holds left out."""
    return list(_locked(job_ids, source, skip=True))


def move_locked(jobs: Sequence[ContainerJob], to: Status, **fields: Any) -> None:
    """Move jobs of one status whose rows this transaction has locked, and let the objects say so."""
    if not jobs:
        return
    source = Status(jobs[0].status)
    _check(source, to)
    changes = _changes(source, to) | fields
    ContainerJob.objects.filter(pk__in=[job.pk for job in jobs]).update(**changes)
    for job in jobs:
        show(job, changes)


def show(job: ContainerJob, changes: dict[str, Any]) -> None:
    """Let the object say what its row says now. What only the database knows is loaded at its next use."""
    for name, value in changes.items():
        if isinstance(value, Combinable):
            job.__dict__.pop(name, None)
        else:
            setattr(job, name, value)


def _locked(job_ids: Iterable[int], source: Status, *, skip: bool) -> ContainerJobQuerySet:
    rows: ContainerJobQuerySet = ContainerJob.objects.select_for_update(no_key=True, skip_locked=skip)
    return rows.filter(pk__in=list(job_ids), status=source).order_by("pk")


def _unchanged(job: ContainerJob, if_null: str) -> ContainerJobQuerySet:
    row: ContainerJobQuerySet = ContainerJob.objects.filter(
        pk=job.pk, status=job.status, attempt=job.attempt, claim_token=job.claim_token
    )
    return row.filter(**{f"{if_null}__isnull": True}) if if_null else row


def _check(source: Status, to: Status) -> None:
    if to not in MOVES[source]:
        allowed = ", ".join(sorted(MOVES[source]))
        raise InvalidTransition(f"a job that is {source} can't become {to}, only {allowed}")


def _minds_cancellation(source: Status, to: Status) -> bool:
    return to in _NOT_IF_CANCELLED and source not in ENDED


def _changes(source: Status, to: Status) -> dict[str, Any]:
    changes: dict[str, Any] = {"status": to, "updated_at": Now()}
    if to not in ALIVE:
        changes |= {"slot_host": None, "claim_token": ""}
    if to not in LEASED:
        changes |= {"claimed_by": "", "claimed_until": None}
    if to in (Status.QUEUED, Status.SCHEDULED, Status.PENDING):
        changes |= _OF_ONE_TRY | (_OF_ITS_IMAGE if to == Status.PENDING else {})
        if source in ENDED:
            changes |= _OF_ALL_TRIES
    if to == Status.QUEUED:
        changes |= {"scheduled_for": None}
        if source == Status.SCHEDULED:
            changes["queued_at"] = F("scheduled_for")
        elif source not in ALIVE:
            # One that was handed back keeps its place.
            changes["queued_at"] = Now()
    elif to in (Status.SCHEDULED, Status.PENDING):
        changes |= {"queued_at": None, "scheduled_for": None}
    elif to in ENDED:
        changes |= {"finished_at": Now(), "scheduled_for": None}
    return changes
