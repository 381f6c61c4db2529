"""How many containers may start now, where, and what keeps more from it."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from django.db.models import Case, Count, OuterRef, Q, Subquery, Value, When
from django.db.models.functions import Coalesce

from .conf import get_settings
from .models import ContainerJob, DockerHost
from .transitions import from_now
from .types import HOST_TAG_PREFIX, JOB_TAG, HostLoad, Limits


@dataclass(frozen=True)
class Capacity:
    """Free slots: `free` by host id (only hosts that have some), `total_free` over all."""

    free: dict[int, int] = field(default_factory=dict)
    total_free: int = 0
    #: Why nothing may start, in words; empty if something may.
    limit: str = ""
    #: What will bind once the slots are full.
    binding: str = ""
    #: What keeps the other hosts from taking a job.
    closed: str = ""

    @property
    def slots(self) -> int:
        return max(0, min(self.total_free, sum(self.free.values())))

    @property
    def is_full(self) -> bool:
        return self.slots == 0


@dataclass(frozen=True)
class _Load:
    pk: int
    name: str
    is_active: bool
    is_silent: bool
    max_concurrent_jobs: int
    alive: int


def measure(max_concurrent: int, limits: Limits, reachable: AbstractSet[int]) -> Capacity:
    """One query. Exact only in a transaction that holds the Installation row."""
    hosts = _loads()
    # A dead Engine's jobs can't be told from running ones; they must not stop the other hosts for ever.
    alive = sum(host.alive for host in hosts if host.pk in reachable or not host.is_silent)
    cap, cap_name = max_concurrent, "max_concurrent"
    if limits.total is not None and limits.total <= cap:
        cap, cap_name = limits.total, f"tag {JOB_TAG}"
    free: dict[int, int] = {}
    open_hosts: list[str] = []
    closed: list[str] = []
    for host in hosts:
        if not host.is_active:
            closed.append(f"host {host.name} is not active")
        elif host.pk not in reachable:
            closed.append(f"host {host.name} is not reachable")
        else:
            most, what = _bound(host, limits)
            if host.alive < most:
                free[host.pk] = most - host.alive
                open_hosts.append(f"limit reached: {what}, {most} of {most}")
            else:
                closed.append(f"limit reached: {what}, {host.alive} of {most}")
    total_free = max(0, cap - alive)
    if not total_free:
        return Capacity(limit=f"limit reached: {cap_name}, {alive} of {cap}")
    if not free:
        return Capacity(total_free=total_free, limit="; ".join(closed) or "there is no Docker host: add one")
    if total_free <= sum(free.values()):
        binding = f"limit reached: {cap_name}, {alive + total_free} of {cap}"
    else:
        binding = "; ".join(open_hosts)
    return Capacity(free=free, total_free=total_free, binding=binding, closed="; ".join(closed))


def loads() -> tuple[HostLoad, ...]:
    return tuple(
        HostLoad(
            name=host.name, alive=host.alive, max_concurrent_jobs=host.max_concurrent_jobs, is_active=host.is_active
        )
        for host in _loads()
    )


def _loads() -> list[_Load]:
    alive = ContainerJob.objects.filter(slot_host=OuterRef("pk")).order_by().values("slot_host")
    silent_before = from_now(-get_settings().HOST_GRACE_SECONDS)
    rows = DockerHost.objects.order_by("pk").annotate(
        alive=Coalesce(Subquery(alive.annotate(count=Count("pk")).values("count")), 0),
        is_silent=Case(When(Q(last_seen_at__lt=silent_before), then=Value(True)), default=Value(False)),
    )
    return [
        _Load(*row) for row in rows.values_list("pk", "name", "is_active", "is_silent", "max_concurrent_jobs", "alive")
    ]


def _bound(host: _Load, limits: Limits) -> tuple[int, str]:
    """The most that may be alive on the host, and what says so."""
    tag_limit = limits.hosts.get(host.name)
    if tag_limit is not None and tag_limit <= host.max_concurrent_jobs:
        return tag_limit, f"tag {HOST_TAG_PREFIX}{host.name}"
    return host.max_concurrent_jobs, f"max_concurrent_jobs of host {host.name}"
