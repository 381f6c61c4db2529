"""The flags of `process_container_jobs`, and its examples."""

import argparse
from contextlib import suppress

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandParser

from container_manager.conf import get_settings

from .processing import Options

DEFAULTS = Options()

EXAMPLES = """\
Examples:

  Queue Mode (new):
    manage.py process_container_jobs --queue-mode
    manage.py process_container_jobs --queue-mode --once
    manage.py process_container_jobs --queue-mode \\
        --max-concurrent=10 --poll-interval=5
    manage.py process_container_jobs --queue-mode --dry-run

  Legacy Mode (existing):
    manage.py process_container_jobs
    manage.py process_container_jobs --job-id=123
    manage.py process_container_jobs --status=pending
    manage.py process_container_jobs --dry-run

  Operational:
    kill -USR1 <pid>    # one line with the status of the queue
    kill -TERM <pid>    # graceful shutdown; containers keep running

  Prefect: a scheduled deployment does the same, without this process.
    python -m deployments    # serves the deployments
    prefect deployment run 'process-queue/scheduled'

Exit codes: 0 done; 1 wrong usage or configuration, or the flow run failed;
2 unknown options; 3 with --once a job failed to launch, with --fail-on-error
a job errored. A job's own exit code is never an error here.
"""


def examples() -> str:
    """The examples, with the deployment that the settings name. Invalid settings do not stop `--help`."""
    with suppress(ImproperlyConfigured):
        return EXAMPLES.replace("process-queue/scheduled", get_settings().deployment("queue"))
    return EXAMPLES


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples."""


def add_arguments(parser: CommandParser) -> None:
    """Flags of queue mode have no default here: legacy mode tells that it ignores them when they are given."""
    parser.add_argument(
        "--queue-mode",
        action="store_true",
        help="Run in queue processing mode (launches queued jobs continuously)",
    )
    parser.add_argument(
        "--max-concurrent",
        type=int,
        metavar="N",
        help="Maximum concurrent jobs when in queue mode (default: 5)",
    )
    parser.add_argument(
        "--poll-interval",
        type=int,
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
    parser.add_argument("--dry-run", action="store_true", help="Show what would be processed without actually doing it")
    parser.add_argument("--verbose", action="store_true", help="Verbose output")
    parser.add_argument(
        "--via",
        choices=["auto", "deployment", "inline"],
        default="auto",
        help="Where flow runs run: in a deployment's worker, in this process, or wherever it can (default: auto)",
    )
    parser.add_argument("--json", action="store_true", help="One JSON object per flow run on stdout, prose on stderr")
    parser.add_argument("--fail-on-error", action="store_true", help="Exit with 3 if a job errored (legacy mode)")
    parser.add_argument(
        "--shutdown-timeout",
        type=int,
        default=DEFAULTS.shutdown_timeout,
        metavar="S",
        help="Seconds that a graceful shutdown waits for the flow run in progress (default: 30)",
    )
