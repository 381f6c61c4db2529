"""`python -m tests.benchmarks.log_memory ours|reference CONTAINER`: the MiB that reading one log takes."""

import sys

import django
import docker

from .memory import peak_mib


def _reference(container_id: str) -> float:
    client = docker.APIClient(version="auto", timeout=60)
    client.ping()
    before = peak_mib()
    client.logs(container_id)
    return peak_mib() - before


def _ours() -> float:
    django.setup()
    from container_manager.queue import QueueManager

    queue = QueueManager()
    # What every pass takes is not the log's.
    queue.get_worker_metrics()
    before = peak_mib()
    stats = queue.process_queue_continuous(1, 1, work_seconds=0)
    assert stats.jobs_ended == 1, stats
    return peak_mib() - before


if __name__ == "__main__":
    print(_ours() if sys.argv[1] == "ours" else _reference(sys.argv[2]))
