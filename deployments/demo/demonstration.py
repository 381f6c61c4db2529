"""The demonstration: migrate, queue the manifest's jobs, process the queue until all have ended, say how."""

import json
import subprocess
import sys
import time
from pathlib import Path

from django.core.management import call_command
from django.db.models import Count

from container_manager.manifest import load
from container_manager.models import ENDED, ContainerJob, DockerHost

from ..checkout import ROOT
from .table import Line, render

MANIFEST = Path(__file__).with_name("jobs.yaml")
#: seconds; the jobs themselves need fifteen.
DEADLINE_SECONDS = 150


def main() -> int:
    call_command("migrate", verbosity=0)
    DockerHost.objects.get_or_create(name="local")
    job_ids = _queue()
    # One slot at first, so that all can see which job is the first to start.
    options = ["--max-concurrent=1"]
    until = time.monotonic() + DEADLINE_SECONDS
    jobs = ContainerJob.objects.filter(pk__in=job_ids)
    is_alone = True
    while jobs.exclude(status__in=ENDED).exists():
        if time.monotonic() > until:
            _say(f"not all jobs have ended within {DEADLINE_SECONDS} s")
            break
        _manage("process_container_jobs", "--queue-mode", "--once", *options)
        counts = jobs.order_by("status").values_list("status").annotate(Count("pk"))
        _say("  " + ", ".join(f"{status} {count}" for status, count in counts))
        if options:
            # Another process, such as `make serve`, may have launched some of the jobs.
            is_alone = jobs.filter(launched_at__isnull=False).count() <= 1
        options = []
    lines = [Line(job, entry) for job, entry in zip(jobs.order_by("pk"), load(MANIFEST).jobs, strict=True)]
    _say("\n" + render(lines))
    surprises = [line.surprise for line in lines if line.surprise]
    first = jobs.filter(launched_at__isnull=False).order_by("launched_at").first()
    if is_alone and (first is None or first.name != "high-priority"):
        surprises.append(f"the first job to start was {first.label if first else 'none'}, not high-priority")
    for surprise in surprises:
        _say(f"NOT AS EXPECTED: {surprise}")
    if not surprises and is_alone:
        _say("All eight ended as expected, and the one of high priority, queued last, started first.")
    elif not surprises:
        _say("All eight ended as expected. Something else launched some of them, so their order says nothing.")
    _say_where_to_look()
    return 1 if surprises else 0


def _queue() -> list[int]:
    answer = json.loads(_manage("queue_container_jobs", str(MANIFEST.relative_to(ROOT)), "--json"))
    job_ids: list[int] = answer["job_ids"]
    return job_ids


def _manage(*arguments: str) -> str:
    """Run manage.py as a person would, and show it."""
    _say(f"$ python manage.py {' '.join(arguments)}")
    result = subprocess.run(  # noqa: S603 (our own arguments)
        [sys.executable, "manage.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    # 3 says that a job could not be launched, and one of ours can't.
    if result.returncode not in (0, 3):
        sys.exit(f"manage.py {arguments[0]} ended with exit code {result.returncode}")
    _say(result.stdout.rstrip())
    return result.stdout


def _say_where_to_look() -> None:
    _say(
        f"""
Where to look next, in {ROOT}:
  make serve    the jobs and their logs    -> http://127.0.0.1:8000/admin/
                the flow runs              -> http://127.0.0.1:4200
                and a schedule that runs what is queued, as `python -m deployments` does"""
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
