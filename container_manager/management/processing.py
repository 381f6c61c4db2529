"""The command's work: it triggers flow runs, waits for them, and tells what they did."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol, TypeVar

from django.core.management.base import CommandError
from django.db import close_old_connections
from django.db.utils import Error as DatabaseError

from container_manager.conf import get_settings
from container_manager.exceptions import ContainerManagerError, QueueIsNewer, ShuttingDown
from container_manager.services import StatusGroup, job_service
from container_manager.shutdown import stopping_when
from container_manager.types import KEPT_ERRORS, FlowRunReport, LoopStats, ProcessReport

from .background import TICK_SECONDS, in_background
from .queue_report import (
    Console,
    counted,
    error_lines,
    failed_json,
    failed_line,
    job_lines,
    legacy_json,
    one_line,
    processed_lines,
    queue_json,
    show_dry_run,
    show_legacy_dry_run,
    status_line,
)
from .signals import SignalWatch

#: What may keep a flow run from being run, and from which the next may be spared.
FAILURES = (ContainerManagerError, DatabaseError, OSError)
#: seconds; the longest wait after flow runs failed again and again.
MAX_BACKOFF_SECONDS = 60
#: Exit codes that Django's own do not cover.
JOB_ERRORED = 3

_T = TypeVar("_T")


class RunFailed(ContainerManagerError):
    """A flow run was made and did not end well."""

    def __init__(self, message: str, via: str, flow_run_id: str) -> None:
        super().__init__(message)
        self.via, self.flow_run_id = via, flow_run_id


class NotConfigured(ContainerManagerError):
    """No flow run can be run before somebody has changed a setting: nothing is gained by trying again."""


class FlowRuns(Protocol):
    """Runs one flow run to its end, in whatever place. `current` names the one that a worker is at."""

    current: str

    def process_queue(self, parameters: dict[str, Any]) -> FlowRunReport[LoopStats]: ...
    def process_jobs(self, parameters: dict[str, Any]) -> FlowRunReport[ProcessReport]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Options:
    max_concurrent: int = 5
    poll_interval: int = 10
    timeout: int = 30
    shutdown_timeout: int = 30
    verbose: bool = False
    with_tracebacks: bool = False

    def for_legacy_mode(self) -> "Options":
        """The caps are those of queue mode; the flags that set them are not legacy mode's."""
        return replace(self, max_concurrent=Options.max_concurrent, poll_interval=Options.poll_interval)


