"""The queue in figures."""

from django.db.models.functions import Now

from .capacity import loads
from .models import ContainerJob, Reason, Status
from .types import QueueMetrics


def measure_queue() -> QueueMetrics:
    """Each figure by a count on its own index."""
    jobs = ContainerJob.objects.order_by()
    alive = list(jobs.alive().values_list("status", flat=True))
    running = alive.count(Status.RUNNING)
    waits = [
        rows.order_by(since).annotate(now=Now()).values_list(since, "now").first()
        for rows, since in ((jobs.queued(), "queued_at"), (jobs.due(), "scheduled_for"))
    ]
    return QueueMetrics(
        ready_now=jobs.queued().count() + jobs.due().count(),
        scheduled_future=jobs.scheduled().filter(scheduled_for__gt=Now()).count(),
        launching=len(alive) - running,
        running=running,
        failed=jobs.failed().count(),
        launch_failed=jobs.failed().filter(reason=Reason.LAUNCH).count(),
        oldest_wait_seconds=max(
            (max(0.0, (now - since).total_seconds()) for since, now in filter(None, waits)), default=None
        ),
        hosts=loads(),
    )
