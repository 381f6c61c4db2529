"""What a run came to: its line in the table, and every promise that was broken, in words."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from django.db.models import Q

from container_manager.containers import container_name
from container_manager.models import ENDED, ContainerJob, Installation, JobAttempt

from . import workload
from .faults import CERTAIN, LIKELY
from .watching import Events, Samples
from .worker import Plan

HEADINGS = ("database", "seed", "jobs", "kills", "stalls", "attempts", "starts", "doubles", "losses", "leftovers",
            "most alive", "seconds")  # fmt: skip
_WIDTHS = tuple(max(len(heading), 8) for heading in HEADINGS)
RULE = "|" + "|".join("-" * (width + 2) for width in _WIDTHS) + "|"


def line(cells: Sequence[str]) -> str:
    """Of a table in Markdown."""
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)) + " |"


def points(counts: Mapping[str, Counter[str]]) -> str:
    passed, hit = counts["pass"].keys(), counts["kill"].keys() | counts["stall"].keys()
    unseen = ", ".join(sorted((CERTAIN | LIKELY) - passed)) or "none"
    return f"{counts['pass'].total()} passings of {len(passed)} points, faults at {len(hit)}; never passed: {unseen}"


@dataclass(frozen=True)
class Verdict:
    cells: tuple[str, ...]
    violations: list[str]
    #: `pass`, `kill`, `stall` -> point -> times.
    counts: Mapping[str, Counter[str]]


def judge(
    plan: Plan,
    database: str,
    counts: Mapping[str, Counter[str]],
    events: Events,
    samples: Samples,
    leftovers: Sequence[str],
    crashes: Sequence[str],
    seconds: float,
) -> Verdict:
    jobs = list(ContainerJob.objects.order_by("pk"))
    attempts = defaultdict(list)
    for attempt in JobAttempt.objects.order_by("job", "number"):
        attempts[attempt.job_id].append(attempt)
    doubles = _doubles(events)
    losses = [*_lost_starts(events), *_wrong_records(jobs, attempts)]
    held = ContainerJob.objects.filter(Q(claimed_until__isnull=False) | ~Q(claim_token="") | Q(slot_host__isnull=False))
    left = [*(f"container {name}" for name in leftovers), *(f"lease or slot of job {job.pk}" for job in held)]
    most_alive = max(events.most_alive, samples.most_alive)
    over = [f"{most_alive} alive at once, by the Engine or the database; the cap is {plan.cap}"]
    unseen = sorted(CERTAIN - counts["pass"].keys())
    faults = counts["kill"].total() + counts["stall"].total()
    violations = [
        *doubles, *losses, *(f"left behind: {what}" for what in left), *(over if most_alive > plan.cap else []),
        *(f"no worker passed the point `{point}`" for point in unseen),
        *(["no worker died or stalled"] if not faults else []), *crashes,
    ]  # fmt: skip
    numbers = (
        len(jobs), counts["kill"].total(), counts["stall"].total(), sum(map(len, attempts.values())),
        events.starts.total(), len(doubles), len(losses), len(left),
    )  # fmt: skip
    cells = (database, str(plan.seed), *map(str, numbers), f"{most_alive} of {plan.cap}", f"{seconds:.0f}")
    return Verdict(cells, violations, counts)


def _doubles(events: Events) -> list[str]:
    """A name stands for one attempt: one container, started at most once."""
    by_name: Counter[str] = Counter()
    for (name, _), times in events.starts.items():
        by_name[name] += times
    return [f"double start: {name} was started {times} times" for name, times in by_name.items() if times > 1]


def _lost_starts(events: Events) -> list[str]:
    """What ran and what the attempts say ran must be the same, to the container."""
    instance_id = Installation.load().instance_id
    ran = JobAttempt.objects.filter(started_at__isnull=False)
    recorded = {(container_name(instance_id, job, number), container) for job, number, container in
                ran.values_list("job_id", "number", "container_id")}  # fmt: skip
    started = events.starts.keys()
    return [
        *(f"lost: {name} ran and has no attempt" for name, _ in sorted(started - recorded)),
        *(
            f"lost: the attempt of {name} says that it ran, the Engine does not"
            for name, _ in sorted(recorded - started)
        ),
    ]


def _wrong_records(jobs: Sequence[ContainerJob], attempts: Mapping[int, list[JobAttempt]]) -> list[str]:
    return [
        f"lost: {what} of {_describe(job, attempts[job.pk])}"
        for job in jobs
        for what in (workload.wrongs(job, attempts[job.pk]) if job.status in ENDED else ["the result"])
    ]


def _describe(job: ContainerJob, attempts: Sequence[JobAttempt]) -> str:
    tries = "; ".join(
        f"attempt {a.number}: {a.reason}, code {a.exit_code}, stdout {a.stdout!r}, {a.error!r}" for a in attempts
    )
    return (
        f"job {job.pk} ({job.name}): {job.status}, {job.reason or 'no reason'}, code {job.exit_code}, attempt "
        f"{job.attempt}, {job.retry_count} retries of {job.max_retries}, {job.last_error!r} [{tries}]"
    )
