"""What the command says: its words, and the same as JSON."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from django.core.management.base import OutputWrapper
from django.utils import timezone

from container_manager.exceptions import ContainerManagerError
from container_manager.models import ContainerJob, ContainerJobQuerySet
from container_manager.queue import queue_manager
from container_manager.types import FlowRunReport, JobError, LoopStats, ProcessedJob, ProcessReport


class OutputLost(ContainerManagerError):
    """What was said could not be written."""


class Console:
    """Prose goes to stdout, or to stderr where stdout is for JSON. Every line is out at once.

    A line that can't be written ends nothing that is at work; `check` tells of it afterwards.
    """

    def __init__(self, stdout: OutputWrapper, stderr: OutputWrapper, *, as_json: bool) -> None:
        self._stdout, self._stderr, self._as_json = stdout, stderr, as_json
        self._problem: OSError | None = None
        #: Whoever read stdout has gone.
        self.is_unread = False

    def check(self) -> None:
        if self._problem is not None:
            raise OutputLost(f"the output can't be written: {self._problem}") from self._problem

    def say(self, line: str) -> None:
        self._write(self._stderr if self._as_json else self._stdout, shown(line))

    def complain(self, line: str) -> None:
        self._write(self._stderr, shown(line))

    def emit(self, value: dict[str, Any]) -> None:
        if self._as_json:
            self._write(self._stdout, json.dumps(value, default=str))

    def _write(self, stream: OutputWrapper, line: str) -> None:
        try:
            try:
                stream.write(line, style_func=str)
            except UnicodeEncodeError:
                # It is for a terminal or a file of few letters.
                stream.write(line.encode("ascii", "backslashreplace").decode(), style_func=str)
            stream.flush()
        except OSError as e:
            self._problem = self._problem or e
            self.is_unread |= stream is self._stdout and isinstance(e, BrokenPipeError)


def shown(text: str) -> str:
    """On one line, and nothing that a terminal obeys: what Engines and databases say is foreign text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    return shown(" ".join(str(error).split())) or type(error).__name__


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def error_lines(errors: Iterable[JobError]) -> list[str]:
    return [f"  - Job {error.job_id}: {error.error}" for error in errors]


def failed_line(job_ids: Sequence[int]) -> str:
    """`Job 17 failed to launch`, `Jobs 17, 18 failed to launch`."""
    return f"Job{'' if len(job_ids) == 1 else 's'} {', '.join(map(str, sorted(job_ids)))} failed to launch"


def job_lines(stats: LoopStats) -> list[str]:
    """A line per job, for `--verbose`."""
    ended = [
        f"  - Job {job.job_id}: {job.status}" + (f" ({job.error or job.reason})" if job.reason else "")
        for job in stats.ended
    ]
    return [f"  - Job {job_id}: launched" for job_id in stats.job_ids] + ended


def queue_json(run: FlowRunReport[LoopStats], exit_code: int) -> dict[str, Any]:
    return {
        "mode": "queue",
        "via": run.via,
        "flow_run_id": run.flow_run_id,
        "launched": run.report.jobs_launched,
        "job_ids": list(run.report.job_ids),
        "errors": [error.model_dump() for error in run.report.errors],
        "limit": run.report.limit,
        "exit_code": exit_code,
    }


def failed_json(via: str, flow_run_id: str, error: str) -> dict[str, Any]:
    """A flow run that did not end well; the error is no job's."""
    return {
        "mode": "queue",
        "via": via,
        "flow_run_id": flow_run_id,
        "launched": 0,
        "job_ids": [],
        "errors": [{"job_id": None, "error": error}],
        "limit": "",
        "exit_code": 1,
    }


def legacy_json(report: ProcessReport) -> dict[str, Any]:
    return {
        "mode": "legacy",
        "processed": report.processed,
        "errors": [error.model_dump() for error in report.errors],
    }


def processed_lines(job: ProcessedJob, *, verbose: bool) -> list[str]:
    if not job.success:
        last = f"{'Error processing' if job.was_raised else 'Failed to process'} job {job.job_id}: {job.error}"
        return [f"Processing job {job.job_id} ({job.status})", last] if verbose else [last]
    if not verbose:
        return []
    what = f": {job.message}" if job.message else ""
    return [f"Processing job {job.job_id} ({job.status})", f"Successfully processed job {job.job_id}{what}"]


def binding_limit(max_concurrent: int) -> str:
    """What keeps, or will keep, more containers from running, by what the database knows."""
    return queue_manager.capacity(max_concurrent).next_limit


def show_dry_run(console: Console, max_concurrent: int) -> None:
    metrics = queue_manager.get_worker_metrics()
    slots = queue_manager.capacity(max_concurrent)
    jobs = queue_manager.next_jobs(slots)
    console.say("Queue Status (dry run):")
    console.say(f"  Ready to launch now: {metrics.ready_now}")
    console.say(f"  Scheduled for future: {metrics.scheduled_future}")
    console.say(f"  Currently running: {metrics.running}")
    console.say(f"  Launch failed: {metrics.launch_failed}")
    console.say("")
    reason = ""
    if not metrics.ready_now:
        console.say("No jobs ready for launch")
    elif not jobs:
        # There are free slots, but the ready jobs are pinned to hosts that have none.
        reason = slots.limit or slots.closed
        console.say(f"No jobs would be launched now: {reason}")
    else:
        console.say(f"Next {len(jobs)} job(s) that would be launched:")
        for job in jobs:
            console.say(f"  - Job {job.pk}: {job.label} (priority={job.priority}, queued={_clock(job)})")
    console.emit(
        {
            "mode": "dry-run",
            **metrics.model_dump(mode="json"),
            "next": [{"job_id": job.pk, "name": job.label, "priority": job.priority} for job in jobs],
            "limit": reason or slots.binding,
        }
    )


def show_legacy_dry_run(console: Console, jobs: ContainerJobQuerySet) -> None:
    chosen = jobs.only("pk", "status", "name")
    if chosen:
        console.say(f"Found {len(chosen)} job(s) to process")
    for job in chosen:
        console.say(f"Would process: Job {job.pk} ({job.status}) - {job.label}")
    console.emit(
        {"mode": "dry-run", "next": [{"job_id": job.pk, "status": job.status, "name": job.label} for job in chosen]}
    )


def _clock(job: ContainerJob) -> str:
    at = job.queued_at or job.scheduled_for
    return f"{timezone.localtime(at):%H:%M:%S}" if at else "-"


def status_line(iterations: int, launched: int, error_count: int) -> str:
    metrics = queue_manager.get_worker_metrics().model_dump(mode="json", exclude={"hosts"})
    seen = {"iterations": iterations, "launched": launched, "errors": error_count}
    return f"Queue status: {json.dumps(metrics | seen)}"
