"""What has happened so far, and the promises that it must not have broken."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from container_manager.conf import get_settings
from container_manager.containers import INSTANCE_LABEL, container_name
from container_manager.models import ALIVE, ENDED, ContainerJob, DockerHost, Installation, JobAttempt, Reason, Status
from container_manager.transitions import from_now
from tests.fake_engine import FakeContainer, FakeEngine, Fleet

HOST_GRACE_SECONDS = get_settings().HOST_GRACE_SECONDS
#: What of a job that has ended nothing but a person changes.
_LAST_WORDS = ("status", "attempt", "reason", "exit_code", "last_error", "retry_count")


@dataclass
class History:
    fleet: Fleet
    max_concurrent: int
    instance_id: str = field(default_factory=lambda: Installation.load().instance_id)
    #: Containers that somebody else removed, or that were on a host that a person gave up; by name.
    taken: set[str] = field(default_factory=set)
    #: The rows as they were at the last check, jobs by id.
    rows: dict[int, ContainerJob] = field(default_factory=dict)
    hosts: list[DockerHost] = field(default_factory=list)
    _away: list[tuple[FakeEngine, list[FakeContainer]]] = field(default_factory=list)
    #: By job: at which attempt it was cancelled; …
    _cancelled: dict[int, int] = field(default_factory=dict)
    #: … what it said when it ended; and how many attempts were over when a person last retried it.
    _last_words: dict[int, dict[str, Any]] = field(default_factory=dict)
    _over_before: Counter[int] = field(default_factory=Counter)

    def ours(self) -> list[tuple[FakeEngine, FakeContainer]]:
        return [
            (engine, container)
            for engine in self.fleet.engines.values()
            for container in engine.containers.values()
            if container.labels.get(INSTANCE_LABEL) == self.instance_id
        ]

    def name_of(self, job_id: int, attempt: int) -> str:
        return container_name(self.instance_id, job_id, attempt)

    def lose_disk(self, engine: FakeEngine) -> None:
        """All of its containers vanish at once; in the end they are there again."""
        gone = [container for where, container in self.ours() if where is engine]
        for container in gone:
            del engine.containers[container.id]
        self._away.append((engine, gone))
        self.taken |= {container.name for container in gone}

    def bring_disks_back(self) -> None:
        for engine, gone in self._away:
            engine.containers |= {container.id: container for container in gone}
        self._away.clear()

    def are_hosts_sound(self) -> bool:
        is_up = all(engine.is_up for engine in self.fleet.engines.values())
        return is_up and not self._away and all(host.is_active for host in self.hosts)

    def give_up(self, host: DockerHost) -> None:
        """A person says that it will not come back."""
        self.taken |= {self.name_of(pk, row.attempt) for pk, row in self.rows.items() if row.slot_host_id == host.pk}

    def note_silent_hosts(self) -> None:
        """Jobs of a host that nobody has reached for long hold up no others, and so may be too many with them."""
        silent = ContainerJob.objects.alive().filter(slot_host__last_seen_at__lt=from_now(-HOST_GRACE_SECONDS))
        if silent.exists():
            self.max_concurrent = sum(DockerHost.objects.values_list("max_concurrent_jobs", flat=True))

    def is_cancelled(self, job: ContainerJob) -> None:
        self._cancelled[job.pk] = job.attempt

    def begins_anew(self, job: ContainerJob) -> None:
        """Retried by a person."""
        self._last_words.pop(job.pk, None)
        self._cancelled.pop(job.pk, None)
        self._over_before[job.pk] = job.attempts.count()

    def check(self) -> None:
        rows = ContainerJob.objects.order_by("pk").only("slot_host_id", "max_retries", *_LAST_WORDS)
        self.rows = {row.pk: row for row in rows}
        self.hosts = list(DockerHost.objects.all())
        recorded = JobAttempt.objects.order_by().only("job_id", "number", "reason", "exit_code")
        attempts = {self.name_of(attempt.job_id, attempt.number): attempt for attempt in recorded}
        self._check_starts(attempts)
        self._check_slots()
        self._check_tries(attempts)
        self._check_last_words()
        self._check_results(attempts)

    def _check_starts(self, attempts: dict[str, JobAttempt]) -> None:
        starts = self._starts()
        assert [name for name, count in starts.items() if count > 1] == [], "an attempt was started twice"
        under_way = {self.name_of(row.pk, row.attempt) for row in self.rows.values() if row.status in ALIVE}
        for name in starts.keys() - under_way:
            assert name in attempts, f"{name} ran and is forgotten"
        running = {container.name for _, container in self.ours() if container.state == "running"}
        assert running - under_way - self.taken == set(), "a container runs on after its attempt was over"

    def _starts(self) -> Counter[str]:
        return Counter(name for engine in self.fleet.engines.values() for name in engine.starts)

    def _check_slots(self) -> None:
        held = Counter(row.slot_host_id for row in self.rows.values() if row.status in ALIVE)
        for host in self.hosts:
            assert held[host.pk] <= host.max_concurrent_jobs, f"too many jobs on {host.name}"
        assert held.total() <= self.max_concurrent, "too many jobs"

    def _check_tries(self, attempts: dict[str, JobAttempt]) -> None:
        over = Counter(attempt.job_id for attempt in attempts.values())
        for pk, row in self.rows.items():
            assert over[pk] - self._over_before[pk] <= row.max_retries + 1, f"job {pk} was tried too often"
            assert row.retry_count <= row.max_retries, f"job {pk} was charged too often"

    def _check_last_words(self) -> None:
        for pk, row in self.rows.items():
            assert row.attempt <= self._cancelled.get(pk, row.attempt), f"job {pk} was cancelled, and came back"
            if pk in self._last_words or row.status in ENDED:
                says = {name: getattr(row, name) for name in _LAST_WORDS}
                assert self._last_words.setdefault(pk, says) == says, f"job {pk} had ended, and changed"

    def _check_results(self, attempts: dict[str, JobAttempt]) -> None:
        codes = dict(end for engine in self.fleet.engines.values() for end in engine.ends)
        starts = self._starts()
        for name, attempt in attempts.items():
            if name in starts and attempt.exit_code is not None:
                assert attempt.exit_code == codes.get(name), f"{name} has the wrong exit code"
            assert name not in starts or attempt.reason != Reason.LAUNCH, f"{name} ran, and is said not to have"
            if attempt.reason == Reason.LOST:
                assert name in self.taken, f"{name} is said to be lost"
        for pk, row in self.rows.items():
            if row.status == Status.COMPLETED:
                assert codes.get(self.name_of(pk, row.attempt)) == 0 == row.exit_code, f"job {pk} did not complete"
        there = {container.name for _, container in self.ours()}
        for name in codes.keys() - there - self.taken:
            assert name in attempts, f"{name} was removed before its end was recorded"
