"""A launcher in a process of its own. DATABASE_URL and CONTAINER_MANAGER say for which queue, its argument how many."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import django


def start_launcher(log: Path, max_concurrent: int, *, before: Sequence[str] = ()) -> "subprocess.Popen[bytes]":
    """It works until every job has ended. `before`: what runs it, such as `unshare --mount`."""
    from django.conf import settings

    from tests.conftest import ROOT, database_url

    environment = os.environ | {
        "DATABASE_URL": database_url(),
        "CONTAINER_MANAGER": json.dumps(settings.CONTAINER_MANAGER),
    }
    with log.open("wb") as output:
        return subprocess.Popen(
            [*before, sys.executable, "-m", "tests.integration.launcher", str(max_concurrent)],
            cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def main(max_concurrent: int) -> None:
    from container_manager.models import ENDED, ContainerJob
    from container_manager.queue import QueueManager

    manager = QueueManager()
    while ContainerJob.objects.exclude(status__in=ENDED).exists():
        manager.launch_next_batch(max_concurrent)
        manager.process_queue_continuous(max_concurrent, 1, work_seconds=1)


if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "container_manager.settings"
    django.setup()
    main(int(sys.argv[1]))
