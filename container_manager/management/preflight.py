"""What must be right before anything happens. Each problem is one line that says what to do."""

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import CommandError
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.db.utils import Error as DatabaseError

from container_manager.checks import check_settings

from .processing import Options
from .queue_report import one_line

_LEAST = {"max_concurrent": 1, "poll_interval": 1, "timeout": 1, "shutdown_timeout": 0}


def check_options(options: Options, *, queue_mode: bool, is_choosing: bool) -> None:
    if queue_mode and is_choosing:
        raise CommandError("Cannot use --queue-mode with --job-id or --status")
    for name, least in _LEAST.items():
        if getattr(options, name) < least:
            raise CommandError(f"--{name.replace('_', '-')} must be at least {least}")


def check_project() -> None:
    problems = [message.msg for message in check_settings(None) if message.is_serious()]
    if problems:
        raise CommandError(f"{'; '.join(problems)}: correct it, then run `manage.py check`")


def check_database() -> None:
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
