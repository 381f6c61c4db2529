"""`manage.py process_container_jobs`: parses, checks, triggers flow runs, tells what they did."""

import logging
import signal
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Literal

from django.core.management.base import BaseCommand, CommandError, CommandParser

from container_manager import shutdown
from container_manager.conf import get_settings
from container_manager.exceptions import ShuttingDown
from container_manager.management.arguments import DEFAULTS, EXAMPLES, HelpFormatter, add_arguments
from container_manager.management.preflight import check_database, check_options, check_project
from container_manager.management.processing import (
    FAILURES,
    FlowRunFailed,
    JobProcessor,
    NotConfigured,
    Options,
    QueueProcessor,
    one_line,
)
from container_manager.management.queue_report import Console, binding_limit
from container_manager.management.signals import SignalWatch
from container_manager.services import StatusGroup
from container_manager.types import FlowRunReport, LoopStats, ProcessReport, ReportT

Via = Literal["auto", "deployment", "inline"]

#: seconds; for how long `auto` runs inline after a deployment's worker did not pick a flow run up.
AVOID_SECONDS = 300


class Command(BaseCommand):
    help = "Process container jobs - either existing jobs or queue mode"
    # Ours are checked in `handle`, where each comes out as one line.
    requires_system_checks: list[str] = []

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        return super().create_parser(prog_name, subcommand, formatter_class=HelpFormatter, epilog=EXAMPLES, **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        add_arguments(parser)

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
        check_options(options, queue_mode=queue_mode, is_choosing=job_id is not None or status is not None)
        console = Console(self.stdout, self.stderr, as_json=json)
        # In legacy mode SIGTERM does what it does to any command.
        stops = (signal.SIGTERM, signal.SIGINT) if queue_mode else (signal.SIGINT,)
        with SignalWatch(*stops) as watch, closing(PrefectFlowRuns(via, console, options)) as runs:
            check_project()
            check_database()
            if verbose:
                _log_debug()
            try:
                if queue_mode:
                    QueueProcessor(runs, console, watch, options).process(once=once, dry_run=dry_run)
                    return
                _tell_ignored(console, options, once=once)
                # Its words are those of the older command.
                runs.tell = console.complain if verbose else None
                JobProcessor(runs, console, watch, options.for_legacy_mode()).process(
                    job_id, status, dry_run=dry_run, fail_on_error=fail_on_error
                )
            except FAILURES as e:
                raise CommandError(f"Command failed: {one_line(e)}") from e


class PrefectFlowRuns:
    """Flow runs, where `--via` says. Called off the main thread; the first one imports Prefect: one second."""

    def __init__(self, via: Via, console: Console, options: Options) -> None:
        self._via, self._console, self._options = via, console, options
        self.current = ""
        #: Where it says how it runs; None: nowhere.
        self.tell: Callable[[str], None] | None = console.say
        self._told = ("", "")
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
            from flows import api, inline, triggering
        except ImportError as e:
            raise NotConfigured(f"Prefect can't be imported: {one_line(e)}; install the project's requirements") from e
        if shutdown.is_stopping():
            raise ShuttingDown
        self._is_used = True
        inline.quiet_console(logging.INFO if self._options.verbose else logging.WARNING)
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
        except api.ApiNotConfigured as e:
            raise NotConfigured(one_line(e)) from e
        except triggering.FlowRunFailed as e:
            raise FlowRunFailed(str(e), "inline" if why_inline else "deployment", e.flow_run_id) from e

    def _why_inline(self, name: str) -> str:
        from flows import api, triggering

        if self._via == "deployment":
            return ""
        if self._via == "inline":
            return "--via inline"
        if time.monotonic() < self._avoid_until:
            return "no worker picked up the last flow run"
        try:
            triggering.check_deployment(name)
        except api.FlowRunError as e:
            return one_line(e)
        return ""

    def _by_deployment(
        self, name: str, parameters: dict[str, Any], report_type: type[ReportT]
    ) -> FlowRunReport[ReportT]:
        from flows import api, triggering

        where = api.check_api()
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
        if self.tell is None or self._told == (way, where):
            return
        self._told = (way, where)
        for line in (f"Runs: {way}", f"Limit: {binding_limit(self._options.max_concurrent)}", f"Prefect: {where}"):
            self.tell(line)


def _flow(which: Literal["queue", "jobs"]) -> Any:
    if which == "queue":
        from flows.process_queue import process_queue

        return process_queue
    from flows.process_jobs import process_jobs

    return process_jobs


def _tell_ignored(console: Console, options: Options, *, once: bool) -> None:
    given = {
        "--once": once,
        "--poll-interval": options.poll_interval != DEFAULTS.poll_interval,
        "--max-concurrent": options.max_concurrent != DEFAULTS.max_concurrent,
    }
    for flag, is_given in given.items():
        if is_given:
            console.complain(f"{flag} has no effect without --queue-mode")


def _log_debug() -> None:
    logger = logging.getLogger("container_manager")
    logger.setLevel(logging.DEBUG)
    for handler in logger.handlers:
        handler.setLevel(logging.DEBUG)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
