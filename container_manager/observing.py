"""One look at all hosts: the rows, then the containers, then in full the rows that something is to be done about."""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

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
    containers: dict[str, ContainerSummary]
    #: Containers of all alive jobs, …
    claimed_ids: set[str]
    #: … of running ones that run on, with nothing to be done about them, …
    quiet_ids: set[str]
    #: … and how many of the running jobs have no container any more.
    vanished: int
    #: All the others.
    jobs: list["ObservedJob"]

    @property
    def running_ids(self) -> set[str]:
        """The containers of the jobs that are running by now, whatever was done about them since."""
        others = {job.row.container_id or "" for job in self.jobs if job.row.status == Status.RUNNING}
        return self.quiet_ids | others


@dataclass
class View:
    hosts: list[HostView] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    #: Containers whose end events told of: an inspect knows more than the list, which lags.
    named_ids: frozenset[str] = frozenset()
    #: The jobs to act on; None: all.
    chosen: frozenset[int] | None = None

    def jobs(self) -> Iterator[tuple["ObservedJob", HostView]]:
        for host in self.hosts:
            for job in host.jobs:
                if self.chosen is None or job.row.pk in self.chosen:
                    yield job, host

    @property
    def running_ids(self) -> set[str]:
        return set().union(*(host.running_ids for host in self.hosts))


@dataclass
class ObservedJob:
    """A row, and what the database's clock says of its times."""

    row: ContainerJob
    is_past_deadline: bool
    is_past_grace: bool
    is_lease_over: bool
    #: Its container has been missing for longer than a vanished group is held.
    is_given_up: bool


class _Alive(NamedTuple):
    """As much of a row as tells whether more is needed: thousands of jobs may run with nothing to do about them."""

    pk: int
    host_id: int
    container_id: str | None
    status: str
    #: It runs, and neither its deadline nor a person asks for anything.
    is_quiet: bool


def observe(
    connections: Mapping[int, HostConnection],
    instance_id: str,
    named_ids: Collection[str] = (),
    chosen: Collection[int] | None = None,
) -> View:
    """Read the alive jobs of the hosts in one query, list each host's containers, read what needs a closer look.

    `named_ids`: containers that events named as ended. `chosen`: ids of the jobs to act on; the others are looked
    at all the same: what befalls many is judged by all.
    """
    alive: dict[int, list[_Alive]] = {pk: [] for pk in connections}
    for row in _alive(connections):
        alive[row.host_id].append(row)
    lists: dict[int, Future[list[ContainerSummary]]] = {
        pk: connection.submit(partial(connection.engine.list, instance_id)) for pk, connection in connections.items()
    }
    view = View(named_ids=frozenset(named_ids), chosen=None if chosen is None else frozenset(chosen))
    closer: dict[int, tuple[_Alive, HostView]] = {}
    for pk, connection in connections.items():
        try:
            containers = lists[pk].result()
        except EngineError as e:
            view.problems.append(f"host {connection.host.name}: {e}")
            continue
        host = _seen(connection, alive[pk], containers, view.named_ids)
        view.hosts.append(host)
        closer |= {row.pk: (row, host) for row in alive[pk] if row.container_id not in host.quiet_ids}
    if closer:
        for job in _in_full(closer.keys()):
            row, host = closer[job.row.pk]
            # Another pass that has moved it meanwhile looks after it.
            if (job.row.status, job.row.container_id) == (row.status, row.container_id):
                host.jobs.append(job)
    return view


def _seen(
    connection: HostConnection, alive: list[_Alive], containers: list[ContainerSummary], named_ids: frozenset[str]
) -> HostView:
    up = {container.id for container in containers if container.state == "running"} - named_ids
    by_id = {container.id: container for container in containers}
    return HostView(
        connection=connection,
        containers=by_id,
        claimed_ids={row.container_id for row in alive if row.container_id},
        quiet_ids={row.container_id for row in alive if row.is_quiet and row.container_id in up},
        vanished=sum(row.status == Status.RUNNING and row.container_id not in by_id for row in alive),
        jobs=[],
    )


def _alive(connections: Mapping[int, HostConnection]) -> list[_Alive]:
    asks_for_nothing = Q(
        status=Status.RUNNING,
        deadline_at__gte=Now(),
        stop_requested_at=None,
        cancel_requested_at=None,
        missing_at=None,
    )
    rows = ContainerJob.objects.filter(slot_host__in=list(connections)).order_by("pk")
    rows = rows.annotate(is_quiet=_whether(asks_for_nothing))
    return [_Alive(*row) for row in rows.values_list("pk", "slot_host_id", "container_id", "status", "is_quiet")]


def _in_full(job_ids: Collection[int]) -> list[ObservedJob]:
    settings = get_settings()
    rows = ContainerJob.objects.filter(pk__in=list(job_ids), slot_host__isnull=False).order_by("pk")
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
