"""How many containers may start now, where, and what keeps more from it."""

import re
import sys
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import timedelta

from django.db.models import Count
from django.db.models.functions import Now

from .conf import get_settings
from .models import DockerHost
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
    #: By host id: what keeps each of the others from taking a job.
    shut: dict[int, str] = field(default_factory=dict)
    #: Containers that count for the limit over all hosts.
    alive: int = 0

    @property
    def slots(self) -> int:
        return max(0, min(self.total_free, sum(self.free.values())))

    @property
    def is_full(self) -> bool:
        return self.slots == 0

    @property
    def closed(self) -> str:
        """What keeps the hosts that have no free slot from taking a job."""
        return "; ".join(self.shut.values())

    @property
    def next_limit(self) -> str:
        """What keeps, or will keep, more containers from running."""
        return self.limit or re.sub(r", (\d+) of \1(?=;|$)", r", \1", self.binding.replace("limit reached: ", ""))


@dataclass(frozen=True)
class _Load:
    pk: int
    name: str
    is_active: bool
    max_concurrent_jobs: int
    alive: int
    is_silent: bool


def measure(max_concurrent: int | None, limits: Limits, reachable: AbstractSet[int]) -> Capacity:
    """One query. Exact only in a transaction that holds the Installation row.

    `max_concurrent` None: as far as tags and hosts allow, since what a pass is told is known to it alone.
    """
    hosts = _loads()
    # A dead Engine's jobs can't be told from running ones; they must not stop the other hosts for ever.
    alive = sum(host.alive for host in hosts if host.pk in reachable or not host.is_silent)
    cap, cap_name = sys.maxsize if max_concurrent is None else max_concurrent, "max_concurrent"
    if limits.total is not None and limits.total <= cap:
        cap, cap_name = limits.total, f"tag {get_settings().named(JOB_TAG)}"
    free: dict[int, int] = {}
    open_hosts: list[str] = []
    shut: dict[int, str] = {}
    for host in hosts:
        if not host.is_active:
            shut[host.pk] = f"host {host.name} is not active"
        elif host.pk not in reachable:
            shut[host.pk] = f"host {host.name} is not reachable"
        else:
            most, what = _bound(host, limits)
            if host.alive < most:
                free[host.pk] = most - host.alive
                open_hosts.append(f"limit reached: {what}, {most} of {most}")
            else:
                shut[host.pk] = f"limit reached: {what}, {host.alive} of {most}"
    total_free = max(0, cap - alive)
    if not total_free:
        return Capacity(limit=f"limit reached: {cap_name}, {alive} of {cap}", shut=shut, alive=alive)
    if not free:
        limit = "; ".join(shut.values()) or "there is no Docker host: add one"
        return Capacity(total_free=total_free, limit=limit, shut=shut, alive=alive)
    if total_free <= sum(free.values()):
        binding = f"limit reached: {cap_name}, {alive + total_free} of {cap}"
    else:
        binding = "; ".join(open_hosts)
    return Capacity(free=free, total_free=total_free, binding=binding, shut=shut, alive=alive)


def loads() -> tuple[HostLoad, ...]:
    return tuple(
        HostLoad(
            name=host.name, alive=host.alive, max_concurrent_jobs=host.max_concurrent_jobs, is_active=host.is_active
        )
        for host in _loads()
    )


def _loads() -> list[_Load]:
    grace = timedelta(seconds=get_settings().HOST_GRACE_SECONDS)
    rows = DockerHost.objects.order_by("pk").annotate(alive=Count("alive_jobs"), now=Now())
    return [
        _Load(pk, name, is_active, most, alive, is_silent=last_seen_at is not None and last_seen_at < now - grace)
        for pk, name, is_active, most, alive, last_seen_at, now in rows.values_list(
            "pk", "name", "is_active", "max_concurrent_jobs", "alive", "last_seen_at", "now"
        )
    ]


def _bound(host: _Load, limits: Limits) -> tuple[int, str]:
    """The most that may be alive on the host, and what says so."""
    tag_limit = limits.hosts.get(host.name)
    if tag_limit is not None and tag_limit <= host.max_concurrent_jobs:
        return tag_limit, f"tag {get_settings().named(HOST_TAG_PREFIX + host.name)}"
    return host.max_concurrent_jobs, f"max_concurrent_jobs of host {host.name}"
