"""To claim is to write: which jobs start next, decided and marked in one short transaction."""

import random
import time
from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from django.db import connection
from django.db.models import Case, F, Value, When

from .capacity import Capacity, measure
from .conf import get_settings
from .exceptions import DatabaseBusy
from .leases import Lease, holder
from .locks import bounded_transaction, transaction_within
from .models import ContainerJob, DockerHost, Installation, Status
from .transitions import from_now, locked, locked_rows, move_locked, move_many

#: Rows per transaction of a promotion: 30 ms, so that it never holds up a claim (SQLite) or a bulk cancel for long.
PROMOTE_CHUNK = 1000
#: Arms of one statement; SQLite takes 500.
_MOST_ARMS = 400
#: seconds; for the claim's lock. The claim behind it takes milliseconds.
LOCK_SECONDS = 2


@dataclass(frozen=True)
class Claim:
    """Jobs that are this process's to launch until the lease is over, first one first."""

    jobs: list[ContainerJob] = field(default_factory=list)
    lease: Lease | None = None
    #: Why no more were claimed; empty if no more were ready.
    limit: str = ""


class _Candidate(NamedTuple):
    """Sorts as the claim order."""

    minus_priority: int
    queued_at: Any
    pk: int
    pinned_host_id: int | None
    #: Where its image was pulled for it.
    pulled_host_id: int | None


def promote_due(until: float) -> int:
    """Move scheduled jobs that are due to `queued`, in chunks, until `until` (monotonic); how many."""
    promoted = 0
    while True:
        due = list(
            ContainerJob.objects.due().order_by("scheduled_for", "pk").values_list("pk", flat=True)[:PROMOTE_CHUNK]
        )
        if due:
            with bounded_transaction():
                promoted += move_many(locked(due, Status.SCHEDULED, skip=True), Status.SCHEDULED, Status.QUEUED)
        if len(due) < PROMOTE_CHUNK or time.monotonic() >= until:
            return promoted


def claim(
    max_concurrent: int,
    reachable: AbstractSet[int],
    *,
    limit: int | None = None,
    only: Collection[int] | None = None,
    timeout: float = 30,
) -> Claim:
    """Claim as many jobs as may start, at most `limit`, on the `reachable` hosts (ids), `only` those if given.

    A lock that another holds is waited for and asked for again until `timeout` seconds are over, then
    `DatabaseBusy` is raised.
    """
    until = time.monotonic() + timeout
    while True:
        try:
            with transaction_within(min(LOCK_SECONDS, max(0.05, until - time.monotonic()))):
                return _claim_once(max_concurrent, reachable, limit, only)
        except DatabaseBusy as e:
            if time.monotonic() >= until:
                raise DatabaseBusy(f"the queue's lock was not free within {round(timeout, 2):g} s") from e
        time.sleep(random.uniform(0.01, 0.1))  # noqa: S311 (so that those who collided don't again)


def ready_jobs(limit: int | None = None) -> list[ContainerJob]:
    """What claims would take one after the other, in their order, due scheduled jobs included. Reads only."""
    return _ready([None, *DockerHost.objects.values_list("pk", flat=True)], limit)[:limit]


def next_jobs(capacity: Capacity) -> list[ContainerJob]:
    """What one claim with this capacity would take, in its order, due scheduled jobs included. Reads only."""
    if capacity.is_full:
        return []
    jobs = _ready([None, *capacity.free], capacity.slots)
    dealt = _deal(map(_candidate, jobs), capacity, capacity.slots)
    return [job for job in jobs if job.pk in dealt]


def next_in_line(capacity: Capacity) -> frozenset[int]:
    """The queued jobs (ids) that a claim with this capacity would take. One query; none if it is full."""
    if capacity.is_full:
        return frozenset()
    return frozenset(_deal(_candidates(capacity, capacity.slots, None), capacity, capacity.slots))


def before_in_line(job: ContainerJob, open_hosts: Collection[int], most: int) -> int:
    """How many queued jobs the claim would take before this one, counted up to about `most`.

    Those that are pinned count if it is to the job's own host or, for one that may run anywhere, to one of
    `open_hosts`: the others stand in another line.
    """
    table = ContainerJob._meta.db_table
    # The row's own value: as text, which a time is on SQLite, another spelling of it is another time.
    since = "(SELECT queued_at FROM {table} WHERE id = %s)"
    ranges: list[tuple[str, list[int]]] = [
        ("priority > %s", [job.priority]),
        (f"priority = %s AND queued_at < {since}", [job.priority, job.pk]),
        (f"priority = %s AND queued_at = {since} AND id < %s", [job.priority, job.pk, job.pk]),
    ]
    # Each range is read off an index, and no further than to its `most`th entry.
    arm = (
        "SELECT * FROM (SELECT id FROM {table} WHERE status = 'queued' AND pinned_host_id {host} AND {before}"
        " LIMIT %s) AS arm"
    )
    line = "SELECT COUNT(*) FROM ({}) AS line"
    statements: list[str] = []
    parameters: list[int] = []
    pinned_to = ", ".join(f"{pk:d}" for pk in ([job.pinned_host_id] if job.pinned_host_id else open_hosts))
    for host in ("IS NULL", f"IN ({pinned_to})") if pinned_to else ("IS NULL",):
        for before, values in ranges:
            statements.append(arm.replace("{before}", before).format(table=table, host=host))
            parameters += [*values, most]
    with connection.cursor() as cursor:
        cursor.execute(line.format(" UNION ALL ".join(statements)), parameters)
        return int(cursor.fetchone()[0])