class Processor:
    """What both modes share: flow runs in the background, signals in front."""

    def __init__(self, runs: FlowRuns, console: Console, watch: SignalWatch, options: Options) -> None:
        self.runs, self.console, self.watch, self.options = runs, console, watch, options
        self.iterations = 0
        self.launched = 0
        self.error_count = 0
        self.last_errors: deque[str] = deque(maxlen=KEPT_ERRORS)
        self._stop_until: float | None = None

    @property
    def is_ending(self) -> bool:
        """Nothing new is to be begun: a signal said so, or nobody is there any more to be told."""
        return self.watch.is_stopping or self.console.is_unread

    def wait_for(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, from a thread that learns of a stop through its context."""
        with stopping_when(lambda: self.watch.is_stopping):
            return in_background(call, self._tick_while_running)

    def look_at_signals(self) -> None:
        if self.watch.is_status_asked:
            self.watch.is_status_asked = False
            close_old_connections()
            try:
                self.console.say(status_line(self.iterations, self.launched, self.error_count))
            except DatabaseError as e:
                self.console.say(f"Queue status: unknown, the database failed: {one_line(e)}")
        if self.watch.is_stopping and self._stop_until is None:
            self._stop_until = time.monotonic() + self.options.shutdown_timeout
            self.say_stopping()
            self.watch.end_at_next()

    def say_stopping(self) -> None:
        name = signal.Signals(self.watch.stopped_by or signal.SIGTERM).name
        self.console.say(f"Received {name}, shutting down gracefully...")

    def _tick_while_running(self) -> None:
        self.look_at_signals()
        if self._stop_until is not None and time.monotonic() >= self._stop_until:
            self._abandon()

    def _abandon(self) -> NoReturn:
        what = f"flow run {self.runs.current} goes on in its worker" if self.runs.current else "leases cover the rest"
        self.console.complain(f"Not finished within {self.options.shutdown_timeout} s: {what}")
        os._exit(1)


class QueueProcessor(Processor):
    """Queue mode: `process-queue` flow runs, one or one after the other."""

    def process(self, *, once: bool, dry_run: bool) -> None:
        options = self.options
        self.console.say(
            f"Starting queue processor (max_concurrent={options.max_concurrent}, "
            f"poll_interval={options.poll_interval}s, once={once})"
        )
        if dry_run:
            show_dry_run(self.console, options.max_concurrent)
        elif once:
            self.once()
        else:
            self.continuously()

    def once(self) -> None:
        try:
            stats = self._run_once(work_seconds=0).report
        except ShuttingDown:
            stats = LoopStats()
        self.console.say(f"Processed queue: launched {stats.jobs_launched} jobs")
        if stats.error_count:
            self.console.say(f"Encountered {stats.error_count} errors:")
            for line in error_lines(stats.errors):
                self.console.say(line)
        if stats.limit:
            self.console.say(stats.limit)
        if stats.failed_ids:
            raise CommandError(failed_line(stats.failed_ids), returncode=JOB_ERRORED)

    def continuously(self) -> None:
        """Until a signal, or nobody reads it any more. A flow run that fails is told once, and tried again later."""
        # A run that stays for a while refills its slots as they get free, not at the next poll.
        work_seconds = min(get_settings().WORK_SECONDS, 0.8 * self.options.poll_interval)
        failures, failed_with = 0, ""
        self.look_at_signals()
        while not self.is_ending:
            began = time.monotonic()
            try:
                self._run_once(work_seconds)
            except ShuttingDown:
                break
            except (NotConfigured, QueueIsNewer):
                raise
            except FAILURES as e:
                failures += 1
                if failed_with != type(e).__name__:
                    failed_with = type(e).__name__
                    self.console.complain(f"Queue processing failed: {one_line(e)}")
                self._pause(max(self.options.poll_interval, min(2.0**failures, MAX_BACKOFF_SECONDS)))
            else:
                if failures:
                    self.console.complain(f"Queue processing works again, after {counted(failures, 'failure')}")
                failures, failed_with = 0, ""
                self._pause(began + self.options.poll_interval - time.monotonic())
        self.console.say(
            f"Queue processor finished. Processed {self.iterations} iterations, launched {self.launched} jobs"
        )
        if self.error_count:
            self.console.say(f"Encountered {self.error_count} errors during processing")
            for line in self.last_errors:
                self.console.say(line)

    def _run_once(self, work_seconds: float) -> FlowRunReport[LoopStats]:
        parameters = {
            "max_concurrent": self.options.max_concurrent,
            "timeout": self.options.timeout,
            "work_seconds": work_seconds,
        }
        try:
            run = self.wait_for(lambda: self.runs.process_queue(parameters))
        except RunFailed as e:
            self.iterations += 1
            self._remember(1, [f"  - Flow run: {one_line(e)}"])
            self.console.emit(failed_json(e.via, e.flow_run_id, one_line(e)))
            raise
        stats = run.report
        self.iterations += 1
        self.launched += stats.jobs_launched
        self._remember(stats.error_count, error_lines(stats.errors))
        self.console.emit(queue_json(run, JOB_ERRORED if stats.failed_ids else 0))
        if self.options.verbose:
            for line in (f"Flow run {run.flow_run_id}: {run.state_name}", *job_lines(stats), *stats.anomalies):
                self.console.say(line)
        return run

    def _remember(self, count: int, lines: list[str]) -> None:
        self.error_count += count
        self.last_errors.extend(lines)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.is_ending and (left := until - time.monotonic()) > 0:
            time.sleep(min(TICK_SECONDS, left))
            self.look_at_signals()
        self.look_at_signals()


class JobProcessor(Processor):
    """Legacy mode: single jobs, in one `process-jobs` flow run."""

    def process(self, job_id: int | None, status: StatusGroup | None, *, dry_run: bool, fail_on_error: bool) -> None:
        jobs = job_service.select(job_id=job_id, status=status)
        if dry_run:
            show_legacy_dry_run(self.console, jobs)
        found = jobs.count()
        if not found:
            self.console.say("No jobs found to process")
            if job_id is not None and not job_service.select(job_id=job_id).exists():
                self.console.complain(f"No job with id {job_id}")
        if dry_run:
            return
        report = self._report(found, {"job_id": job_id, "status": status}) if found else ProcessReport()
        self.console.emit(legacy_json(report))
        if fail_on_error and report.errors and not self.watch.is_stopping:
            raise CommandError(f"{counted(len(report.errors), 'job')} errored", returncode=JOB_ERRORED)

    def say_stopping(self) -> None:
        self.console.say("Interrupted by user")

    def _report(self, found: int, parameters: dict[str, Any]) -> ProcessReport:
        self.console.say(f"Found {found} job(s) to process")
        parameters |= {"max_concurrent": self.options.max_concurrent, "timeout": self.options.timeout}
        try:
            report = self.wait_for(lambda: self.runs.process_jobs(parameters)).report
        except ShuttingDown:
            report = ProcessReport()
        for job in report.jobs:
            for line in processed_lines(job, verbose=self.options.verbose):
                self.console.say(line)
        self.console.say(f"Processed: {report.processed} jobs, Errors: {len(report.errors)}")
        return report
