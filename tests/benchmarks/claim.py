"""A claim of ten, at any depth of the queue and whatever lies in its way."""

import time
from collections.abc import Callable, Iterator

from django.db import connection

from container_manager.claiming import claim, promote_due
from container_manager.models import ContainerJob, DockerHost, Status

from . import rows
from .figures import Figure

CLAIMED = 10
ROUNDS = 30
DEEP = 1_000_000


def measure() -> Iterator[Figure]:
    """p50 through the ORM, in ms; the reference is the same claim at a depth of 1,000."""
    shallow = _claims(lambda: _queue(1_000))
    plain = _plain_sql()
    yield _figure("claim of 10 of 1 k", shallow, plain, "plain SQL, ms", "p50 ≤ 5 ms", _median(shallow) <= 5)
    for name, fill in (
        ("claim of 10 of 1 M", lambda: _queue(DEEP)),
        ("… behind 950,000 scheduled ahead of them", _behind_scheduled),
        ("… behind 950,000 pinned to a full host", _behind_pinned),
        ("… while 900,000 fall due", _while_falling_due),
    ):
        samples = _claims(fill)
        is_reached = _median(samples) <= 5 and _median(samples) / _median(shallow) <= 1.5
        yield _figure(name, samples, shallow, "of 1 k, ms", "p50 ≤ 5 ms, ratio ≤ 1.5", is_reached)
    chunks = list(_promotions())
    yield Figure(
        name="promotion of 900,000, per chunk",
        database=connection.vendor,
        unit="ms",
        ours=chunks,
        goal="a chunk ≤ 100 ms",
        is_reached=_quantile(chunks, 0.95) <= 100,
    )


def _figure(name: str, ours: list[float], reference: list[float], against: str, goal: str, reached: bool) -> Figure:
    return Figure(name, connection.vendor, "ms", ours, reference, against, goal, reached)


def _claims(fill: Callable[[], None]) -> list[float]:
    rows.empty()
    host = DockerHost.objects.create(name="a", max_concurrent_jobs=10**6)
    fill()
    rows.analyze()
    samples = []
    for _ in range(ROUNDS + 3):
        begin = time.perf_counter()
        taken = claim(10**6, {host.pk}, limit=CLAIMED)
        samples.append((time.perf_counter() - begin) * 1000)
        assert len(taken.jobs) == CLAIMED
    return samples[3:]


def _plain_sql() -> list[float]:
    """What the database itself needs to find ten rows and mark them."""
    samples = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        picked = rows.fetch(
            f"SELECT id FROM {rows.TABLE} WHERE status = 'queued' AND pinned_host_id IS NULL "
            "ORDER BY priority DESC, queued_at, id LIMIT 10"
        )
        marks = ", ".join(["%s"] * len(picked))
        with connection.cursor() as cursor:
            cursor.execute(
                f"UPDATE {rows.TABLE} SET updated_at = updated_at WHERE id IN ({marks})", [row[0] for row in picked]
            )
        samples.append((time.perf_counter() - begin) * 1000)
    return samples


def _queue(count: int) -> None:
    rows.copies(count, status="'queued'", queued_at=rows.moment("-n %% 100000"), priority="n %% 101")


def _behind_scheduled() -> None:
    rows.copies(950_000, status="'scheduled'", scheduled_for=rows.moment("3600 + n"), priority="100")
    _queue(50_000)


def _behind_pinned() -> None:
    full = DockerHost.objects.create(name="full", max_concurrent_jobs=0)
    rows.copies(950_000, status="'queued'", queued_at=rows.moment("-n"), priority="100", pinned_host_id=str(full.pk))
    _queue(50_000)


def _while_falling_due() -> None:
    rows.copies(900_000, status="'scheduled'", scheduled_for=rows.moment("-n / 1000.0"), priority="100")
    _queue(100_000)


def _promotions() -> Iterator[float]:
    """Chunk by chunk, with the 900,000 of the last claim's table."""
    while ContainerJob.objects.filter(status=Status.SCHEDULED).exists():
        begin = time.perf_counter()
        promote_due(until=0)
        yield (time.perf_counter() - begin) * 1000


def _median(samples: list[float]) -> float:
    return _quantile(samples, 0.5)


def _quantile(samples: list[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
