"""`python -m tests.fuzz`: a run per seed and database, a line for each; the exit code tells whether all held.

TEST_POSTGRES_URL names a PostgreSQL server on which a database for the run may be made.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DATABASES = ("sqlite", "postgres")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--database", choices=DATABASES, help="on this one alone (default: both)")
    parser.add_argument("--jobs", type=int, default=60, help="of each run (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--cap", type=int, default=6, help="containers alive at once (default: %(default)s)")
    parser.add_argument("--kill", type=float, default=0.01, help="probability at each point (default: %(default)s)")
    parser.add_argument("--stall", type=float, default=0.015, help="probability at each point (default: %(default)s)")
    parser.add_argument("--lose", type=float, default=0.05, help="probability per answer (default: %(default)s)")
    parser.add_argument("--storm", type=float, default=120, help="seconds with faults (default: %(default)s)")
    parser.add_argument("--calm", type=float, default=60, help="seconds to settle after it (default: %(default)s)")
    options = parser.parse_args()
    if options.database is None:
        # A process for each: Django knows one default database.
        again = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:], "--database"]
        return max([os.spawnv(os.P_WAIT, sys.executable, [*again, name]) for name in DATABASES])
    # What stops this process must not keep it from ending its workers and removing their containers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="container-manager-fuzz-") as folder, _database(options.database, folder):
        return _on_one(options, Path(folder))


@contextmanager
def _database(kind: str, folder: str) -> Iterator[None]:
    """An empty database as `DATABASE_URL`, which the workers inherit; gone with the run."""
    if kind == "sqlite":
        os.environ["DATABASE_URL"] = f"sqlite:///{folder}/fuzz.sqlite3"
        yield
        return
    import psycopg

    server, name = os.environ["TEST_POSTGRES_URL"], f"container_manager_fuzz_{os.getpid()}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        os.environ["DATABASE_URL"] = f"{server.rpartition('/')[0]}/{name}"
        try:
            yield
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _on_one(options: argparse.Namespace, folder: Path) -> int:
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.fuzz.settings"
    import django

    django.setup()
    from django.core.management import call_command

    from . import driver, verdict
    from .faults import Chances, tally
    from .worker import Plan

    call_command("migrate", verbosity=0)
    outcomes = []
    for seed in options.seeds:
        chances = Chances(options.kill, options.stall, options.lose, calm_at=time.monotonic() + options.storm)
        plan = Plan(seed, options.cap, chances, folder / f"seed-{seed}")
        outcomes.append(driver.run(plan, options.jobs, options.workers, options.storm + options.calm))
        print(*verdict.lines(outcomes[-1].cells, is_first=len(outcomes) == 1), sep="\n", flush=True)
        for violation in outcomes[-1].violations:
            print(f"seed {seed} on {options.database}: {violation}", flush=True)
    print(verdict.describe(tally(folder.glob("*/*.points"))), flush=True)
    return int(any(outcome.violations for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
