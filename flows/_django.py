"""Sets up Django, and keeps the password in `.env` from other APIs. Every flow module imports this first."""

import logging
import os

import django
from django.apps import apps
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler

from ._dotenv import keep_password_from_others

keep_password_from_others()
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "container_manager.settings")
if not apps.ready:
    django.setup()


def _is_in_run(record: logging.LogRecord) -> bool:
    """Prefect warns about every record that it can't put to a run."""
    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def _show_logs_in_prefect() -> None:
    # The setting PREFECT_LOGGING_EXTRA_LOGGERS does not do: `django.setup` takes its handlers off again.
    logger = logging.getLogger("container_manager")
    if any(isinstance(handler, APILogHandler) for handler in logger.handlers):
        return
    if logger.getEffectiveLevel() > logging.INFO:
        for handler in logger.handlers:
            handler.setLevel(max(handler.level, logger.getEffectiveLevel()))
        logger.setLevel(logging.INFO)
    handler = APILogHandler()
    handler.addFilter(_is_in_run)
    logger.addHandler(handler)


_show_logs_in_prefect()
