"""Why a job does not run yet, by what the database knows: no host is asked."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

from django.db.models.functions import Now
from django.utils import timezone

from .capacity import Capacity, measure
from .claiming import before_in_line, next_in_line
from .conf import get_settings
from .models import LEASED, ContainerJob, DockerHost, Installation, Status
from .types import Limits

#: Jobs that are counted before another one; it takes milliseconds, however many more there are.
MOST_BEFORE = 1000
#: seconds, at least; after as long without a sign of one, passes are taken to have stopped. Three intervals, if longer.
_PASSES_SECONDS = 60


@dataclass(frozen=True)
class Outlook:
    """The queue at one moment, as it matters to those who wait."""

    now: datetime
    capacity: Capacity
    #: By id.
    hosts: dict[int, DockerHost]
    #: As last read from the Prefect tags.
    limits: Limits
    #: Until when the pass that keeps the slots full has said that it is at work.
    work_until: datetime | None

    @property
    def is_pass_at_work(self) -> bool:
        return self.work_until is not None and self.work_until > self.now

    @property
    def seen_at(self) -> datetime | None:
        """When a pass last reached a host, of those that it should reach; to a few seconds."""
        return max((host.last_seen_at for host in _expected(self.hosts) if host.last_seen_at), default=None)

    @property
    def passes(self) -> str:
        """Whether passes look after the queue, in words."""
        if self.is_pass_at_work:
            return "a pass is at work"
        if self.is_without_passes:
            return f"no pass has been seen since {clock(self.seen_at)}" if self.seen_at else "no pass was ever seen"
        return "no pass is at work at this moment"

    @property
    def is_without_passes(self) -> bool:
        """No pass has left a sign for so long that none may come."""
        patience = timedelta(seconds=max(_PASSES_SECONDS, 3 * get_settings().POLL_INTERVAL_SECONDS))
        # Of a host that is away the row does not tell when a pass last asked for it.
        if self.is_pass_at_work or not _expected(self.hosts):
            return False
        return self.seen_at is None or self.seen_at < self.now - patience

    def why(self, job: ContainerJob, *, with_place: bool = False) -> str:
        """One sentence; empty if the job runs or has ended. Of a host's own errors it tells nothing.

        For any number of jobs it asks once which are next; `with_place` counts those before this one.
        """
        match Status(job.status):
            case Status.PENDING:
                return "not queued yet"
            case Status.SCHEDULED if job.scheduled_for and job.scheduled_for > self.now:
                if job.claim_token:
                    # Held, from now on and on, while its image is pulled: it has not been tried.
                    return job.last_error
                if job.last_error:
                    return f"waits until {clock(job.scheduled_for)} for its next try: {job.last_error}"
                return f"scheduled for {clock(job.scheduled_for)}"
            case Status.SCHEDULED | Status.QUEUED:
                place = self._place(job) if with_place and job.status == Status.QUEUED else ""
                stopped = f"; {self.passes}" if self.is_without_passes else ""
                last = f"; the last try: {job.last_error}" if job.last_error else ""
                return f"{place}{self._held_by(job)}{stopped}{last}"
            case status if status in LEASED:
                return self._at_it(job)
            case _:
                return ""

    def _held_by(self, job: ContainerJob) -> str:
        """What keeps a job that is ready from being claimed."""
        host = self.hosts.get(job.pinned_host_id or 0)
        if host is not None and host.pk in self.capacity.shut:
            return f"waits for its host: {self.capacity.shut[host.pk]}{seen(host)}"
        if not self.capacity.is_full and job.status == Status.SCHEDULED:
            return "due: the next pass queues it"
        if job.pk not in self._next:
            if host is not None and len(self._next) < self.capacity.slots:
                # Others of its host take what is free there; what is left is elsewhere.
                return f"waits for a slot on host {host.name}"
            return f"waits for a slot: {self.capacity.next_limit}"
        return f"ready for the next pass, unless its max_concurrent is reached ({self.capacity.alive} alive now)"

    @cached_property
    def _next(self) -> frozenset[int]:
        return next_in_line(self.capacity)

    def _place(self, job: ContainerJob) -> str:
        open_hosts = self.capacity.free.keys() or [host.pk for host in self.hosts.values() if host.is_active]
        before = before_in_line(job, open_hosts, MOST_BEFORE)
        if not before:
            return "first in line; "
        if before >= MOST_BEFORE:
            return f"at least {MOST_BEFORE} jobs before it; "
        return f"{before} job{'' if before == 1 else 's'} before it; "

    def _at_it(self, job: ContainerJob) -> str:
        host = self.hosts.get(job.slot_host_id or 0)
        where = f"{job.status} on host {host.name}" if host else str(job.status)
        if job.claimed_until is None or job.claimed_until > self.now:
            return f"{where}, by process {job.claimed_by}"
        late = f"{where}; process {job.claimed_by} has not come back by {clock(job.claimed_until)}: the next pass"
        return f"{late} that reaches the host takes over{seen(host) if host else ''}"


def look_ahead() -> Outlook:
    """Three queries. The hosts that no pass found away count as reachable."""
    row = Installation.objects.filter(pk=1).annotate(at=Now()).first()
    # On a new database there is no row yet, and looking makes none.
    installation = row or Installation()
    hosts, limits = DockerHost.objects.in_bulk(), installation.tag_limits
    return Outlook(
        now=row.at if row else timezone.now(),
        # What a pass is told besides is known to it alone.
        capacity=measure(None, limits, {host.pk for host in _expected(hosts)}),
        hosts=hosts,
        limits=limits,
        work_until=installation.work_until,
    )


def _expected(hosts: dict[int, DockerHost]) -> list[DockerHost]:
    """Those that a pass should reach."""
    return [host for host in hosts.values() if host.is_active and not host.last_error]


def seen(host: DockerHost) -> str:
    """Since when a host is away; empty for any other. Not why: who may see jobs may not see hosts."""
    if not host.last_error:
        return ""
    return f", not seen since {clock(host.last_seen_at)}" if host.last_seen_at else ", never seen"


def clock(at: datetime) -> str:
    """A time as the sentences have it."""
    return f"{timezone.localtime(at):%Y-%m-%d %H:%M:%S}"
