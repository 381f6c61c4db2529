"""Names, schedules, tags and limits, defined once. `prefect.yaml` says the same; a test holds the two together."""

from flows import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from container_manager.conf import Settings
from flows.process_jobs import process_jobs
from flows.process_queue import process_queue
from flows.purge import purge
from flows.run_container_job import run_container_job

#: Of the schedule, so that it stays the same one whatever else of it changes.
SCHEDULE_SLUG = "poll"
TAGS = ("container-manager",)
#: Who takes a deployment's runs: the runner of this name, or the work queue of this name on a pool. Flow runs that
#: wait for a job have their own, so that they never hold up the passes.
QUEUE_RUNNER, JOBS_RUNNER = "queue", "jobs"
#: What every schedule counts its intervals from, so that a restart moves none of its times.
MIDNIGHT = datetime(2024, 1, 1, tzinfo=UTC)
#: When a purge is in nobody's way.
EARLY = MIDNIGHT.replace(hour=3, minute=17)


@dataclass(frozen=True)
class Definition:
    """One deployment; `interval_seconds` None: it runs when somebody asks for it."""

    flow: Any
    name: str
    description: str
    parameters: dict[str, Any] = field(default_factory=dict)
    interval_seconds: int | None = None
    anchor: datetime = MIDNIGHT
    runner: str = QUEUE_RUNNER

    @property
    def full_name(self) -> str:
        return f"{self.flow.name}/{self.name}"

    @property
    def entrypoint(self) -> str:
        """A module path: that of a file would hold in one folder alone."""
        flow_function: Callable[..., Any] = self.flow.fn
        return f"{flow_function.__module__}:{flow_function.__name__}"


def definitions(settings: Settings) -> tuple[Definition, ...]:
    return (
        Definition(
            flow=process_queue,
            name="scheduled",
            description="Harvests what has ended and launches what is ready, again and again.",
            parameters={
                "max_concurrent": settings.MAX_CONCURRENT,
                "timeout": 30,
                "work_seconds": settings.WORK_SECONDS,
            },
            interval_seconds=settings.POLL_INTERVAL_SECONDS,
        ),
        Definition(
            flow=process_jobs,
            name="on-demand",
            description="Does for single jobs, by id or by status, what their status asks for.",
        ),
        Definition(
            flow=run_container_job,
            name="on-demand",
            description="Runs one job: what it writes and how it ends is the log and the end of the flow run.",
            runner=JOBS_RUNNER,
        ),
        Definition(
            flow=purge,
            name="daily",
            description="Removes containers, logs, jobs and flow runs that were kept for long enough.",
            interval_seconds=24 * 3600,
            anchor=EARLY,
        ),
    )
