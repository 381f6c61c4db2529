"""`python -m deployments`: serve the deployments. `python -m deployments limits`: create the tags' limits."""

import argparse
import logging
import sys

import httpx

from container_manager.conf import get_settings

from .definitions import create_limits, definitions
from .serving import CannotServe, require_api, serve


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        require_api()
        written = create_limits(reset=getattr(options, "reset", False))
    except CannotServe as e:
        return _fail(str(e))
    except httpx.HTTPError as e:
        return _fail(f"the Prefect API does not answer: {e}")
    for tag, limit in written.items():
        _say(f"limit of tag {tag}: {limit}")
    if options.command == "limits":
        _say("" if written else "the limits exist; --reset sets them to their defaults")
        return 0
    try:
        deployments = definitions(get_settings())
        for deployment in deployments:
            every = f"every {deployment.interval_seconds} s" if deployment.interval_seconds else "on demand"
            _say(f"serving {deployment.full_name}, {every}")
        serve(deployments, take_over=options.take_over)
    except CannotServe as e:
        return _fail(str(e))
    except KeyboardInterrupt:
        return 0
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments", description="Serve the Prefect deployments.")
    parser.add_argument(
        "--take-over", action="store_true", help="serve deployments that are on a work pool, which ends that"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    limits = commands.add_parser("limits", help="create the limits of the tags that do not exist, and end")
    limits.add_argument("--reset", action="store_true", help="set limits that were changed by hand, too")
    return parser.parse_args(arguments)


def _say(text: str) -> None:
    if text:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def _fail(text: str) -> int:
    sys.stderr.write(f"{text}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
