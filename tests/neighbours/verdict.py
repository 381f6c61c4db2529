"""What two installations did to each other: a sentence for each thing that one had no business to do."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefect.client.schemas.objects import FlowRun

from container_manager.containers import INSTANCE_LABEL, container_name
from container_manager.models import ContainerJob, JobAttempt, Status
from tests.fuzz import verdict as fuzz
from tests.fuzz.watching import Events

from .place import OLD, Home, Place

#: seconds; for how long after a change of a limit a container may be started that was claimed under the old one.
LAG_SECONDS = 12.0
_ENDS = {Status.COMPLETED: "COMPLETED", Status.FAILED: "FAILED", Status.CANCELLED: "CANCELLED"}


@dataclass(frozen=True)
class Records:
    """An installation's own, read once it is at rest."""

    home: Home
    events: Events
    jobs: list[ContainerJob]
    attempts: Mapping[int, list[JobAttempt]]
    #: What its jobs came to, and what is wrong with it: as `make fuzz` judges them.
    wrongs: list[str]

    @classmethod
    def read(cls, home: Home, events: Events) -> "Records":
        with home.site.opened():
            jobs = list(ContainerJob.objects.exclude(name__startswith=OLD).order_by("pk"))
            attempts = fuzz.attempts_by_job()
            wrongs = [
                *fuzz.doubles(events),
                *fuzz.lost_runs(events, jobs),
                *fuzz.wrong_records(jobs, attempts),
                *fuzz.unfinished(jobs, attempts),
                *fuzz.held(),
            ]
        return cls(home, events, jobs, attempts, wrongs)

    @property
    def containers(self) -> set[str]:
        """By id, those that its records tell of."""
        rows = [attempt.container_id for attempts in self.attempts.values() for attempt in attempts]
        return {container_id for container_id in [*rows, *(job.container_id for job in self.jobs)] if container_id}

    def jobs_of(self, run: FlowRun) -> list[ContainerJob]:
        return [job for job in self.jobs if job.flow_run_id == str(run.id)]


def judge(place: Place, both: tuple[Records, Records], third: Events) -> list[str]:
    """Every violation; those that were noticed on the way come first."""
    place.runs.look()
    found = [*place.violations, *(f"landscape: {surprise}" for surprise in place.landscape.surprises)]
    found += [
        f"gone: run {run.name} ({run.id}) was removed while young"
        for run in place.runs.vanished()
        if run.id not in place.stranger.run_ids
    ]
    found += [f"stranger: {touched}" for touched in place.stranger.touched()]
    for ours, theirs in (both, both[::-1]):
        title = ours.home.site.title
        found += [f"{title}: {wrong}" for wrong in ours.wrongs]
        found += [f"{title}: {wrong}" for wrong in _crossings(ours, theirs)]
        found += [f"{title}: {wrong}" for wrong in _of_limits(ours, theirs)]
        found += [f"{title}: {wrong}" for wrong in _of_runs(place, ours, theirs)]
    found += _of_third(place, third)
    return found


def _crossings(ours: Records, theirs: Records) -> Iterator[str]:
    """Containers and jobs that are in the wrong place."""
    started = {container_id for _, container_id in ours.events.starts}
    for container_id in sorted(started & theirs.containers):
        yield f"crossing: its container {container_id[:12]} is on record at {theirs.home}"
    for job in ours.jobs:
        if f".{theirs.home}-" in job.name:
            yield f"crossing: it has job {job.pk} ({job.name}) of {theirs.home}"
    for job_id in sorted(ours.home.queued - {job.pk for job in ours.jobs}):
        yield f"gone: job {job_id} was removed"


def _of_limits(ours: Records, theirs: Records) -> Iterator[str]:
    """One's own limit holds, and the other's does not."""
    alive = 0
    over = 0
    for at, change in ours.events.changes:
        alive += change
        if change > 0 and alive > _most_allowed(ours.home, at):
            over = max(over, alive)
    if over:
        yield f"limit: {over} containers alive at once, over its own limit"
    reached = [
        (most, most_of_theirs)
        for since, until, limit, most_of_theirs in _phases(ours.home, theirs.home)
        if limit > most_of_theirs
        for most in [most_alive(ours.events, since, until)]
    ]
    if reached and all(most <= most_of_theirs for most, most_of_theirs in reached):
        yield f"limit: capped at {max(reached)[0]}, the limit of {theirs.home}"


def _most_allowed(home: Home, at: float) -> int:
    before = [limit for since, limit in home.limits if since <= at - LAG_SECONDS]
    lately = [limit for since, limit in home.limits if at - LAG_SECONDS < since <= at]
    return max([*before[-1:], *lately])


