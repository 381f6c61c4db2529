"""A harvester in a process of its own. DATABASE_URL and CONTAINER_MANAGER say for which queue.

It harvests what has ended, the containers of the jobs whose ids are its arguments last, and prints by how many
bytes these made its memory grow.
"""

import os
import resource
import sys

import django


def main(job_ids: list[int]) -> None:
    from container_manager.models import ContainerJob, Status
    from container_manager.queue import QueueManager

    manager = QueueManager()
    for job in ContainerJob.objects.running().exclude(pk__in=job_ids):
        manager.look_after(job)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while jobs := ContainerJob.objects.filter(pk__in=job_ids, status=Status.RUNNING):
        for job in jobs:
            manager.look_after(job)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)  # noqa: T201


if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "container_manager.settings"
    django.setup()
    main([int(job_id) for job_id in sys.argv[1:]])
