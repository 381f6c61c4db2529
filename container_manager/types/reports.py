"""What travels up from the queue: the limits it keeps to, what a call, a round or a flow run did, its figures."""

from datetime import datetime
from typing import Generic, Literal, TypeVar

from .values import Frozen

#: Prefect tags. The concurrency limit of a tag is the cap of what it names.
JOB_TAG = "container-job"
HOST_TAG_PREFIX = "docker-host:"


class Limits(Frozen):
    """The limits of the Prefect tags. A tag without a limit is absent and bounds nothing."""

    total: int | None = None
    hosts: dict[str, int] = {}


class JobError(Frozen):
    job_id: int
    error: str


class EndedJob(Frozen):
    """A job whose attempt ended: `status` is what the row says now, so `scheduled` means a retry."""

    job_id: int
    attempt: int
    status: str
    reason: str
    exit_code: int | None = None
    error: str = ""


class BatchResult(Frozen):
    """What one call of `launch_next_batch` did."""

    launched: int = 0
    job_ids: tuple[int, ...] = ()
    errors: tuple[JobError, ...] = ()
    #: of jobs that ended `failed` with reason `launch`.
    failed_ids: tuple[int, ...] = ()
    #: jobs that went back to the queue uncharged, for a pull or a host that did not answer.
    handed_back: int = 0
    #: harvested meanwhile, to free their slots.
    ended: tuple[EndedJob, ...] = ()
    #: why no more was launched, in words; empty if nothing more was ready.
    limit: str = ""
    #: the limit on launch tasks was reached, so that nothing was tried.
    throttled: bool = False

    def __add__(self, other: "BatchResult") -> "BatchResult":
        return BatchResult(
            launched=self.launched + other.launched,
            job_ids=self.job_ids + other.job_ids,
            errors=self.errors + other.errors,
            failed_ids=self.failed_ids + other.failed_ids,
            handed_back=self.handed_back + other.handed_back,
            ended=self.ended + other.ended,
            limit=other.limit,
            throttled=other.throttled,
        )


class RoundReport(Frozen):
    batch: BatchResult = BatchResult()
    ended: tuple[EndedJob, ...] = ()
    #: jobs that were sent TERM or KILL.
    stopped_ids: tuple[int, ...] = ()
    recovered_ids: tuple[int, ...] = ()
    #: what a person should look at, a sentence each.
    anomalies: tuple[str, ...] = ()


_T = TypeVar("_T")


def _last(values: tuple[_T, ...], count: int) -> tuple[_T, ...]:
    return values[-count:]


#: What a loop that runs for days remembers; the counts go on.
KEPT_ERRORS, KEPT_IDS = 20, 1000


class LoopStats(Frozen):
    """The sum of many rounds. Sums are complete; of ids and errors only the last are kept."""

    iterations: int = 0
    jobs_launched: int = 0
    jobs_ended: int = 0
    jobs_stopped: int = 0
    jobs_recovered: int = 0
    jobs_handed_back: int = 0
    error_count: int = 0
    errors: tuple[JobError, ...] = ()
    job_ids: tuple[int, ...] = ()
    failed_ids: tuple[int, ...] = ()
    ended: tuple[EndedJob, ...] = ()
    anomalies: tuple[str, ...] = ()
    limit: str = ""
    throttled: bool = False

    @property
    def is_idle(self) -> bool:
        return not (
            self.jobs_launched
            or self.jobs_ended
            or self.jobs_stopped
            or self.jobs_recovered
            or self.jobs_handed_back
            or self.error_count
        )

    def plus(self, report: RoundReport) -> "LoopStats":
        batch = report.batch
        anomalies = tuple(dict.fromkeys(self.anomalies + report.anomalies))
        return LoopStats(
            iterations=self.iterations + 1,
            jobs_launched=self.jobs_launched + batch.launched,
            jobs_ended=self.jobs_ended + len(report.ended),
            jobs_stopped=self.jobs_stopped + len(report.stopped_ids),
            jobs_recovered=self.jobs_recovered + len(report.recovered_ids),
            jobs_handed_back=self.jobs_handed_back + batch.handed_back,
            error_count=self.error_count + len(batch.errors),
            errors=_last(self.errors + batch.errors, KEPT_ERRORS),
            job_ids=_last(self.job_ids + batch.job_ids, KEPT_IDS),
            failed_ids=_last(self.failed_ids + batch.failed_ids, KEPT_IDS),
            ended=_last(self.ended + report.ended, KEPT_IDS),
            anomalies=_last(anomalies, KEPT_ERRORS),
            limit=batch.limit,
            throttled=batch.throttled,
        )


class ProcessResult(Frozen):
    """What `process_job` did. `success`: the work on the job was done, whatever the job's own exit code."""

    success: bool
    error: str = ""
    message: str = ""


class JobResult(Frozen):
    """How a job ended, for whoever waited for it."""

    job_id: int
    name: str = ""
    #: completed, failed or cancelled; another one if nobody waits any longer.
    status: str
    #: exit_code, oom, timeout, launch, lost, host_interrupted or cancelled.
    reason: str = ""
    exit_code: int | None = None
    oom_killed: bool = False
    #: a sentence; empty after a success.
    error: str = ""
    #: of the last attempt, from 1; 0: it was never launched.
    attempt: int = 0
    host: str = ""
    queued_at: datetime | None = None
    launched_at: datetime | None = None
    finished_at: datetime | None = None
    #: the end of what it wrote; the whole is stored with the job.
    stdout_tail: str = ""
    stderr_tail: str = ""


class HostLoad(Frozen):
    name: str
    alive: int
    max_concurrent_jobs: int
    is_active: bool


class QueueMetrics(Frozen):
    ready_now: int
    scheduled_future: int
    launching: int
    running: int
    failed: int
    launch_failed: int
    oldest_wait_seconds: float | None
    hosts: tuple[HostLoad, ...]


class ProcessedJob(Frozen):
    """What legacy mode did with one job; `status` is the one that it was found in."""

    job_id: int
    status: str
    success: bool
    error: str = ""
    message: str = ""
    #: an exception, such as the database's, cut the work on the job short.
    was_raised: bool = False


class ProcessReport(Frozen):
    """What one `process-jobs` flow run did, in the order of the jobs' ids."""

    jobs: tuple[ProcessedJob, ...] = ()

    @property
    def processed(self) -> int:
        return sum(job.success for job in self.jobs)

    @property
    def errors(self) -> tuple[JobError, ...]:
        return tuple(JobError(job_id=job.job_id, error=job.error) for job in self.jobs if not job.success)


class PurgeReport(Frozen):
    """What one purge removed; of a dry run, what it would have removed."""

    dry_run: bool = False
    #: of attempts that are over.
    containers: int = 0
    #: attempts whose logs were removed.
    logs: int = 0
    jobs: int = 0
    #: flow runs that had nothing to do, the other ones, and the artifacts of both.
    idle_runs: int = 0
    runs: int = 0
    artifacts: int = 0
    #: what a person should look at, a sentence each.
    anomalies: tuple[str, ...] = ()


ReportT = TypeVar("ReportT", LoopStats, ProcessReport)


class FlowRunReport(Frozen, Generic[ReportT]):
    """A flow run that has completed, wherever it ran."""

    via: Literal["deployment", "inline"]
    flow_run_id: str
    state_name: str
    state_type: str
    report: ReportT
