"""System checks: `manage.py check`, and every command's start, say what is set wrong."""

from collections.abc import Sequence
from typing import Any

from django.apps.config import AppConfig
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Warning, register  # noqa: A004 (Django's name for it)
from django.core.exceptions import ImproperlyConfigured
from django.db import connection
from django.utils.module_loading import import_string

from .conf import get_settings


@register
def check_settings(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    try:
        settings = get_settings()
    except ImproperlyConfigured as e:
        return [Error(str(e), id="container_manager.E001")]
    messages: list[CheckMessage] = []
    if settings.SECRET_RESOLVER:
        problem = _problem_of_resolver(settings.SECRET_RESOLVER)
        if problem:
            messages.append(Error(f"CONTAINER_MANAGER: SECRET_RESOLVER: {problem}", id="container_manager.E002"))
    if settings.LEASE_SECONDS < 3 * settings.DOCKER_TIMEOUT_SECONDS:
        messages.append(
            Warning(
                "CONTAINER_MANAGER: LEASE_SECONDS is less than three times DOCKER_TIMEOUT_SECONDS",
                hint="A launch with one slow call would outlive its lease and be undone.",
                id="container_manager.W002",
            )
        )
    if settings.WORK_SECONDS >= settings.POLL_INTERVAL_SECONDS:
        messages.append(
            Warning(
                "CONTAINER_MANAGER: WORK_SECONDS is not less than POLL_INTERVAL_SECONDS",
                hint="Each scheduled pass would overlap the next.",
                id="container_manager.W003",
            )
        )
    return messages


@register
def check_database(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    if connection.vendor not in ("postgresql", "sqlite"):
        return [
            Error(
                f"The queue can't be on {connection.vendor}: it needs PostgreSQL or SQLite, as DATABASES['default']",
                id="container_manager.E003",
            )
        ]
    database = django_settings.DATABASES["default"]
    is_sqlite = database.get("ENGINE") == "django.db.backends.sqlite3"
    if is_sqlite and database.get("OPTIONS", {}).get("transaction_mode") != "IMMEDIATE":
        return [
            Warning(
                "The queue is on SQLite without IMMEDIATE transactions: under load it fails with 'database is locked'",
                hint="Set DATABASES['default']['OPTIONS'] = {'transaction_mode': 'IMMEDIATE', 'timeout': 20, "
                "'init_command': 'PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;'}",
                id="container_manager.W001",
            )
        ]
    return []


@register
def check_logging(app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    config = django_settings.LOGGING
    # Django's own default for a configuration that does not say so is to disable.
    if not config or not config.get("disable_existing_loggers", True):
        return []
    return [
        Warning(
            "LOGGING disables existing loggers: Prefect's are among them, and flow runs have no logs",
            hint="Set LOGGING['disable_existing_loggers'] = False",
            id="container_manager.W004",
        )
    ]


def _problem_of_resolver(path: str) -> str:
    try:
        resolver = import_string(path)
    except ImportError as e:
        return str(e)
    return "" if callable(resolver) else f"{path} is not callable"
