"""Defines the deployments: names, schedules and tags. `prefect.yaml` has the same values; a test compares the two."""

from flows import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from container_manager.conf import Settings
from flows.identity import TAG
from flows.late_runs import SCHEDULE_SLUG as SCHEDULE_SLUG
from flows.process_jobs import process_jobs
from flows.process_queue import process_queue
from flows.purge import INTERVAL_SECONDS, purge
from flows.run_container_job import run_container_job

#: Who takes a deployment's runs: the runner of this name, or the work queue of this name on a pool. Flow runs that
#: wait for a job have their own, so that they never hold up the passes.
QUEUE_RUNNER, JOBS_RUNNER = "queue", "jobs"
#: What every schedule counts its intervals from, so that a restart moves none of its times.
MIDNIGHT = datetime(2024, 1, 1, tzinfo=UTC)
#: When a purge is in nobody's way.
EARLY = MIDNIGHT.replace(hour=3, minute=17)


@dataclass(frozen=True)
class Definition:
    """One deployment of this installation. It has no schedule if `interval_seconds` is None."""

    flow: Any
    name: str
    description: str
    tags: tuple[str, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    interval_seconds: int | None = None
    anchor: datetime = MIDNIGHT
    runner: str = QUEUE_RUNNER
    #: The description that earlier versions wrote.
    earlier_description: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.flow.name}/{self.name}"

    @property
    def entrypoint(self) -> str:
        """A module path: that of a file would hold in one folder alone."""
        flow_function: Callable[..., Any] = self.flow.fn
        return f"{flow_function.__module__}:{flow_function.__name__}"


def definitions(settings: Settings) -> tuple[Definition, ...]:
    named = settings.named

    def tags(what: str) -> tuple[str, ...]:
        """Two deployments are called `on-demand`; the second tag tells them apart in a list."""
        return named(TAG), named(what)

    return (
        Definition(
            flow=process_queue,
            name=named("scheduled"),
            description="A pass over the queue: collects jobs that have ended and launches those that are ready.",
            tags=tags("passes"),
            parameters={
                "max_concurrent": settings.MAX_CONCURRENT,
                "timeout": 30,
                "work_seconds": settings.WORK_SECONDS,
            },
            interval_seconds=settings.POLL_INTERVAL_SECONDS,
            earlier_description="Harvests what has ended and launches what is ready, again and again.",
        ),
        Definition(
            flow=process_jobs,
            name=named("on-demand"),
            description="Jobs that are in the queue already, by id or by status: does what their status asks for.",
            tags=tags("queued-jobs"),
            earlier_description="Does for single jobs, by id or by status, what their status asks for.",
        ),
        Definition(
            flow=run_container_job,
            name=named("on-demand"),
            description="A new job: runs an image and a command, shows its output, and ends as the container ends.",
            tags=tags("new-job"),
            runner=JOBS_RUNNER,
            earlier_description="Runs one job: what it writes and how it ends is the log and the end of the flow run.",
        ),
        Definition(
            flow=purge,
            name=named("daily"),
            description="Removes containers, logs, jobs and flow runs that have been kept for long enough.",
            tags=tags("retention"),
            interval_seconds=INTERVAL_SECONDS,
            anchor=EARLY,
            earlier_description="Removes containers, logs, jobs and flow runs that were kept for long enough.",
        ),
    )
