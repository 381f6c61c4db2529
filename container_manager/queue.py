"""The queue: what people and flows do with jobs."""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext, suppress
from datetime import datetime
from typing import Any

from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models.functions import Now
from django.utils.timezone import is_naive

from . import metrics, shutdown
from .batch import launch_batch
from .cancelling import CancelledRuns, cancel
from .capacity import Capacity, measure
from .claiming import LOCK_SECONDS, claim, next_jobs, promote_due, ready_jobs
from .enforcing import enforce
from .engine import DockerEngine, Engine, MakeEngine
from .exceptions import DatabaseBusy, InvalidTransition
from .harvesting import harvest
from .hosts import Hosts
from .locks import transaction_within
from .models import ENDED, ContainerJob, DockerHost, Installation, Reason, Status
from .observing import observe
from .outlook import Outlook, look_ahead
from .pulling import LOOK_SECONDS, Pulls
from .purging import purge
from .recovering import end_with_host, recover
from .rounds import OnRound, Rounds
from .shutdown import ShutdownEvent
from .transitions import locked, move, move_many, show
from .types import BatchResult, EndedJob, Limits, LoopStats, PurgeReport, QueueMetrics
from .watching import LogWatches

#: seconds; a claim alone gives a promotion this long.
_PROMOTE_SECONDS = 10
#: Rows per INSERT.
_INSERT_CHUNK = 1000


Launch = Callable[[int, float], BatchResult]


