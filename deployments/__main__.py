"""`python -m deployments`: serve the deployments. `python -m deployments limits`: the limits of the tags."""

import argparse
import logging
import sys

from django.db.utils import Error as DatabaseError
from prefect.settings import PREFECT_API_URL

from container_manager.conf import get_settings
from flows.api import FlowRunError, connected, translated
from flows.exposure import why_open
from flows.inline import quiet_console
from flows.run_container_job import run_container_job

from .definitions import Definition, definitions
from .limits import see_to_limits, table
from .registering import CannotServe
from .serving import REQUEST_SECONDS, serve


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # The flow runs' lines are in the Prefect UI; PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL=INFO shows them here, too.
    quiet_console()
    try:
        _see_to_limits(reset=options.command == "limits" and options.reset)
        if options.command is None:
            deployments = _served()
            serve(deployments, take_over=options.take_over, on_registered=lambda: _announce(deployments))
    except (CannotServe, FlowRunError) as e:
        return _fail(str(e))
    except DatabaseError as e:
        return _fail(f"the database can't be used: run `python manage.py migrate` ({' '.join(str(e).split())})")
    return 0


def _served() -> tuple[Definition, ...]:
    """All, but the one that takes images and commands where anybody could hand it some."""
    settings = get_settings()
    why = why_open(settings)
    if why:
        _say(f"not serving {run_container_job.name}: {why}")
    return tuple(definition for definition in definitions(settings) if not why or definition.flow != run_container_job)


def _see_to_limits(*, reset: bool) -> None:
    if not PREFECT_API_URL.value():
        # Prefect would start a server of its own, which schedules nothing.
        raise CannotServe(
            "no Prefect API is configured: run `prefect server start`, and set PREFECT_API_URL to the address it names"
        )
    with translated(), connected(REQUEST_SECONDS) as client:
        # Before the database is asked: without the API there is nothing to say about it.
        client.hello()
        for line in see_to_limits(client, reset=reset):
            _say(line)
        for line in table(client):
            _say(line)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments", description="Serve the Prefect deployments.")
    parser.add_argument(
        "--take-over", action="store_true", help="serve deployments that are on a work pool, which takes them off it"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    limits = commands.add_parser("limits", help="create the tags' limits that do not exist, show all, and end")
    limits.add_argument("--reset", action="store_true", help="set the limits that were changed by hand, too")
    return parser.parse_args(arguments)


def _announce(deployments: tuple[Definition, ...]) -> None:
    for deployment in deployments:
        every = f"every {deployment.interval_seconds} s" if deployment.interval_seconds else "on demand"
        _say(f"serving {deployment.full_name}, {every}")


def _fail(text: str) -> int:
    sys.stderr.write(f"{text}\n")
    return 1


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
