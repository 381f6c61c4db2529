"""`python -m deployments.demo`, which is `make demo`."""

import os
import sys
from pathlib import Path

import django

ROOT = Path(__file__).resolve().parent.parent.parent


def prepare() -> None:
    """The environment of this process and of the commands that it runs."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "container_manager.settings")
    # The server that the last lines name finds the runs of the demonstration here.
    os.environ.setdefault("PREFECT_HOME", str(ROOT / ".prefect"))
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    django.setup()


if __name__ == "__main__":
    prepare()
    from .demonstration import main

    sys.exit(main())
