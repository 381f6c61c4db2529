"""Which flow runs were cancelled: their jobs are, too, even if the processes that waited for them are no more."""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

import logging
import time
from collections.abc import Collection
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, TaskRunFilter, TaskRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from .api import PAGE, PROBE_SECONDS, FlowRunError, connected, noted, translated

logger = logging.getLogger("container_manager.flows")

#: seconds; between two questions, and before the next one to an API that was away.
_ASK_SECONDS, _AWAY_SECONDS = 2.0, 30.0


class CancelledRuns:
    """`container_manager.cancelling.CancelledRuns`, best effort, and not more often than is useful."""

    def __init__(self) -> None:
        self._ask_at = 0.0

    def __call__(self, run_ids: set[str]) -> set[str]:
        if time.monotonic() < self._ask_at:
            return set()
        try:
            cancelled = ask(run_ids)
        except FlowRunError as e:
            self._ask_at = time.monotonic() + _AWAY_SECONDS
            logger.log(noted(e), "whether the flow runs of jobs were cancelled is not known at the moment: %s", e)
            return set()
        self._ask_at = time.monotonic() + _ASK_SECONDS
        return cancelled


def ask(run_ids: Collection[str]) -> set[str]:
    """Those that are cancelled or about to be, or whose parents are. Raises `FlowRunError` if the API can't say.

    One call, and two for each level of parents.
    """
    with translated(), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), connected(PROBE_SECONDS) as client:
        return {str(run_id) for run_id in _cancelled(client, {UUID(run_id) for run_id in run_ids})}


def _cancelled(client: SyncPrefectClient, run_ids: set[UUID]) -> set[UUID]:
    runs = _read(client, list(run_ids))
    cancelled = {run.id for run in runs if run.state and (run.state.is_cancelled() or run.state.is_cancelling())}
    within = {run.id: run.parent_task_run_id for run in runs if run.parent_task_run_id and run.id not in cancelled}
    if within:
        parents = _parents(client, list(set(within.values())))
        cancelled_parents = _cancelled(client, set(parents.values()))
        cancelled |= {run_id for run_id, task_id in within.items() if parents.get(task_id) in cancelled_parents}
    return cancelled


def _read(client: SyncPrefectClient, run_ids: list[UUID]) -> list[FlowRun]:
    runs: list[FlowRun] = []
    for start in range(0, len(run_ids), PAGE):
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=run_ids[start : start + PAGE]))
        runs += client.read_flow_runs(flow_run_filter=chosen, limit=PAGE)
    return runs


def _parents(client: SyncPrefectClient, task_run_ids: list[UUID]) -> dict[UUID, UUID]:
    """Task run -> the flow run that it is of. A subflow is known to its parent as a task run."""
    parents: dict[UUID, UUID] = {}
    for start in range(0, len(task_run_ids), PAGE):
        chosen = TaskRunFilter(id=TaskRunFilterId(any_=task_run_ids[start : start + PAGE]))
        for task_run in client.read_task_runs(task_run_filter=chosen, limit=PAGE):
            if task_run.flow_run_id is not None:
                parents[task_run.id] = task_run.flow_run_id
    return parents
