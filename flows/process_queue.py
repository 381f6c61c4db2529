"""One pass over the queue: harvest what has ended, then launch what is ready."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import logging
from contextvars import ContextVar
from typing import Annotated

import httpx
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.states import Failed
from pydantic import Field

from container_manager import shutdown
from container_manager.conf import get_settings
from container_manager.queue import queue_manager
from container_manager.types import BatchResult, LoopStats

from . import identity, limits
from .api import noted, without_patience
from .cancelled_runs import CancelledRuns
from .late_runs import delete_missed_runs
from .naming import pass_name
from .reports import completed, emit_changes, show_queue, summary_of
from .termination import graceful_termination

logger = logging.getLogger("container_manager.flows")

#: seconds; far above any pass, which waits for its pulls at most. A pass that is cut off there is recovered.
BACKSTOP_SECONDS = 1800

#: The name of the state of a pass that had nothing to do.
IDLE = "Idle"

MaxConcurrent = Annotated[int, Field(ge=1, description="Most containers alive at once; tags may set it lower.")]
Timeout = Annotated[float, Field(gt=0, description="Seconds that locks and a busy database are waited for.")]
WorkSeconds = Annotated[float, Field(ge=0, description="How long to stay and keep the slots full; 0: one round.")]


#: Where the task leaves what it did, too: on its way back its slot may be lost, and its result with it.
_done: ContextVar["list[BatchResult] | None"] = ContextVar("container_manager_batches", default=None)


@task(cache_policy=NO_CACHE)
def launch_next_batch(max_concurrent: int = 5, timeout: float = 30) -> BatchResult:
    """Claim and launch until slots or ready jobs run out, for five seconds at most."""
    batch = queue_manager.launch_next_batch(max_concurrent, timeout)
    if (done := _done.get()) is not None:
        done.append(batch)
    return batch


@flow(name="process-queue", flow_run_name=pass_name, timeout_seconds=BACKSTOP_SECONDS, persist_result=False)
def process_queue(
    max_concurrent: MaxConcurrent = 5, timeout: Timeout = 30, work_seconds: WorkSeconds = 0
) -> "State[LoopStats]":
    """Harvest, enforce deadlines, recover, launch; with `work_seconds`, keep the slots full for that long.

    Any number of these may overlap. Cancelling one never touches a container.
    """
    if problem := identity.why_not_ours():
        return Failed(message=problem)
    with graceful_termination(), without_patience():
        delete_missed_runs(get_settings().POLL_INTERVAL_SECONDS)
        limits.follow_hosts()
        stats = queue_manager.process_queue_continuous(
            max_concurrent,
            poll_interval=1,
            timeout=timeout,
            work_seconds=work_seconds,
            launch=launch_within_limits,
            cancelled_runs=CancelledRuns(),
        )
        for anomaly in stats.anomalies:
            logger.warning(anomaly)
        if not stats.is_idle:
            emit_changes(stats)
            if not shutdown.is_stopping():
                # It takes seconds if the server has gone, and a stop is waited for.
                show_queue(queue_manager.get_worker_metrics(), stats)
    return completed(summary_of(stats), stats, name=IDLE if stats.is_idle else "Completed")


def launch_within_limits(max_concurrent: int, timeout: float) -> BatchResult:
    """The launch task, unless it would have to wait for a slot of its tag: that wait has no bound.

    With the Prefect server away there is neither slot nor record, and jobs are launched all the same.
    """
    slots = limits.refresh()
    if slots is not None and slots.is_full:
        return BatchResult(limit=str(slots), throttled=True)
    capacity = queue_manager.capacity(max_concurrent)
    if capacity.is_full:
        # No task run for what is known to come to nothing.
        return BatchResult(limit=capacity.limit)
    if slots is None:
        return queue_manager.launch_next_batch(max_concurrent, timeout)
    return _launch_as_task(max_concurrent, timeout)


def _launch_as_task(max_concurrent: int, timeout: float) -> BatchResult:
    done: list[BatchResult] = []
    token = _done.set(done)
    try:
        # The tag begins with the installation's name.
        return launch_next_batch.with_options(tags=[limits.launch_tag()])(max_concurrent, timeout)
    except (httpx.HTTPError, ConcurrencySlotAcquisitionError) as e:
        logger.log(noted(e), "tag %s: no slot could be taken or given back: %s", limits.launch_tag(), e)
        # Tried again in the next round, as something that the limit or an API that is away has kept from being done.
        return done[0] if done else BatchResult(limit=f"tag {limits.launch_tag()}: {e}", throttled=True)
    finally:
        _done.reset(token)


if __name__ == "__main__":
    process_queue()
