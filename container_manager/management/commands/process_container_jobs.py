"""`manage.py process_container_jobs`: parses, checks, triggers flow runs, tells what they did."""

import argparse
import logging
import signal
import time
from typing import Any, Literal

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.db.utils import Error as DatabaseError

from container_manager.checks import check_settings
from container_manager.conf import get_settings
from container_manager.management.processing import (
    FlowRunFailed,
    JobProcessor,
    Options,
    QueueProcessor,
    one_line,
    tell_nothing_found,
)
from container_manager.management.queue_report import Console, binding_limit, show_dry_run
from container_manager.management.signals import SignalWatch
from container_manager.services import StatusGroup, job_service
from container_manager.types import FlowRunReport, LoopStats, ProcessReport, ReportT

Via = Literal["auto", "deployment", "inline"]

DEFAULTS = Options()

#: seconds; for how long `auto` runs inline after a deployment's worker did not pick a flow run up.
AVOID_SECONDS = 300

EXAMPLES = """\
Examples:

  Queue Mode (new):
    manage.py process_container_jobs --queue-mode
    manage.py process_container_jobs --queue-mode --once
    manage.py process_container_jobs --queue-mode --max-concurrent=10 --poll-interval=5
    manage.py process_container_jobs --queue-mode --dry-run

  Legacy Mode (existing):
    manage.py process_container_jobs
    manage.py process_container_jobs --job-id=123
    manage.py process_container_jobs --status=pending
    manage.py process_container_jobs --dry-run

  Operational:
    kill -USR1 <pid>    # one line with the status of the queue
    kill -TERM <pid>    # graceful shutdown; containers keep running

  Prefect: a scheduled deployment does what --queue-mode does, without this process.
    python -m deployments    # serves the deployments
    prefect deployment run 'process-queue/scheduled'

Exit codes: 0 done; 1 wrong usage or configuration, or the flow run failed; 3 with --once a job
failed to launch, with --fail-on-error a job errored. A job's own exit code is never an error here.
"""


