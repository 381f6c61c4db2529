"""`manage.py process_container_jobs`: parses, checks, triggers flow runs, tells what they did."""

import logging
import os
import signal
import sys
import threading
from contextlib import closing
from typing import Any, TextIO

from django.core.management.base import BaseCommand, CommandError, CommandParser

from container_manager.management.arguments import DEFAULTS, HelpFormatter, add_arguments, examples
from container_manager.management.flow_runs import PrefectFlowRuns, Via
from container_manager.management.preflight import check_database, check_options, check_project
from container_manager.management.processing import FAILURES, JobProcessor, Options, QueueProcessor
from container_manager.management.queue_report import Console, one_line
from container_manager.management.signals import SignalWatch
from container_manager.services import StatusGroup

#: seconds; for what Prefect still has to send when all is done. It would try for minutes to reach a server that is
#: away, a while for each event.
EXIT_SECONDS = 5


class Command(BaseCommand):
    help = "Process container jobs - either existing jobs or queue mode"
    # Ours are checked in `handle`, where each comes out as one line.
    requires_system_checks: list[str] = []

    def __init__(self, stdout: TextIO | None = None, stderr: TextIO | None = None, **options: Any) -> None:
        # Either may have been closed before we were started.
        super().__init__(stdout or sys.stdout or _nowhere(), stderr or sys.stderr or _nowhere(), **options)

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        return super().create_parser(prog_name, subcommand, formatter_class=HelpFormatter, epilog=examples(), **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        add_arguments(parser)

    def run_from_argv(self, argv: list[str]) -> None:
        """As a process of its own, which ends in time whatever Prefect does meanwhile."""
        exit_code: Any = 1
        try:
            super().run_from_argv(argv)
            exit_code = 0
        except SystemExit as e:
            exit_code = e.code
            raise
        finally:
            _drop_unwritten()
            _end_within(EXIT_SECONDS, exit_code)

    def handle(
        self,
        *,
        queue_mode: bool,
        max_concurrent: int | None,
        poll_interval: int | None,
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
        traceback: bool,
        **_: Any,
    ) -> None:
        options = Options(
            DEFAULTS.max_concurrent if max_concurrent is None else max_concurrent,
            DEFAULTS.poll_interval if poll_interval is None else poll_interval,
            timeout,
            shutdown_timeout,
            verbose,
            traceback,
        )
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
                else:
                    _tell_ignored(
                        console, once=once or None, poll_interval=poll_interval, max_concurrent=max_concurrent
                    )
                    # Its words are those of the older command.
                    runs.tell = console.complain if verbose else None
                    JobProcessor(runs, console, watch, options.for_legacy_mode()).process(
                        job_id, status, dry_run=dry_run, fail_on_error=fail_on_error
                    )
                console.check()
            except FAILURES as e:
                what = "Queue processing" if queue_mode and not once and not dry_run else "Command"
                raise CommandError(f"{what} failed: {one_line(e)}") from e


def _tell_ignored(console: Console, **given: int | None) -> None:
    for name, value in given.items():
        if value is not None:
            console.complain(f"--{name.replace('_', '-')} has no effect without --queue-mode")


def _nowhere() -> TextIO:
    return open(os.devnull, "w")


def _drop_unwritten() -> None:
    """What a stream could not write is told by now. Left in its buffer it would make the exit code another one."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            with _nowhere() as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _end_within(seconds: float, exit_code: Any) -> None:
    timer = threading.Timer(seconds, os._exit, [exit_code])
    timer.daemon = True
    timer.start()


def _log_debug() -> None:
    logger = logging.getLogger("container_manager")
    logger.setLevel(logging.DEBUG)
    for handler in logger.handlers:
        handler.setLevel(logging.DEBUG)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
