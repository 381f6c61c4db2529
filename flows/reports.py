"""What a flow run tells: its state's message, the queue as an artifact, an event per job."""

import logging
from typing import TypeVar

import httpx
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed
from pydantic import BaseModel

from container_manager.conf import get_settings
from container_manager.types import HostLoad, LoopStats, PurgeReport, QueueMetrics

from .api import is_away, noted
from .links import job_links, job_url

logger = logging.getLogger("container_manager.flows")

#: Prefect allows lower case, digits and dashes. The installation's name goes in front.
ARTIFACT_KEY = "container-queue"
_SHOWN_ERRORS, _SHOWN_LINKS, _SHOWN_CHARACTERS = 5, 20, 300

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


def summary_of_purge(report: PurgeReport) -> str:
    """`removed 3 containers, 12 logs, 4 jobs`; what is zero is left out."""
    counts = (
        ("containers", report.containers),
        ("logs", report.logs),
        ("jobs", report.jobs),
        ("idle flow runs", report.idle_runs),
        ("flow runs", report.runs),
        ("artifacts", report.artifacts),
    )
    parts = [f"{count} {what}" for what, count in counts if count]
    return f"{'would remove' if report.dry_run else 'removed'} {', '.join(parts) or 'nothing'}"


def show_queue(metrics: QueueMetrics, stats: LoopStats) -> None:
    """One table, a new version of it each time. Best effort: a pass is not failed by its display."""
    wait = metrics.oldest_wait_seconds
    rows: list[tuple[str, object]] = [
        ("ready now", metrics.ready_now),
        ("waiting for the longest", f"{wait:.0f} s" if wait is not None else "none"),
        ("scheduled for later", metrics.scheduled_future),
        ("launching", metrics.launching),
        ("running", metrics.running),
        ("failed", metrics.failed),
        ("failed to launch", metrics.launch_failed),
        *((f"alive on host {host.name}", _load_of(host)) for host in metrics.hosts),
        ("what keeps more from starting", stats.limit or "nothing"),
        *((f"error of job {job_id}", _plain(error)) for job_id, error in _errors(stats)[-_SHOWN_ERRORS:]),
    ]
    table = [{"what": what, "now": now} for what, now in rows]
    about = job_links(sorted({*stats.job_ids, *(job.job_id for job in stats.ended), *stats.failed_ids})[-_SHOWN_LINKS:])
    description = f"{summary_of(stats)}\n\n{about}" if about else summary_of(stats)
    if is_away():
        return
    try:
        create_table_artifact(table, key=get_settings().named(ARTIFACT_KEY).replace(".", "-"), description=description)
    except httpx.HTTPError as e:
        logger.log(noted(e), "the artifact of the queue was not written: %s", e)


def show_links(job_ids: list[int]) -> None:
    """Where the run's jobs are shown, if the setting SITE_URL says so."""
    if not (links := job_links(job_ids[:_SHOWN_LINKS])):
        return
    try:
        create_markdown_artifact(links, description="The pages of its jobs")
    except httpx.HTTPError as e:
        logger.log(noted(e), "the links to the jobs were not written: %s", e)


def emit_changes(stats: LoopStats) -> None:
    """An event per job that changed, for automations. Prefect delivers them in the background."""
    for job_id in stats.job_ids:
        _emit("launched", job_id, {})
    for ended in stats.ended:
        _emit(ended.status, ended.job_id, ended.model_dump(mode="json"))
    launch_errors = {error.job_id: error.error for error in stats.errors}
    for job_id in stats.failed_ids:
        _emit("failed", job_id, {"status": "failed", "reason": "launch", "error": launch_errors.get(job_id, "")})


def _emit(what: str, job_id: int, payload: dict[str, object]) -> None:
    emit_event(
        event=f"container-job.{what}",
        resource={
            "prefect.resource.id": get_settings().named(f"container-job.{job_id}"),
            "prefect.resource.name": get_settings().named(f"Container job {job_id}"),
        },
        payload={"job_id": job_id, "url": job_url(job_id), **payload},
    )


def _errors(stats: LoopStats) -> list[tuple[int, str]]:
    """Of launches, then of runs."""
    ended = [(job.job_id, job.error) for job in stats.ended if job.status == "failed" and job.error]
    return [(error.job_id, error.error) for error in stats.errors] + ended


def _load_of(host: HostLoad) -> str:
    return f"{host.alive} of {host.max_concurrent_jobs}" + ("" if host.is_active else ", not active")


def _plain(text: str) -> str:
    """Cells are Markdown: what an Engine or an image says must make no link."""
    return text[:_SHOWN_CHARACTERS].replace("](", "] (")
