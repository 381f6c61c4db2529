"""One pass over the queue: harvest what has ended, then launch what is ready."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import logging
from typing import Annotated

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from pydantic import Field

from container_manager.queue import queue_manager
from container_manager.types import BatchResult, LoopStats

from . import limits
from .reports import completed, emit_changes, show_queue, summary_of
from .termination import graceful_termination

logger = logging.getLogger("container_manager.flows")

#: seconds; far above any pass, which waits for its pulls at most. A pass that is cut off there is recovered.
BACKSTOP_SECONDS = 1800

MaxConcurrent = Annotated[int, Field(ge=1, description="Most containers alive at once; tags may set it lower.")]
Timeout = Annotated[float, Field(gt=0, description="Seconds that locks and a busy database are waited for.")]
WorkSeconds = Annotated[float, Field(ge=0, description="How long to stay and keep the slots full; 0: one round.")]


@task(tags=[limits.LAUNCH_TAG], cache_policy=NO_CACHE)
def launch_next_batch(max_concurrent: int = 5, timeout: float = 30) -> BatchResult:
    """Claim and launch until slots or ready jobs run out, for five seconds at most."""
    return queue_manager.launch_next_batch(max_concurrent, timeout)


@flow(name="process-queue", timeout_seconds=BACKSTOP_SECONDS)
def process_queue(
    max_concurrent: MaxConcurrent = 5, timeout: Timeout = 30, work_seconds: WorkSeconds = 0
) -> "State[LoopStats]":
    """Harvest, enforce deadlines, recover, launch; with `work_seconds`, keep the slots full for that long.

    Any number of these may overlap. Cancelling one never touches a container.
    """
    with graceful_termination():
        stats = queue_manager.process_queue_continuous(
            max_concurrent, poll_interval=1, timeout=timeout, work_seconds=work_seconds, launch=_launch_within_limits
        )
    for anomaly in stats.anomalies:
        logger.warning(anomaly)
    if not stats.is_idle:
        emit_changes(stats)
        show_queue(queue_manager.get_worker_metrics(), stats.limit)
    return completed(summary_of(stats), stats, name="Idle" if stats.is_idle else "Completed")


def _launch_within_limits(max_concurrent: int, timeout: float) -> BatchResult:
    """The launch task, unless it would have to wait for a slot of its tag: that wait has no bound."""
    slots = limits.refresh()
    if slots.is_full:
        return BatchResult(limit=str(slots), throttled=True)
    capacity = queue_manager.capacity(max_concurrent)
    if capacity.is_full:
        # No task run for what is known to come to nothing.
        return BatchResult(limit=capacity.limit)
    return launch_next_batch(max_concurrent, timeout)


if __name__ == "__main__":
    process_queue()