class Command(BaseCommand):
    help = "Process container jobs - either existing jobs or queue mode"
    # Ours are checked in `handle`, where each comes out as one line.
    requires_system_checks: list[str] = []

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        return super().create_parser(prog_name, subcommand, formatter_class=_HelpFormatter, epilog=EXAMPLES, **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--queue-mode",
            action="store_true",
            help="Run in queue processing mode (launches queued jobs continuously)",
        )
        parser.add_argument(
            "--max-concurrent",
            type=int,
            default=DEFAULTS.max_concurrent,
            metavar="N",
            help="Maximum concurrent jobs when in queue mode (default: 5)",
        )
        parser.add_argument(
            "--poll-interval",
            type=int,
            default=DEFAULTS.poll_interval,
            metavar="S",
            help="Polling interval in seconds for queue mode (default: 10)",
        )
        parser.add_argument("--once", action="store_true", help="Process queue once and exit (don't run continuously)")
        parser.add_argument(
            "--timeout",
            type=int,
            default=DEFAULTS.timeout,
            metavar="S",
            help="Timeout in seconds for job acquisition (default: 30)",
        )
        parser.add_argument("--job-id", type=int, metavar="ID", help="Process specific job by ID (legacy mode)")
        parser.add_argument(
            "--status",
            choices=["pending", "running", "failed"],
            help="Process jobs with specific status (legacy mode; default: running)",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="Show what would be processed without actually doing it"
        )
        parser.add_argument("--verbose", action="store_true", help="Verbose output")
        parser.add_argument(
            "--via",
            choices=["auto", "deployment", "inline"],
            default="auto",
            help="Where flow runs run: in a deployment's worker, in this process, or wherever it can (default: auto)",
        )
        parser.add_argument(
            "--json", action="store_true", help="One JSON object per flow run on stdout, prose on stderr"
        )
        parser.add_argument("--fail-on-error", action="store_true", help="Exit with 3 if a job errored (legacy mode)")
        parser.add_argument(
            "--shutdown-timeout",
            type=int,
            default=DEFAULTS.shutdown_timeout,
            metavar="S",
            help="Seconds that a graceful shutdown waits for the flow run in progress (default: 30)",
        )

    def handle(
        self,
        *,
        queue_mode: bool,
        max_concurrent: int,
        poll_interval: int,
        once: bool,
        timeout: int,
        job_id: int | None,
        status: StatusGroup | None,
        dry_run: bool,
        verbose: bool,
        via: Via,
        json: bool,
        fail_on_error: bool,
        shutdown_timeout: int,
        **_: Any,
    ) -> None:
        options = Options(max_concurrent, poll_interval, timeout, shutdown_timeout, verbose)
        if queue_mode and (job_id is not None or status is not None):
            raise CommandError("Cannot use --queue-mode with --job-id or --status")
        _check_numbers(options)
        console = Console(self.stdout, self.stderr, as_json=json)
        stops = (signal.SIGTERM, signal.SIGINT) if queue_mode else (signal.SIGINT,)
        with SignalWatch(*stops) as watch:
            _check_settings()
            _check_database()
            if verbose:
                _log_debug()
            runs = PrefectFlowRuns(via, console, max_concurrent, verbose=verbose)
            try:
                if queue_mode:
                    console.say(
                        f"Starting queue processor (max_concurrent={max_concurrent}, poll_interval={poll_interval}s, "
                        f"once={once})"
                    )
                    if dry_run:
                        show_dry_run(console, max_concurrent)
                        return
                    processor = QueueProcessor(runs, console, watch, options)
                    if once:
                        processor.once()
                    else:
                        processor.continuously()
                    return
                _tell_ignored(console, options, once=once)
                if dry_run:
                    _show_legacy_dry_run(console, job_id, status)
                    return
                # The caps are those of queue mode; its flags are not this mode's.
                options = Options(timeout=timeout, shutdown_timeout=shutdown_timeout, verbose=verbose)
                JobProcessor(runs, console, watch, options).process(job_id, status, fail_on_error=fail_on_error)
            finally:
                runs.close()


class PrefectFlowRuns:
    """Flow runs, where `--via` says. Called off the main thread; the first one imports Prefect: one second."""

    def __init__(self, via: Via, console: Console, max_concurrent: int, *, verbose: bool) -> None:
        self._via, self._console, self._max_concurrent, self._verbose = via, console, max_concurrent, verbose
        self.current = ""
        self._told: tuple[str, ...] = ()
        self._avoid_until = 0.0
        self._is_used = False

    def process_queue(self, parameters: dict[str, Any]) -> FlowRunReport[LoopStats]:
        return self._run("queue", parameters, LoopStats)

    def process_jobs(self, parameters: dict[str, Any]) -> FlowRunReport[ProcessReport]:
        return self._run("jobs", parameters, ProcessReport)

    def close(self) -> None:
        if self._is_used:
            from flows import inline

            inline.server.stop()

    def _run(
        self, which: Literal["queue", "jobs"], parameters: dict[str, Any], report_type: type[ReportT]
    ) -> FlowRunReport[ReportT]:
        try:
            from flows import inline, triggering
        except ImportError as e:
            raise CommandError(f"Prefect can't be imported: {one_line(e)}; install the project's requirements") from e
        self._is_used = True
        inline.quiet_console(logging.INFO if self._verbose else logging.WARNING)
        name = getattr(get_settings().DEPLOYMENTS, which)
        try:
            why_inline = self._why_inline(name)
            if not why_inline:
                try:
                    return self._by_deployment(name, parameters, report_type)
                except triggering.NotPickedUp as e:
                    if self._via == "deployment":
                        raise
                    self._console.complain(f"Warning: {one_line(e)}. It runs inline instead.")
                    self._avoid_until = time.monotonic() + AVOID_SECONDS
                    why_inline = "no worker picked up the last flow run"
            with inline.recorded() as record:
                is_new = record.problem not in ("", why_inline)
                self._announce(
                    f"inline ({why_inline})", f"{record.where} ({record.problem})" if is_new else record.where
                )
                return inline.run(_flow(which), parameters, report_type)
        except triggering.ApiNotConfigured as e:
            # Not a condition that passes.
            raise CommandError(f"Command failed: {one_line(e)}") from e
        except triggering.FlowRunFailed as e:
            raise FlowRunFailed(str(e), e.flow_run_id) from e

    def _why_inline(self, name: str) -> str:
        from flows import triggering

        if self._via == "deployment":
            return ""
        if self._via == "inline":
            return "--via inline"
        if time.monotonic() < self._avoid_until:
            return "no worker picked up the last flow run"
        try:
            triggering.check_deployment(name)
        except triggering.FlowRunError as e:
            return one_line(e)
        return ""

    def _by_deployment(
        self, name: str, parameters: dict[str, Any], report_type: type[ReportT]
    ) -> FlowRunReport[ReportT]:
        from flows import triggering

        where = triggering.check_api()
        self._announce(f"deployment {name}", where)
        try:
            return triggering.run_deployment(
                name,
                parameters,
                report_type,
                pickup_seconds=get_settings().PICKUP_SECONDS,
                on_created=self._note_current,
            )
        finally:
            self.current = ""

    def _note_current(self, description: str) -> None:
        self.current = description

    def _announce(self, way: str, where: str) -> None:
        """Say how it runs, when that has changed."""
        from flows import limits

        limits.refresh()
        lines = (f"Runs: {way}", f"Limit: {binding_limit(self._max_concurrent)}", f"Prefect: {where}")
        for line in lines:
            if line not in self._told:
                self._console.say(line)
        self._told = lines