def _claim_once(
    max_concurrent: int, reachable: AbstractSet[int], limit: int | None, only: Collection[int] | None
) -> Claim:
    # Lock, count, pick: three statements. One that does all would count rows as they were before the lock.
    installation = Installation.locked()
    capacity = measure(max_concurrent, installation.tag_limits, reachable)
    if capacity.is_full:
        return Claim(limit=capacity.limit)
    slots = capacity.slots if limit is None else min(capacity.slots, limit)
    candidates = _candidates(capacity, slots, only)
    dealt = _deal(candidates, capacity, slots)
    if not dealt:
        ready = ContainerJob.objects.queued() if only is None else ContainerJob.objects.queued().filter(pk__in=only)
        has_more = capacity.closed and ready.has_any("queued_at")
        return Claim(limit=f"the ready jobs are pinned: {capacity.closed}" if has_more else "")
    lease_seconds = get_settings().LEASE_SECONDS
    lease = Lease.begin(lease_seconds)
    jobs = locked_rows(dealt, Status.QUEUED)
    attempts = {job.pk: job.attempt + 1 for job in jobs}
    move_locked(
        jobs,
        Status.LAUNCHING,
        slot_host_id=_by_host({job.pk: dealt[job.pk] for job in jobs}),
        attempt=F("attempt") + 1,
        claim_token=lease.token,
        claimed_by=holder(),
        claimed_until=from_now(lease_seconds),
    )
    for job in jobs:
        job.slot_host_id, job.attempt = dealt[job.pk], attempts[job.pk]
    order = {pk: number for number, pk in enumerate(dealt)}
    jobs.sort(key=lambda job: order[job.pk])
    is_bound = len(candidates) > len(dealt) and len(dealt) == capacity.slots
    return Claim(jobs=jobs, lease=lease, limit=capacity.binding if is_bound else "")


def _ready(pinned_to: Iterable[int | None], most: int | None) -> list[ContainerJob]:
    """The first `most` jobs of each of these hosts, and of those of none (None), sorted as a claim takes them."""
    queued = ContainerJob.objects.queued().in_claim_order()
    due = ContainerJob.objects.due().order_by("-priority", "scheduled_for", "pk")
    # Each reads one end of its own index, as the claim's do.
    jobs = [job for pk in pinned_to for rows in (queued, due) for job in rows.filter(pinned_host=pk)[:most]]
    return sorted(jobs, key=_candidate)


def _candidate(job: ContainerJob) -> _Candidate:
    return _Candidate(-job.priority, job.queued_at or job.scheduled_for, job.pk, job.pinned_host_id, job.pulled_host_id)


def _by_host(dealt: dict[int, int]) -> Any:
    """The host of each job as one expression; a plain value if there is one host."""
    jobs: dict[int, list[int]] = {}
    for job_id, host_id in dealt.items():
        jobs.setdefault(host_id, []).append(job_id)
    if len(jobs) < 2:
        return next(iter(jobs), None)
    return Case(*(When(pk__in=job_ids, then=Value(host_id)) for host_id, job_ids in jobs.items()))


def _candidates(capacity: Capacity, slots: int, only: Collection[int] | None) -> list[_Candidate]:
    """The next jobs of each host with free slots, and the next that may run anywhere; one more than fit.

    An arm each, because each reads one end of its own index; a condition that joins them would walk past
    every job that is pinned to a full host.
    """
    table = ContainerJob._meta.db_table
    among, ids = "", []
    if only is not None:
        among = f" AND id IN ({', '.join(['%s'] * len(only))})" if only else " AND 1 = 0"
        ids = list(only)
    arm = (
        "SELECT * FROM (SELECT -priority, queued_at, id, pinned_host_id, pulled_host_id FROM {table}"
        " WHERE status = 'queued' AND pinned_host_id {host}{among}"
        " ORDER BY priority DESC, queued_at, id LIMIT %s) AS arm"
    )
    arms = [(arm.format(table=table, host="IS NULL", among=among), [*ids, slots + 1])]
    of_host = arm.format(table=table, host="= %s", among=among)
    arms += [(of_host, [host_id, *ids, min(free, slots) + 1]) for host_id, free in capacity.free.items()]
    found: list[_Candidate] = []
    with connection.cursor() as cursor:
        for first in range(0, len(arms), _MOST_ARMS):
            statements, parameters = zip(*arms[first : first + _MOST_ARMS], strict=True)
            cursor.execute(" UNION ALL ".join(statements), [*chain(*parameters)])
            found += [_Candidate(*row) for row in cursor.fetchall()]
    return sorted(found)


def _deal(candidates: Iterable[_Candidate], capacity: Capacity, slots: int) -> dict[int, int]:
    """job id -> host id. A job that may run anywhere goes where it has its image, else where most is free."""
    free = dict(capacity.free)
    dealt: dict[int, int] = {}
    for job in candidates:
        if len(dealt) == slots:
            break
        host_id = job.pinned_host_id or max(
            free, key=lambda pk: (free[pk] > 0 and pk == job.pulled_host_id, free[pk], -pk)
        )
        if free[host_id] > 0:
            free[host_id] -= 1
            dealt[job.pk] = host_id
    return dealt
