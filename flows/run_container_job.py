"""One job as one flow run, for people and for other flows: queue it, follow it, tell how it ended."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import logging
import signal
import threading
import time
from contextlib import suppress
from typing import Annotated, Any, cast

from django.db import connections
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Failed
from pydantic import Field

from container_manager import shutdown
from container_manager.conf import get_settings
from container_manager.exceptions import InvalidTransition, ShuttingDown
from container_manager.models import ContainerJob, Reason, Status
from container_manager.queue import queue_manager
from container_manager.types import JobResult, LoopStats, RoundReport, RunSpec
from container_manager.waiting import (
    JobCancelled,
    JobFailed,
    JobRefused,
    JobWatch,
    describe_result,
    queue_spec,
    retry_for,
)

from .api import without_patience
from .cancelled_runs import CancelledRuns
from .exposure import why_open
from .form_values import plain
from .identity import why_not_ours
from .links import job_url
from .naming import job_run_name
from .own_run import OwnRun
from .process_queue import launch_within_limits
from .reports import completed, emit_changes, show_links
from .run_log import RunLog
from .termination import graceful_termination

logger = logging.getLogger("container_manager.flows")

#: seconds; locks and a busy database are waited for.
TIMEOUT = 30
#: seconds; how long a cancelled run stays until its container has ended. After 30 it would be killed.
_CANCEL_SECONDS = 22.0
#: seconds; between two looks at a job that is being stopped.
_STOP_LOOK_SECONDS = 0.5


def _is_news(record: logging.LogRecord) -> bool:
    """At the end of a process Prefect logs, of no flow, a traceback of what its run's state has said already."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, JobFailed | JobRefused) and getattr(record, "flow_name", "") == "<unknown>")


logging.getLogger("prefect.flow_runs").addFilter(_is_news)

Spec = Annotated[RunSpec, Field(description="What runs, how and where.")]


# The spec is checked by ourselves, so that what is wrong with it is told in a line, as all else that is refused.
@flow(name="run-container-job", flow_run_name=job_run_name, validate_parameters=False)
def run_container_job(spec: Spec) -> JobResult:
    """Queue a job, follow what its container writes, and end as it ends.

    The job waits in the queue as every other. Cancelling this run cancels it; if this process dies, the job goes on.
    """
    # Prefect makes the state that is returned the run's, and hands its data, or raises it, to whoever called.
    return cast(JobResult, _run_to_state(spec))


def run_job(spec: RunSpec) -> JobResult:
    """The same without a flow run of its own: a step of whatever flow or task calls it, and cancelled with its flow.

    Raises `JobFailed`, `JobCancelled` and `JobRefused`. Sync only; several threads may.
    """
    try:
        return _run(spec, OwnRun.current(), is_own_run=False)
    finally:
        if threading.current_thread() is not threading.main_thread():
            # A thread's connections are nobody's once it has ended.
            connections.close_all()


@task(name="container-job", cache_policy=NO_CACHE)
def container_job(spec: RunSpec) -> JobResult:
    """`run_job` as a task: `container_job(spec)`, or for many at once `container_job.map(specs)`."""
    return run_job(spec)


def result_in(state: "State[Any]") -> JobResult:
    """The result in the final state of a flow run that ran elsewhere, as `run_deployment` returns it.

    Raises `ValueError` if there is none: the run was refused or crashed.
    """
    message = (state.message or "").strip()
    return JobResult.model_validate_json(message.splitlines()[-1] if message else "")


def _run_to_state(spec: RunSpec | dict[str, Any]) -> "State[JobResult]":
    run = OwnRun.current()
    try:
        if why := why_not_ours():
            raise JobRefused(why)  # noqa: TRY301 (it ends as every other that is refused)
        if run.is_deployed and (why := why_open(get_settings())):
            raise JobRefused(why)  # noqa: TRY301 (it ends as every other that is refused)
        result = _run(plain(spec), run, is_own_run=True)
    except JobCancelled as e:
        return Cancelled(message=_message(e.result), data=e)
    except JobFailed as e:
        # By no name of ours: the filters of Prefect's pages find only the names that they know.
        name = "TimedOut" if e.result.reason == Reason.TIMEOUT else "Failed"
        return Failed(name=name, message=_message(e.result), data=e)
    except JobRefused as e:
        return Failed(message=str(e), data=e)
    return completed(describe_result(result), result)