def _flow(which: Literal["queue", "jobs"]) -> Any:
    if which == "queue":
        from flows.process_queue import process_queue

        return process_queue
    from flows.process_jobs import process_jobs

    return process_jobs


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples."""


def _check_numbers(options: Options) -> None:
    for name, least in (("max_concurrent", 1), ("poll_interval", 1), ("timeout", 1), ("shutdown_timeout", 0)):
        if getattr(options, name) < least:
            raise CommandError(f"--{name.replace('_', '-')} must be at least {least}")


def _check_settings() -> None:
    problems = [message.msg for message in check_settings(None) if message.is_serious()]
    if problems:
        raise CommandError("; ".join(problems) + " (`manage.py check` tells more)")


def _check_database() -> None:
    try:
        executor = MigrationExecutor(connection)
        missing = executor.migration_plan(executor.loader.graph.leaf_nodes("container_manager"))
    except (DatabaseError, ImproperlyConfigured) as e:
        raise CommandError(
            f"The database can't be used ({one_line(e)}): correct DATABASES, or DATABASE_URL, then run "
            "`manage.py migrate`"
        ) from e
    if missing:
        raise CommandError("The database is not migrated: run `manage.py migrate`")


def _tell_ignored(console: Console, options: Options, *, once: bool) -> None:
    given = {
        "--once": once,
        "--poll-interval": options.poll_interval != DEFAULTS.poll_interval,
        "--max-concurrent": options.max_concurrent != DEFAULTS.max_concurrent,
    }
    for flag, is_given in given.items():
        if is_given:
            console.complain(f"{flag} has no effect without --queue-mode")


def _show_legacy_dry_run(console: Console, job_id: int | None, status: StatusGroup | None) -> None:
    jobs = job_service.select(job_id=job_id, status=status).only("pk", "status", "name")
    if jobs:
        console.say(f"Found {len(jobs)} job(s) to process")
    else:
        tell_nothing_found(console, job_id)
    for job in jobs:
        console.say(f"Would process: Job {job.pk} ({job.status}) - {job.label}")
    console.emit(
        {"mode": "dry-run", "next": [{"job_id": job.pk, "status": job.status, "name": job.label} for job in jobs]}
    )


def _log_debug() -> None:
    logger = logging.getLogger("container_manager")
    logger.setLevel(logging.DEBUG)
    for handler in logger.handlers:
        handler.setLevel(logging.DEBUG)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
