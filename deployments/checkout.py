"""The environment of what runs in a checkout, for a first look: of this process and of those that it starts."""

import os
from pathlib import Path

import django

from container_manager.private_files import make_folder, tighten

ROOT = Path(__file__).resolve().parent.parent


def prepare() -> None:
    """To be called before anything that needs Django or Prefect is imported."""
    # Only the user who started this process can read the files that it and its child processes create.
    os.umask(0o077)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "container_manager.settings")
    # One home for all: the server of `make serve` finds the runs of `make demo` here.
    if not os.environ.get("PREFECT_HOME"):
        os.environ["PREFECT_HOME"] = str(ROOT / ".prefect")
        _make_home(ROOT / ".prefect")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    django.setup()


def _make_home(path: Path) -> None:
    """The server's database in it holds the parameters and the logs of flow runs."""
    make_folder(path)
    for file in path.glob("*"):
        if file.is_file():
            tighten(file)
