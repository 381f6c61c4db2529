"""`python -m tests.benchmarks.command_memory [ITERATIONS]`: is the continuous mode's memory flat?

The command's loop in this process, its flow runs inline on a temporary Prefect server, a fake Engine, no wait between
iterations. Every tenth has a job that runs and one that fails to launch: an empty queue would not show what is kept of
jobs and errors. SQLite and the Prefect home are in a folder of its own.
"""

import gc
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from io import StringIO
from typing import Any

from .memory import resident_mib

#: Share of the iterations in which caches and the allocator fill up.
WARM_UP = 0.25
SAMPLES = 40
#: MiB over the whole of 2,000 iterations.
GOAL_MIB = 5.0
#: Fewer have hardly filled the caches; what they would grow by is told, not judged.
JUDGED_ITERATIONS = 1000
#: Iterations from one with jobs to the next.
JOBS_EVERY = 10


def main(iterations: int) -> int:
    with tempfile.TemporaryDirectory(prefix="container-manager-bench-") as folder:
        os.environ |= {
            "DJANGO_SETTINGS_MODULE": "container_manager.settings",
            "DATABASE_URL": f"sqlite:///{folder}/bench.sqlite3",
            "PREFECT_HOME": f"{folder}/prefect",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }
        os.environ.pop("PREFECT_API_URL", None)
        samples = _measure(iterations)
    settled = [sample for sample in samples if sample[0] >= WARM_UP * iterations]
    third = max(1, len(settled) // 3)
    early = statistics.median(mib for _, mib in settled[:third])
    late = statistics.median(mib for _, mib in settled[-third:])
    slope = statistics.linear_regression(*zip(*settled, strict=True)).slope * 2000
    for number, mib in samples[:: max(1, len(samples) // 10)]:
        print(f"{number:>6} iterations  {mib:7.1f} MiB")
    print(
        f"continuous mode, {iterations} iterations: {early:.1f} -> {late:.1f} MiB (ratio {late / early:.3f}), "
        f"{slope:+.1f} MiB per 2,000 iterations; goal: below {GOAL_MIB:g}"
        + ("" if iterations >= JUDGED_ITERATIONS else f", judged from {JUDGED_ITERATIONS} iterations on")
    )
    return 0 if slope < GOAL_MIB or iterations < JUDGED_ITERATIONS else 1


def _measure(iterations: int) -> list[tuple[int, float]]:
    import django

    django.setup()
    from contextlib import closing

    from django.core.management import call_command
    from django.core.management.base import OutputWrapper

    from container_manager.hosts import Hosts
    from container_manager.management.flow_runs import PrefectFlowRuns
    from container_manager.management.processing import Options, QueueProcessor
    from container_manager.management.queue_report import Console
    from container_manager.management.signals import SignalWatch
    from container_manager.models import ContainerJob, DockerHost
    from container_manager.queue import queue_manager
    from tests.fake_engine import Fleet

    call_command("migrate", verbosity=0)
    DockerHost.objects.all().delete()
    fleet = Fleet()
    engine = fleet.add_host()
    queue_manager._hosts = Hosts(fleet)
    console = Console(OutputWrapper(StringIO()), OutputWrapper(sys.stderr), as_json=False)
    options = Options(poll_interval=0)
    watch = SignalWatch()
    samples: list[tuple[int, float]] = []
    step = max(1, iterations // SAMPLES)
    began = time.monotonic()

    def queue_jobs() -> None:
        for fields in ({}, {"image": "absent", "pull_policy": "never", "max_retries": 0}):
            job = ContainerJob.objects.create_job(**{"image": "busybox", "command": ["true"]} | fields)
            queue_manager.queue_job(job)

    class Counted(QueueProcessor):
        def _run_once(self, work_seconds: float) -> Any:
            if self.iterations % JOBS_EVERY == 0:
                queue_jobs()
            done = super()._run_once(work_seconds)
            # What it remembers of each call is a test's, not the command's.
            engine.calls.clear()
            engine.starts.clear()
            engine.ends.clear()
            if self.iterations % step == 0:
                gc.collect()
                samples.append((self.iterations, resident_mib()))
                each = (time.monotonic() - began) / self.iterations
                print(f"{self.iterations} of {iterations}, {each * 1000:.0f} ms each", file=sys.stderr, flush=True)
            if self.iterations >= iterations:
                watch.stopped_by = 15
            return done

    with closing(PrefectFlowRuns("inline", console, options)) as runs:
        Counted(runs, console, watch, options).process(once=False, dry_run=False)
    print(f"threads at the end: {threading.active_count()}; jobs: {_statuses()}", file=sys.stderr)
    return samples


def _statuses() -> dict[str, int]:
    from container_manager.models import ContainerJob

    return dict(Counter(ContainerJob.objects.values_list("status", flat=True)))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000))
