"""`python -m tests.benchmarks [ROW…]`: measure, print the table, and say whether every goal was reached."""

import argparse
import os
import sys
import tempfile
from importlib import import_module

#: Whatever the database, these come to the same: they are measured on PostgreSQL, unless SQLite is asked for.
ONCE = ("logs", "passes", "idle")
#: Each is a module here with a function `measure() -> Iterator[Figure]`.
ROWS = ("claim", "queries", "enqueue", "launch", "drain", "logs", "passes", "idle")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one or more of: {', '.join(ROWS)} (default: all)")
    parser.add_argument("--database", choices=["sqlite", "postgres"], help="on this one alone (default: both)")
    parser.add_argument("--here", action="store_true", help="in this process, on the database of DATABASE_URL")
    options = parser.parse_args()
    unknown = set(options.rows) - set(ROWS)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    rows = options.rows or list(ROWS)
    if options.here:
        return _here(rows)
    if options.database:
        return _on(options.database, rows)
    return max(_on("sqlite", [row for row in rows if row not in ONCE]), _on("postgres", rows))


def _on(database: str, rows: list[str]) -> int:
    """In a process of its own: Django knows one default database."""
    if not rows:
        return 0
    with tempfile.TemporaryDirectory(prefix="container-manager-bench-") as folder:
        url = f"sqlite:///{folder}/bench.sqlite3" if database == "sqlite" else _postgres_database()
        environment = os.environ | {
            "DATABASE_URL": url,
            "PREFECT_HOME": f"{folder}/prefect",
            "DJANGO_SETTINGS_MODULE": f"{__package__}.settings",
        }
        arguments = [sys.executable, "-m", __package__, *rows, "--here"]
        return os.spawnve(os.P_WAIT, sys.executable, arguments, environment)


def _postgres_database() -> str:
    """The URL of a database of the benchmarks' own, on the server that BENCH_POSTGRES_URL names."""
    import psycopg

    server = os.environ["BENCH_POSTGRES_URL"]
    name = "container_manager_bench"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}")
        connection.execute(f"CREATE DATABASE {name}")
    return f"{server.rpartition('/')[0]}/{name}"


def _here(rows: list[str]) -> int:
    import django

    django.setup()
    from django.core.management import call_command

    from .figures import Table

    call_command("migrate", verbosity=0)
    table = Table()
    for row in rows:
        for figure in import_module(f"{__package__}.{row}").measure():
            table.figures.append(figure)
            print(" | ".join(cell for cell in figure.cells if cell), file=sys.stderr, flush=True)
    print(table.render())
    return 1 if any(figure.verdict == "NO" for figure in table.figures) else 0


if __name__ == "__main__":
    sys.exit(main())
