"""What a run came to: its line in the table, and every promise that was broken, in words."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from django.db.models import Q

from container_manager.containers import container_name
from container_manager.models import ENDED, ContainerJob, Installation, JobAttempt

from . import workload
from .faults import CERTAIN, LIKELY, Tally
from .watching import Events, Samples
from .worker import Plan


@dataclass(frozen=True)
class Seen:
    """What the driver has seen of a run. The rest is in the database."""

    events: Events
    samples: Samples
    faults: Tally
    #: Containers that nobody removed.
    left: Sequence[str]
    #: What the workers said that no fault ended.
    crashes: Sequence[str]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """`cells` by heading. `violations`: a sentence each."""

    cells: Mapping[str, str]
    violations: list[str]


def judge(plan: Plan, database: str, seen: Seen) -> Verdict:
    attempts = attempts_by_job()
    jobs = list(ContainerJob.objects.order_by("pk"))
    twice = doubles(seen.events)
    losses = [*lost_runs(seen.events, jobs), *wrong_records(jobs, attempts)]
    leftovers = [*unfinished(jobs, attempts), *held(), *(f"left behind: container {name}" for name in seen.left)]
    most_alive = max(seen.events.most_alive, seen.samples.most_alive)
    cells = {
        "database": database,
        "seed": plan.seed,
        "jobs": len(jobs),
        "kills": seen.faults["kill"].total(),
        "stalls": seen.faults["stall"].total(),
        "lost answers": seen.faults["lose"].total(),
        "attempts": sum(map(len, attempts.values())),
        "starts": seen.events.starts.total(),
        "doubles": len(twice),
        "losses": len(losses),
        "leftovers": len(leftovers),
        "most alive": f"{most_alive} of {plan.cap}",
        "seconds": round(seen.seconds),
    }
    over = [f"{most_alive} alive at once, by the Engine or the database"] if most_alive > plan.cap else []
    refused = [f"stopped by a constraint alone, {times} times: {sql}" for sql, times in seen.faults["refuse"].items()]
    violations = [*twice, *losses, *leftovers, *over, *refused, *_hollow(seen.faults), *seen.crashes]
    return Verdict({heading: str(value) for heading, value in cells.items()}, violations)


def lines(cells: Mapping[str, str], *, is_first: bool) -> Iterable[str]:
    """A line of a table in Markdown; before the first, the headings."""
    widths = {heading: max(len(heading), 10) for heading in cells}
    if is_first:
        yield "| " + " | ".join(heading.ljust(width) for heading, width in widths.items()) + " |"
        yield "|" + "|".join("-" * (width + 2) for width in widths.values()) + "|"
    yield "| " + " | ".join(cell.ljust(widths[heading]) for heading, cell in cells.items()) + " |"


def describe(faults: Tally) -> str:
    hit = faults["kill"].keys() | faults["stall"].keys()
    unseen = ", ".join(sorted((CERTAIN | LIKELY) - faults["pass"].keys())) or "none"
    passings, points = faults["pass"].total(), len(faults["pass"])
    return f"{passings} passings of {points} points, faults at {len(hit)}; never passed: {unseen}"


def attempts_by_job() -> Mapping[int, list[JobAttempt]]:
    attempts: dict[int, list[JobAttempt]] = defaultdict(list)
    for attempt in JobAttempt.objects.order_by("job", "number"):
        attempts[attempt.job_id].append(attempt)
    return attempts


def doubles(events: Events) -> list[str]:
    """A name stands for one attempt: one container, started at most once."""
    by_name: Counter[str] = Counter()
    for (name, _), times in events.starts.items():
        by_name[name] += times
    return [f"double start: {name} was started {times} times" for name, times in by_name.items() if times > 1]


def lost_runs(events: Events, jobs: Sequence[ContainerJob]) -> list[str]:
    """What ran, by the Engine, and what ran, by the attempts of ended jobs, must be the same to the container."""
    instance_id = Installation.load().instance_id
    ran = JobAttempt.objects.filter(started_at__isnull=False).values_list("job_id", "number", "container_id")
    recorded = {(container_name(instance_id, job, number), container_id) for job, number, container_id in ran}
    # The one that is under way has no attempt yet.
    current = {container_name(instance_id, job.pk, job.attempt) for job in jobs if job.status not in ENDED}
    started = {(name, container_id) for name, container_id in events.starts if name not in current}
    return [
        *(f"lost: {name} ran, and no attempt says so" for name, _ in sorted(started - recorded)),
        *(f"lost: the attempt of {name} ran, and the Engine does not say so" for name, _ in sorted(recorded - started)),
    ]


def wrong_records(jobs: Sequence[ContainerJob], attempts: Mapping[int, list[JobAttempt]]) -> list[str]:
    return [
        f"lost: {what} of {_tell(job, attempts[job.pk])}"
        for job in jobs
        if job.status in ENDED
        for what in workload.wrongs(job, attempts[job.pk])
    ]


def unfinished(jobs: Sequence[ContainerJob], attempts: Mapping[int, list[JobAttempt]]) -> list[str]:
    return [f"not ended in time: {_tell(job, attempts[job.pk])}" for job in jobs if job.status not in ENDED]


def held() -> list[str]:
    held = ContainerJob.objects.filter(Q(claimed_until__isnull=False) | ~Q(claim_token="") | Q(slot_host__isnull=False))
    return [f"left behind: a lease or a slot of job {job.pk} ({job.status})" for job in held]


def _hollow(faults: Tally) -> list[str]:
    """A seam that is gone would let every run pass."""
    unseen = sorted(CERTAIN - faults["pass"].keys())
    nothing = [] if faults["kill"] or faults["stall"] else ["no worker died or stalled"]
    return [*(f"no worker passed the point `{point}`" for point in unseen), *nothing]


def _tell(job: ContainerJob, attempts: Sequence[JobAttempt]) -> str:
    tries = "; ".join(
        f"attempt {a.number}: {a.reason}, code {a.exit_code}, stdout {a.stdout!r}, {a.error!r}" for a in attempts
    )
    return (
        f"job {job.pk} ({job.name}): {job.status}, {job.reason or 'no reason'}, code {job.exit_code}, attempt "
        f"{job.attempt}, {job.retry_count} retries of {job.max_retries}, {job.last_error!r} [{tries}]"
    )
