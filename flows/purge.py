"""Retention: what is older than the settings say is removed, here and at the Prefect server."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import logging
from typing import Annotated

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.states import Failed
from pydantic import Field

from container_manager.conf import get_settings
from container_manager.queue import queue_manager
from container_manager.types import PurgeReport

from . import identity, old_runs
from .late_runs import delete_missed_runs
from .reports import completed, summary_of_purge
from .termination import graceful_termination

logger = logging.getLogger("container_manager.flows")

#: seconds; far above any purge but the first one of years of jobs, which the next one goes on with.
BACKSTOP_SECONDS = 3600

#: seconds; the interval of the schedule.
INTERVAL_SECONDS = 24 * 3600

DryRun = Annotated[bool, Field(description="Only count what would be removed.")]


@flow(name="purge", timeout_seconds=BACKSTOP_SECONDS, persist_result=False)
def purge(dry_run: DryRun = False) -> "State[PurgeReport]":
    """Remove containers, logs, jobs and flow runs that are kept long enough by the settings KEEP_….

    Any number of these may overlap.
    """
    if problem := identity.why_not_ours():
        return Failed(message=problem)
    with graceful_termination():
        delete_missed_runs(INTERVAL_SECONDS)
        report = queue_manager.purge(dry_run=dry_run)
        for anomaly in report.anomalies:
            logger.warning(anomaly)
        logger.info(summary_of_purge(report))
        report = _purge_runs(report)
    return completed(summary_of_purge(report), report)


def _purge_runs(report: PurgeReport) -> PurgeReport:
    settings = get_settings()
    idle, ended, abandoned = old_runs.idle(settings), old_runs.ended(settings), old_runs.abandoned(settings)
    with get_client(sync_client=True) as client:
        if report.dry_run:
            counts = {"idle_runs": idle.count(client), "runs": ended.count(client) + abandoned.count(client)}
            return report.model_copy(update=counts)
        idle_runs, idle_artifacts = idle.delete(client)
        runs, artifacts = ended.delete(client)
        zombies, their_artifacts = abandoned.delete(client)
        return report.model_copy(
            update={
                "idle_runs": idle_runs,
                "runs": runs + zombies,
                "artifacts": idle_artifacts + artifacts + their_artifacts,
            }
        )


if __name__ == "__main__":
    purge()