class QueueManager:
    """The verbs of the queue. One per process: it keeps the connections to the hosts."""

    def __init__(self, make_engine: MakeEngine = DockerEngine) -> None:
        self._hosts = Hosts(make_engine)
        self._pulls = Pulls()
        self._watches = LogWatches()
        #: Held while one of several threads speaks to the hosts.
        self._one_at_a_time = threading.Lock()

    # What people do with a job.

    def queue_job(
        self, job: ContainerJob, schedule_for: datetime | None = None, priority: int | None = None
    ) -> ContainerJob:
        """Queue a pending job, or schedule it for a time (aware). It is checked again, and saved if it is new.

        Raises Django's `ValidationError`, by field, and `InvalidTransition` unless the job is pending.
        """
        _check_time(schedule_for)
        if job.pk is not None:
            # The row is queued, whatever was set on this object and not saved.
            job.refresh_from_db()
        if priority is not None:
            job.priority = priority
        job.validated_spec()
        with transaction.atomic():
            if job.pk is None:
                job.save(force_insert=True)
            hint = "was it queued already? A job that has ended is retried"
            self._to_queue(job, schedule_for, (Status.PENDING,), hint)
        return job

    def queue_jobs(self, jobs: Iterable[ContainerJob]) -> list[ContainerJob]:
        """Queue many jobs, in a few statements: unsaved ones (`ContainerJob.objects.build`) and pending ones.

        All or none. Raises Django's `ValidationError`, by field, and `InvalidTransition` as `queue_job`.
        """
        jobs = list(jobs)
        for job in jobs:
            job.validated_spec()
        new = [job for job in jobs if job.pk is None]
        pending = {job.pk for job in jobs if job.pk is not None}
        with transaction.atomic():
            moved = move_many(locked(pending, Status.PENDING), Status.PENDING, Status.QUEUED) if pending else 0
            if moved != len(pending):
                raise InvalidTransition(f"{len(pending) - moved} of the jobs are not pending; none was queued")
            # One value for all, and no expression: then the database takes all rows as one statement's arrays.
            now = Installation.now()
            for job in new:
                job.status, job.queued_at, job.created_at, job.updated_at = Status.QUEUED, now, now, now
            ContainerJob.objects.bulk_create(new, batch_size=_INSERT_CHUNK)
        for job in jobs:
            # What the database wrote is loaded at its next use.
            show(job, {"status": Status.QUEUED, "queued_at": Now(), "updated_at": Now()})
        return jobs

    def dequeue_job(self, job: ContainerJob) -> ContainerJob:
        """Take a job that has not been claimed back to `pending`."""
        job.refresh_from_db()
        if not move(job, Status.PENDING):
            raise InvalidTransition(f"job {job.pk} has just been claimed: cancel it")
        return job

    def cancel_job(self, job: ContainerJob) -> Status:
        """Cancel a job in any status that is not an end; the status after the call.

        An alive job is stopped by the next pass: TERM, then KILL after the grace. Its logs are kept.
        Raises `InvalidTransition` if it has ended.
        """
        return cancel(job)

    def retry_job(
        self,
        job: ContainerJob,
        schedule_for: datetime | None = None,
        *,
        is_charged: bool = False,
        flow_run_id: str | None = None,
    ) -> ContainerJob:
        """Run an ended job anew, with all of its retries, or charged as one of them. Its attempts stay.

        `flow_run_id`: the flow run that waits for it from now on. Raises Django's `ValidationError` and
        `InvalidTransition` unless it has ended.
        """
        _check_time(schedule_for)
        job.refresh_from_db()
        job.validated_spec()
        charged = {"retry_count": job.retry_count + 1} if is_charged else {}
        hint = "only a job that has ended is retried"
        self._to_queue(job, schedule_for, ENDED, hint, flow_run_id=flow_run_id, **charged)
        return job

    def declare_host_lost(self, host: DockerHost) -> list[EndedJob]:
        """Drain a host that will not come back, and end its jobs as `lost`, or run them again where they allow it."""
        DockerHost.objects.filter(pk=host.pk).update(is_active=False)
        ended = []
        for job in ContainerJob.objects.filter(slot_host=host).order_by("pk"):
            attempt = job.attempt
            status = end_with_host(job, host)
            if status is not None:
                reason, error = job.reason or Reason.LOST, job.last_error
                ended.append(EndedJob(job_id=job.pk, attempt=attempt, status=status, reason=reason, error=error))
        return ended

    # What the queue says.

    def get_ready_jobs(self, limit: int | None = None) -> list[ContainerJob]:
        """The jobs that are ready, in the order in which claims take them."""
        return ready_jobs(limit)

    def next_jobs(self, capacity: Capacity) -> list[ContainerJob]:
        """The jobs that a claim with this `capacity` would take now, in its order."""
        return next_jobs(capacity)

    def get_worker_metrics(self) -> QueueMetrics:
        """How many jobs are in which state, how long the first one has waited, and the hosts' loads."""
        return metrics.measure_queue()

    def capacity(self, max_concurrent: int) -> Capacity:
        """Free slots, without asking a host: on those that answered this process last, or on any."""
        reachable = self._hosts.reached_ids
        if reachable is None:
            reachable = set(DockerHost.objects.active().filter(last_error="").values_list("pk", flat=True))
        # On a new database there is no row yet, and looking makes none.
        installation = Installation.objects.filter(pk=1).first() or Installation()
        return measure(max_concurrent, installation.tag_limits, reachable)

    def outlook(self) -> Outlook:
        """Why jobs wait, for any number of them, by what the database knows now: four queries at most."""
        return look_ahead()

    def why_waiting(self, job: ContainerJob) -> str:
        """Why a job does not run yet, and how many are before it, in one sentence; empty if it runs or has ended."""
        return self.outlook().why(job, with_place=True)

    def keep_limits(self, limits: Limits) -> None:
        """Remember the Prefect tags' limits: the claim keeps to them, also while Prefect is away.

        If the queue's lock is not free for two seconds, the old ones hold until a later round.
        """
        # Read first: a statement that changes nothing would wait for the lock all the same.
        if Installation.load().tag_limits == limits:
            return
        with suppress(DatabaseBusy), transaction_within(LOCK_SECONDS):
            Installation.objects.filter(pk=1).update(limits=limits.model_dump())

    # What passes do.

    def claim(
        self, max_concurrent: int, limit: int | None = None, only: Collection[int] | None = None
    ) -> list[ContainerJob]:
        """Promote what is due and claim what may start; the claimed jobs are the caller's to launch."""
        Installation.load()
        connections = self._hosts.reached()
        promote_due(time.monotonic() + _PROMOTE_SECONDS)
        return claim(max_concurrent, connections.keys(), limit=limit, only=only).jobs

    def launch_next_batch(
        self, max_concurrent: int = 5, timeout: float = 30, *, only: Collection[int] | None = None
    ) -> BatchResult:
        """Claim and launch until slots or ready jobs run out, for five seconds at most.

        `max_concurrent`: containers alive at once, over all workers. `timeout`: seconds that locks and a busy
        database are waited for. `only`: ids of the jobs to choose from. Errors are in the result. In a pass that
        stays, what ends meanwhile is harvested, and its slots filled.
        """
        if max_concurrent < 1:
            raise ValueError("max_concurrent must be at least 1")
        if timeout <= 0:
            raise ValueError("timeout must be more than 0")
        return launch_batch(self._hosts, self._pulls, max_concurrent, timeout, only)

    def process_queue_continuous(
        self,
        max_concurrent: int,
        poll_interval: float,
        shutdown_event: ShutdownEvent | None = None,
        *,
        timeout: float = 30,
        work_seconds: float | None = None,
        launch: Launch | None = None,
        cancelled_runs: CancelledRuns | None = None,
    ) -> LoopStats:
        """Rounds until `shutdown_event` is set; with `work_seconds`, for that long (0: one round).

        `launch(max_concurrent, timeout)` takes the place of `launch_next_batch`; `cancelled_runs` says with which
        flow runs their jobs are cancelled. A failing database ends only a loop with `work_seconds`.
        """
        asked = shutdown.stopping_when(shutdown_event.is_set) if shutdown_event else nullcontext()
        with asked:
            rounds = self._rounds(max_concurrent, timeout, launch, cancelled_runs)
            return rounds.for_ever(poll_interval) if work_seconds is None else rounds.for_a_while(work_seconds)

    def process_queue_until(
        self,
        is_done: Callable[[], bool],
        max_concurrent: int,
        *,
        timeout: float = 30,
        launch: Launch | None = None,
        cancelled_runs: CancelledRuns | None = None,
        on_round: OnRound = lambda report: None,
    ) -> None:
        """Wait until `is_done`, which is asked twice a second, or a stop is asked for. Several threads may.

        One round at once; more, each told to `on_round`, while nobody else does them. Waits for a failing database.
        """
        self._rounds(max_concurrent, timeout, launch, cancelled_runs).until(is_done, on_round, self._one_at_a_time)

    def _rounds(
        self, max_concurrent: int, timeout: float, launch: Launch | None, cancelled_runs: CancelledRuns | None
    ) -> Rounds:
        step = launch or self.launch_next_batch
        return Rounds(self._hosts, self._pulls, self._watches, lambda: step(max_concurrent, timeout), cancelled_runs)

    def look_after(self, job: ContainerJob) -> list[EndedJob]:
        """Harvest, stop or recover one alive job, as a pass would."""
        with self._one_at_a_time:
            view = observe(self._hosts.reached(), Installation.load().instance_id, chosen=[job.pk])
            ended, _ = harvest(view)
            enforce(view)
            recover(view)
        return ended

    def purge(self, *, dry_run: bool = False) -> PurgeReport:
        """Remove containers, logs and jobs that the settings KEEP_… keep no longer; with `dry_run` only count them."""
        with self._one_at_a_time:
            return purge(self._hosts, dry_run=dry_run)

    def engine_of(self, host: DockerHost) -> Engine | None:
        """An engine of the caller's own, for streams that last; None: the host's address is not allowed here."""
        return self._hosts.engine_of(host)

    def await_pulls(self) -> None:
        """Wait for the pulls of this process, which end with it, until a stop is asked for."""
        while self._pulls and not shutdown.is_stopping():
            time.sleep(LOOK_SECONDS)
            self._pulls.settle()

    def _to_queue(
        self, job: ContainerJob, schedule_for: datetime | None, sources: Collection[Status], hint: str, **fields: Any
    ) -> None:
        to = Status.QUEUED if schedule_for is None else Status.SCHEDULED
        if job.status not in sources:
            raise InvalidTransition(f"job {job.pk} is {job.status}: {hint}")
        if schedule_for is not None:
            fields["scheduled_for"] = schedule_for
        if not move(job, to, priority=job.priority, **fields):
            raise InvalidTransition(f"job {job.pk} has just changed: {hint}")


def _check_time(schedule_for: datetime | None) -> None:
    if schedule_for is None:
        return
    if not isinstance(schedule_for, datetime):
        raise ValidationError(
            {"schedule_for": f"must be a datetime with a time zone, not {type(schedule_for).__name__}"}
        )
    if is_naive(schedule_for):
        raise ValidationError({"schedule_for": "must have a time zone: which moment it names is a guess otherwise"})


queue_manager = QueueManager()
