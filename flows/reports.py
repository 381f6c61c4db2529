"""What a flow run tells: its state's message, the queue as an artifact, an event per job."""

import logging
from typing import TypeVar

import httpx
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed
from pydantic import BaseModel

from container_manager.types import LoopStats, QueueMetrics

from .api import level_of

logger = logging.getLogger("container_manager.flows")

#: Prefect allows lower case, digits and dashes.
ARTIFACT_KEY = "container-queue"

_Report = TypeVar("_Report", bound=BaseModel)


def completed(summary: str, report: _Report, *, name: str = "Completed") -> "State[_Report]":
    """A state that carries the report both ways: as data in this process, as JSON in the message's last line."""
    return Completed(name=name, message=f"{summary}\n{report.model_dump_json(exclude_defaults=True)}", data=report)


def summary_of(stats: LoopStats) -> str:
    """`launched 3, ended 2, 1 error`; what is zero is left out."""
    if stats.is_idle:
        return f"nothing to do; {stats.limit}" if stats.limit else "nothing to do"
    counts = (
        ("launched", stats.jobs_launched),
        ("ended", stats.jobs_ended),
        ("stopped", stats.jobs_stopped),
        ("recovered", stats.jobs_recovered),
        ("handed back", stats.jobs_handed_back),
    )
    parts = [f"{verb} {count}" for verb, count in counts if count]
    if stats.error_count:
        parts.append(f"{stats.error_count} error{'s' if stats.error_count > 1 else ''}")
    if stats.limit:
        parts.append(stats.limit)
    return ", ".join(parts)


def show_queue(metrics: QueueMetrics, limit: str) -> None:
    """One table, a new version of it each time. Best effort: a pass is not failed by its display."""
    rows = [
        {"what": "ready now", "jobs": metrics.ready_now},
        {"what": "scheduled for later", "jobs": metrics.scheduled_future},
        {"what": "launching", "jobs": metrics.launching},
        {"what": "running", "jobs": metrics.running},
        {"what": "failed", "jobs": metrics.failed},
        {"what": "failed to launch", "jobs": metrics.launch_failed},
        *(
            {"what": f"alive on host {host.name}, of {host.max_concurrent_jobs}", "jobs": host.alive}
            for host in metrics.hosts
        ),
    ]
    try:
        create_table_artifact(rows, key=ARTIFACT_KEY, description=limit or "The queue of container jobs")
    except httpx.HTTPError as e:
        logger.log(level_of(e), "the artifact of the queue was not written: %s", e)


def emit_changes(stats: LoopStats) -> None:
    """An event per job that changed, for automations. Prefect delivers them in the background."""
    for job_id in stats.job_ids:
        _emit("launched", job_id, {})
    for ended in stats.ended:
        _emit(ended.status, ended.job_id, ended.model_dump(mode="json"))
    launch_errors = {error.job_id: error.error for error in stats.errors}
    for job_id in stats.failed_ids:
        _emit("failed", job_id, {"reason": "launch", "error": launch_errors.get(job_id, "")})


def _emit(what: str, job_id: int, payload: dict[str, object]) -> None:
    emit_event(
        event=f"container-job.{what}",
        resource={"prefect.resource.id": f"container-job.{job_id}", "prefect.resource.name": f"Container job {job_id}"},
        payload={"job_id": job_id, **payload},
    )
