"""A launcher in a process of its own. DATABASE_URL and CONTAINER_MANAGER say for which queue, its argument how many."""

import os
import sys

import django


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
