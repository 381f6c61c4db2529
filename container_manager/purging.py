"""To purge: what is kept no longer. Batches in transactions of their own; any number of purges may overlap."""

from collections.abc import Callable

from django.db import transaction
from django.db.models import QuerySet

from . import shutdown
from .collecting import collect
from .conf import get_settings
from .hosts import Hosts
from .models import ENDED, ContainerJob, Installation, JobAttempt, WatchedLog
from .observing import observe
from .transitions import from_now
from .types import PurgeReport

#: Rows per transaction: tens of milliseconds, so that nothing waits for a purge for long.
BATCH = 1000
_DAY = 24 * 3600


def purge(hosts: Hosts, *, dry_run: bool) -> PurgeReport:
    """Remove what the settings KEEP_… keep no longer; with `dry_run` only count it.

    Containers first: without its job a container is nobody's, and only reported. Ends early when a stop is asked for.
    """
    settings = get_settings()
    connections, problems = hosts.reach(also_drained=True)
    instance_id = Installation.load().instance_id
    view = observe(connections, instance_id)
    leftovers = collect(view, instance_id, dry_run=dry_run)
    logs = JobAttempt.objects.filter(ended_at__lt=from_now(-settings.KEEP_LOGS_DAYS * _DAY)).exclude(
        stdout="", stderr=""
    )
    # The record of a container that is kept for a look is kept, too.
    job_seconds = max(settings.KEEP_JOBS_DAYS * _DAY, settings.KEEP_FAILED_CONTAINERS_SECONDS)
    jobs = ContainerJob.objects.filter(status__in=ENDED, finished_at__lt=from_now(-job_seconds))
    return PurgeReport(
        dry_run=dry_run,
        containers=leftovers.removed,
        logs=logs.count() if dry_run else _in_batches(logs, _clear_logs),
        jobs=jobs.count() if dry_run else _in_batches(jobs, _delete_jobs),
        anomalies=(*problems, *view.problems, *leftovers.anomalies),
    )


def _in_batches(old: "QuerySet[JobAttempt] | QuerySet[ContainerJob]", remove: Callable[[list[int]], object]) -> int:
    """How many rows. By ascending id, so that each row is looked at once."""
    removed = last = 0
    while not shutdown.is_stopping():
        with transaction.atomic():
            # One that another holds is being run anew, or purged by another.
            rows = old.filter(pk__gt=last).order_by("pk").select_for_update(skip_locked=True)
            ids = list(rows.values_list("pk", flat=True)[:BATCH])
            if not ids:
                break
            remove(ids)
        removed += len(ids)
        last = ids[-1]
    return removed


def _clear_logs(ids: list[int]) -> None:
    JobAttempt.objects.filter(pk__in=ids).update(stdout="", stderr="")


def _delete_jobs(ids: list[int]) -> None:
    # Not by the jobs' own cascade, which reads every row in full.
    JobAttempt.objects.filter(job__in=ids).delete()
    WatchedLog.objects.filter(job__in=ids).delete()
    ContainerJob.objects.filter(pk__in=ids)._raw_delete(using=ContainerJob.objects.db)
