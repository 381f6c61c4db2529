"""The environment of what runs in a checkout, for a first look: of this process and of those that it starts."""

import os
from pathlib import Path

import django

ROOT = Path(__file__).resolve().parent.parent


def prepare() -> None:
    """To be called before anything that needs Django or Prefect is imported."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "container_manager.settings")
    # One home for all: the server of `make serve` finds the runs of `make demo` here.
    os.environ.setdefault("PREFECT_HOME", str(ROOT / ".prefect"))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    django.setup()
