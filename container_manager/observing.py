"""One look at all hosts: the rows first, then the containers."""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial

from django.db.models import BooleanField, Case, Q, Value, When
from django.db.models.functions import Now

from .conf import get_settings
from .exceptions import EngineError
from .hosts import HostConnection
from .models import ContainerJob, Status
from .transitions import from_now
from .types import ContainerSummary


@dataclass
class HostView:
    """A host's alive jobs, and the containers of this installation that its Engine listed after they were read."""

    connection: HostConnection
    jobs: list["ObservedJob"]
    containers: dict[str, ContainerSummary]

    @cached_property
    def vanished(self) -> int:
        """How many running jobs have no container any more."""
        return sum(
            job.row.status == Status.RUNNING and job.row.container_id not in self.containers for job in self.jobs
        )


@dataclass
class View:
    hosts: list[HostView] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    #: The jobs to act on; None: all.
    chosen: frozenset[int] | None = None

    def jobs(self) -> Iterator[tuple["ObservedJob", HostView]]:
        for host in self.hosts:
            for job in host.jobs:
                if self.chosen is None or job.row.pk in self.chosen:
                    yield job, host


@dataclass
class ObservedJob:
    """A row, and what the database's clock says of its times."""

    row: ContainerJob
    is_past_deadline: bool
    is_past_grace: bool
    is_lease_over: bool
    #: Its container has been missing for longer than a vanished group is held.
    is_given_up: bool


def observe(connections: Mapping[int, HostConnection], instance_id: str, chosen: Collection[int] | None = None) -> View:
    """Read the alive jobs of the hosts in one query, then list each host's containers.

    `chosen`: ids of the jobs to act on. The others are looked at all the same: what befalls many is judged by all.
    """
    jobs: dict[int, list[ObservedJob]] = {pk: [] for pk in connections}
    for job in _alive(connections):
        jobs[job.row.slot_host_id or 0].append(job)
    lists: dict[int, Future[list[ContainerSummary]]] = {
        pk: connection.submit(partial(connection.engine.list, instance_id)) for pk, connection in connections.items()
    }
    view = View(chosen=None if chosen is None else frozenset(chosen))
    for pk, connection in connections.items():
        try:
            containers = lists[pk].result()
        except EngineError as e:
            view.problems.append(f"host {connection.host.name}: {e}")
            continue
        view.hosts.append(HostView(connection, jobs[pk], {container.id: container for container in containers}))
    return view


def _alive(connections: Mapping[int, HostConnection]) -> list[ObservedJob]:
    settings = get_settings()
    rows = ContainerJob.objects.filter(slot_host__in=list(connections)).order_by("pk")
    rows = rows.annotate(
        is_past_deadline=_whether(Q(deadline_at__lt=Now())),
        is_past_grace=_whether(Q(stop_requested_at__lt=from_now(-settings.STOP_GRACE_SECONDS))),
        is_lease_over=_whether(Q(claimed_until__lt=Now())),
        is_given_up=_whether(Q(missing_at__lt=from_now(-settings.HOST_GRACE_SECONDS))),
    )
    return [
        ObservedJob(row, row.is_past_deadline, row.is_past_grace, row.is_lease_over, row.is_given_up) for row in rows
    ]


def _whether(condition: Q) -> Case:
    return Case(When(condition, then=Value(True)), default=Value(False), output_field=BooleanField())