def _run(spec: RunSpec | dict[str, Any], run: OwnRun, *, is_own_run: bool) -> JobResult:
    flow_run_id = str(run.flow_run_id) if run.flow_run_id else None
    job = _earlier_job(flow_run_id, run) if flow_run_id and is_own_run and run.is_rerun else None
    if job is None:
        job = queue_spec(spec, flow_run_id=flow_run_id, created_by=f"flow run {run.name}" if run.name else "")
    url = job_url(job.pk)
    logger.info("its job is job %s%s", job.pk, f": {url}" if url else "", extra={"job": job.pk})
    if run.flow_run_id:
        with without_patience():
            show_links([job.pk])
    log = RunLog(run, job.pk)
    watch = JobWatch(job, log)
    try:
        with graceful_termination():
            _wait(watch, run)
            is_left = shutdown.is_stopping() and not watch.has_ended()
        if is_left:
            _leave(watch, run)
        return _judge(watch.result())
    finally:
        watch.close()
        log.close()


def _earlier_job(flow_run_id: str, run: OwnRun) -> ContainerJob | None:
    """The job of a run that is run again is still the same; queued anew if it has failed and that was told."""
    job: ContainerJob | None = ContainerJob.objects.filter(flow_run_id=flow_run_id).order_by("-pk").first()
    if job is not None and job.status in (Status.FAILED, Status.CANCELLED) and not run.was_rescheduled():
        retry_for(job, flow_run_id)
    return job


def _wait(watch: JobWatch, run: OwnRun) -> None:
    """Beside whatever passes there are; and as one, while there is none."""
    with without_patience():
        queue_manager.process_queue_until(
            watch.has_ended,
            get_settings().MAX_CONCURRENT,
            timeout=TIMEOUT,
            launch=launch_within_limits if run.flow_run_id else None,
            cancelled_runs=CancelledRuns() if run.flow_run_id else None,
            on_round=_Rounds(watch.job.pk).report if run.flow_run_id else lambda report: None,
        )


class _Rounds:
    """Tells what the rounds did that were done here."""

    def __init__(self, job_id: int) -> None:
        self._job_id = job_id
        self._told: set[str] = set()

    def report(self, report: RoundReport) -> None:
        emit_changes(LoopStats().plus(report))
        for anomaly in report.anomalies:
            self._tell(logging.WARNING, anomaly)
        if report.batch.limit:
            self._tell(logging.INFO, f"jobs wait: {report.batch.limit}")

    def _tell(self, level: int, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.log(level, "%s", text, extra={"job": self._job_id})


def _leave(watch: JobWatch, run: OwnRun) -> None:
    """We were told to end. Cancelled: stop the job first. Else only this process is to end, and the job goes on."""
    if not run.is_cancelled():
        why = f"its process was told to end; job {watch.job.pk} goes on"
        logger.warning("%s", why)
        run.reschedule(why)
        signal.raise_signal(signal.SIGTERM)
        # Whoever handles it here wants more than to end.
        raise ShuttingDown
    with suppress(InvalidTransition):
        queue_manager.cancel_job(watch.job)
    until = time.monotonic() + _CANCEL_SECONDS
    while not watch.has_ended() and time.monotonic() < until:
        queue_manager.look_after(watch.job)
        time.sleep(_STOP_LOOK_SECONDS)


def _judge(result: JobResult) -> JobResult:
    if result.status == "completed":
        return result
    if result.status == "failed":
        raise JobFailed(result)
    raise JobCancelled(result)


def _message(result: JobResult) -> str:
    """For people first; the last line is for programs."""
    parts = [describe_result(result)]
    if result.stderr_tail:
        parts.append(f"the end of stderr:\n{result.stderr_tail.rstrip()}")
    return "\n".join([*parts, result.model_dump_json(exclude_defaults=True)])
