"""What is old in both installations, and purges of one: they must take all of its own, and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle
from uuid import UUID

from django.utils.timezone import now

from container_manager.containers import INSTANCE_LABEL, container_name
from container_manager.models import ContainerJob, JobAttempt, Reason, Status
from tests.fuzz.watching import containers

from .people import PATIENCE
from .place import OLD, Home, Person, Place, pause, waited

_DAYS = 365
_PER_ROUND = 3


@dataclass(frozen=True)
class Belongings:
    """What a purge may find of an installation; a set of names each."""

    old_jobs: frozenset[str]
    old_logs: frozenset[str]
    aged_runs: frozenset[str]
    #: Of failed jobs, kept for a look.
    containers: frozenset[str]


def purging(place: Place) -> Person:
    """Purge one, then the other, until the end."""
    for number, home in enumerate(cycle(place.homes)):
        if place.is_over and number:
            return
        yield from purge(place, home)
        yield from pause(5)


def purge(place: Place, home: Home, *, must_finish: bool = False) -> Person:
    """One may be cut short by a restart; with `must_finish` nothing that is old may be left."""
    other = place.other(home)
    for owner in place.homes:
        _grow_old(place, owner)
    theirs = belongings(place, other)
    deployment_id = place.deployment_id(home, "purge", "daily")
    run_id = place.api.create_flow_run_from_deployment(deployment_id, parameters={}).id
    yield from waited(lambda: _has_ended(place, run_id), PATIENCE)
    place.runs.look()
    for what, lost in _lost(theirs, belongings(place, other)):
        place.violations.append(f"purge: that of {home} removed {what} of {other}: {', '.join(sorted(lost))}")
    place.violations += [f"purge: after that of {home} {touched}" for touched in place.stranger.touched()]
    place.landscape.look(f"a purge of {home}")
    ours = belongings(place, home)
    if must_finish and (left := ours.old_jobs | ours.old_logs | ours.aged_runs):
        place.violations.append(f"purge: that of {home} left {', '.join(sorted(left))}")
    home.counts["purges"] += 1


def belongings(place: Place, home: Home) -> Belongings:
    with home.site.opened():
        old = ContainerJob.objects.filter(name__startswith=OLD)
        logs = JobAttempt.objects.filter(job__name__startswith=OLD).exclude(stdout="")
        failed = ContainerJob.objects.filter(status=Status.FAILED).values_list("pk", "attempt")
        names = {container_name(home.site.instance_id, job, attempt) for job, attempt in failed}
        jobs = frozenset(old.filter(finished_at__lt=now() - timedelta(days=_DAYS / 2)).values_list("name", flat=True))
        kept_logs = frozenset(f"the log of {name}" for name in logs.values_list("job__name", flat=True))
    aged = {run_id for run_id in place.runs.aged & place.runs.present if _owner(place, run_id) == home.site.instance_id}
    there = {name.partition(" ")[0] for name in containers(place.engine, home.site.instance_id)}
    return Belongings(jobs, kept_logs, frozenset(f"run {run_id}" for run_id in aged), frozenset(names & there))


def _grow_old(place: Place, home: Home) -> None:
    """Jobs, a log and flow runs, three each."""
    long_ago = now() - timedelta(days=_DAYS)
    home.counts["old"] += _PER_ROUND
    numbers = range(home.counts["old"] - _PER_ROUND, home.counts["old"])
    with home.site.opened():
        for number in numbers:
            # The last one's record is young, and only its log is old.
            ended_at = now() if number == numbers[-1] else long_ago
            job = ContainerJob.objects.create(
                name=f"{OLD}{home}-{number}", image="busybox", status=Status.COMPLETED, attempt=1, finished_at=ended_at
            )
            JobAttempt.objects.create(
                job=job, number=1, host_name="gone", ended_at=long_ago, reason=Reason.EXIT_CODE, stdout="old"
            )
    place.runs.look()
    place.runs.age(list(_ended_passes(place, home))[:_PER_ROUND])


def _ended_passes(place: Place, home: Home) -> Iterator[UUID]:
    passes = place.deployment_id(home, "process-queue", "scheduled")
    for run_id, run in place.runs.known.items():
        is_ended = run.state is not None and run.state.is_final()
        if run.deployment_id == passes and is_ended and run_id in place.runs.present - place.runs.aged:
            yield run_id


def _lost(before: Belongings, after: Belongings) -> Iterator[tuple[str, frozenset[str]]]:
    for what in ("old_jobs", "old_logs", "aged_runs", "containers"):
        if lost := getattr(before, what) - getattr(after, what):
            yield what.replace("_", " "), lost


def _owner(place: Place, run_id: UUID) -> str:
    return str(place.runs.known[run_id].labels.get(INSTANCE_LABEL, ""))


def _has_ended(place: Place, run_id: UUID) -> bool:
    state = place.api.read_flow_run(run_id).state
    return state is not None and state.is_final()
