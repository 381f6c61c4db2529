"""`python -m deployments`: serve the deployments. `sync` only registers them; `limits` shows the tags' limits."""

import argparse
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from django.db.utils import Error as DatabaseError
from prefect.settings import PREFECT_API_URL

from container_manager.conf import get_settings
from container_manager.exceptions import ContainerManagerError
from flows.api import connected, translated
from flows.exposure import why_open
from flows.inline import quiet_console
from flows.run_container_job import run_container_job

from .definitions import Definition, definitions
from .limits import see_to_limits, table
from .registering import CannotServe, refuse_foreign, register
from .serving import REQUEST_SECONDS, serve


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # The flow runs' lines are in the Prefect UI; PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL=INFO shows them here, too.
    quiet_console()
    try:
        _see_to_limits(reset=options.command == "limits" and options.reset, take_over=options.take_over)
        if options.command is None:
            serve(
                _Allowed(),
                take_over=options.take_over,
                alive_file=options.alive_file,
                on_registered=lambda deployments: _announce("serving", deployments),
            )
        elif options.command == "sync":
            _sync(pool=options.pool, take_over=options.take_over, reset=options.reset)
    except (CannotServe, ContainerManagerError) as e:
        return _fail(str(e))
    except DatabaseError as e:
        return _fail(f"the database can't be used: run `python manage.py migrate` ({' '.join(str(e).split())})")
    return 0


class _Allowed:
    """The deployments that may be served. `run-container-job` is left out while the API is open to strangers; the
    reason is printed once.
    """

    def __init__(self) -> None:
        self._told = ""

    def __call__(self) -> tuple[Definition, ...]:
        settings = get_settings()
        why = why_open(settings)
        if why and why != self._told:
            _say(f"not serving {run_container_job.name}: {why}")
        self._told = why
        return tuple(
            definition for definition in definitions(settings) if not why or definition.flow != run_container_job
        )


def _sync(*, pool: str, take_over: bool, reset: bool) -> None:
    deployments = definitions(get_settings()) if pool else _Allowed()()
    with translated(), connected(REQUEST_SECONDS) as client:
        registered = register(client, deployments, pool=pool, take_over=take_over, reset=reset)
    if len(registered) < len(deployments):
        raise CannotServe("not all deployments could be registered: see above")
    _announce(f"registered for the work pool {pool}:" if pool else "registered", deployments)


def _see_to_limits(*, reset: bool, take_over: bool) -> None:
    if not PREFECT_API_URL.value():
        # Prefect would start a server of its own, which schedules nothing.
        raise CannotServe(
            "no Prefect API is configured: run `prefect server start`, and set PREFECT_API_URL to the address it names"
        )
    with translated(), connected(REQUEST_SECONDS) as client:
        # Before the database is asked: without the API there is nothing to say about it.
        client.hello()
        if not take_over:
            # The limits of these names also belong to the other installation.
            refuse_foreign(client, definitions(get_settings()))
        for line in see_to_limits(client, reset=reset):
            _say(line)
        for line in table(client):
            _say(line)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments", description="Serve the Prefect deployments.")
    take_over: dict[str, Any] = {
        "action": "store_true",
        "help": "take over deployments from a work pool, or from an installation that no longer exists",
    }
    parser.add_argument("--take-over", **take_over)
    parser.add_argument(
        "--alive-file",
        type=Path,
        metavar="FILE",
        help="touch this file whenever the API and the database have answered",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    limits = commands.add_parser("limits", help="create missing limits of tags, show all limits, and end")
    limits.add_argument("--reset", action="store_true", help="also set back limits that were changed by hand")
    sync = commands.add_parser("sync", help="register the deployments, serve nothing, and end")
    sync.add_argument("--pool", default="", metavar="NAME", help="for the workers of this work pool")
    sync.add_argument("--take-over", **take_over | {"default": argparse.SUPPRESS})
    sync.add_argument(
        "--reset", action="store_true", help="also set back values that were changed by hand, except limits"
    )
    return parser.parse_args(arguments)


def _announce(what: str, deployments: Iterable[Definition]) -> None:
    for deployment in deployments:
        every = f"every {deployment.interval_seconds} s" if deployment.interval_seconds else "on demand"
        _say(f"{what} {deployment.full_name}, {every}")


def _fail(text: str) -> int:
    sys.stderr.write(f"{text}\n")
    return 1


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