def _phases(home: Home, other: Home) -> Iterator[tuple[float, float, int, int]]:
    """Times within which no limit changes, with the limits of both."""
    times = sorted({since for whose in (home, other) for since, _ in whose.limits})
    for since, until in zip(times, [*times[1:], float("inf")], strict=True):
        ours, theirs = ([limit for begun, limit in whose.limits if begun <= since][-1] for whose in (home, other))
        yield since, until, ours, theirs


def most_alive(events: Events, since: float = 0, until: float = float("inf")) -> int:
    alive = most = 0
    for at, change in events.changes:
        alive += change
        if since <= at < until:
            most = max(most, alive)
    return most


def _of_runs(place: Place, ours: Records, theirs: Records) -> Iterator[str]:
    """Every flow run that is meant for it was done by its own processes, once, in its own database."""
    takers = place.runs.takers()
    asked = place.deployment_id(ours.home, "run-container-job", "on-demand")
    for run in place.runs.known.values():
        if run.id in place.stranger.run_ids:
            continue
        if owner(run) == ours.home.site.instance_id:
            foreign = takers.get(run.id, set()) - ours.home.site.pids
            if foreign and run.id not in theirs.home.misdirected:
                yield f"run: {run.name} ({run.id}) was taken by process {foreign}, which is not its own"
            if theirs.jobs_of(run):
                yield f"run: {run.name} ({run.id}) made a job at {theirs.home}"
        if run.deployment_id == asked:
            yield from _of_asked(ours, run)


def _of_asked(ours: Records, run: FlowRun) -> Iterator[str]:
    """A run of `run-container-job` at its own deployment."""
    jobs = ours.jobs_of(run)
    told: Any = run.state_type.value if run.state_type else ""
    if run.id in ours.home.misdirected:
        if jobs or told != "FAILED":
            yield f"run: {run.name} ({run.id}), which is meant for the other, ended {told}, with {len(jobs)} jobs"
        return
    if owner(run) != ours.home.site.instance_id:
        yield f"run: {run.name} ({run.id}) has the label of {owner(run) or 'nobody'}"
    if told == "SCHEDULED" or (told == "CANCELLED" and run.start_time is None):
        # Not begun.
        return
    if [_ENDS.get(Status(job.status)) for job in jobs] != [told]:
        yield f"run: {run.name} ({run.id}) ended {told}, its jobs {[job.status for job in jobs]}"


def _of_third(place: Place, events: Events) -> Iterator[str]:
    """It has a job in its queue, which nobody can run."""
    for name, _ in events.starts:
        yield f"third: container {name} was started"
    with place.third.opened():
        for job in ContainerJob.objects.exclude(name="never", status=Status.QUEUED):
            yield f"third: it has job {job.pk} ({job.name}), {job.status}"
    taken = {run_id for run_id, pids in place.runs.takers().items() if pids & place.third.pids}
    for run_id in sorted(taken):
        yield f"third: it took flow run {run_id}"


def left_behind(home: Home, jobs: list[ContainerJob], there: list[str]) -> list[str]:
    """Containers that are neither gone nor kept for a look."""
    kept = {container_name(home.site.instance_id, job.pk, job.attempt) for job in jobs if job.status == Status.FAILED}
    return [f"{home}: left behind: container {name}" for name in there if name.partition(" ")[0] not in kept]


def cells(place: Place, records: Records, violations: list[str], seed: int, seconds: float) -> Mapping[str, str]:
    """Its line in the table."""
    home = records.home
    mine = [run for run in place.runs.known.values() if owner(run) == home.site.instance_id]
    values: dict[str, object] = {
        "installation": home,
        "seed": seed,
        "jobs": len(records.jobs),
        "attempts": sum(len(records.attempts.get(job.pk, ())) for job in records.jobs),
        "starts": records.events.starts.total(),
        "flow runs": len(mine),
        "asked": home.counts["asked"],
        "misdirected": len(home.misdirected),
        "commands": home.counts["commands"],
        "restarts": home.counts["restarts"],
        "pauses": home.counts["pauses"],
        "limits set": home.counts["limits set"],
        "purges": home.counts["purges"],
        "purged runs": sum(run.id in place.runs.aged - place.runs.present for run in mine),
        "most alive": f"{most_alive(records.events)} of {max(limit for _, limit in home.limits[1:])}",
        "violations": sum(str(home) in violation for violation in violations),
        "seconds": round(seconds),
    }
    return {heading: str(value) for heading, value in values.items()}


def owner(run: FlowRun) -> str:
    """The id of the installation that its labels name."""
    return str(run.labels.get(INSTANCE_LABEL, ""))
