"""Deletes our old flow runs and all that belongs to them, so that Prefect's database does not grow.

Our runs are those of our deployments, and those that the command has run in its own process, which have a tag. A flow
run inside a user's flow is the user's.
"""

from . import _django  # noqa: F401, I001 (sets Django up before anything else is imported)

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterEndTime,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from prefect.exceptions import ObjectNotFound

from container_manager import shutdown
from container_manager.conf import Settings

from .api import PAGE, is_of_one
from .identity import FLOW_NAMES, inline_tag, our_deployment_ids
from .late_runs import bulk_delete, ids_of_runs
from .process_jobs import process_jobs
from .process_queue import IDLE, process_queue

#: Flows whose runs are all short.
_SHORT_FLOWS = (process_queue.name, process_jobs.name, "purge")


class OldRuns:
    """Our runs of some flows that a filter finds."""

    def __init__(self, flow_names: Sequence[str], chosen: FlowRunFilter) -> None:
        self._flows = FlowFilter(name=FlowFilterName(any_=list(flow_names)))
        self._chosen = chosen

    def count(self, client: SyncPrefectClient) -> int:
        return sum([self._count(client, chosen) for chosen in self._ours(client)])

    def delete(self, client: SyncPrefectClient) -> tuple[int, int]:
        """How many runs, and how many artifacts. Ends early when a stop is asked for: the next one goes on."""
        runs = artifacts = 0
        for chosen in self._ours(client):
            for run_ids in self._pages(client, chosen):
                # Delete these first: without their run they can't be found.
                artifacts += _delete_artifacts(client, run_ids)
                runs += bulk_delete(client, {"id": {"any_": [str(run_id) for run_id in run_ids]}})
        return runs, artifacts

    def _ours(self, client: SyncPrefectClient) -> Iterator[FlowRunFilter]:
        """The filter for the runs of our deployments, and for those without one."""
        if ids := our_deployment_ids(client):
            yield self._chosen.model_copy(update={"deployment_id": FlowRunFilterDeploymentId(any_=ids)})
        yield self._chosen.model_copy(
            update={
                "deployment_id": FlowRunFilterDeploymentId(is_null_=True),
                "tags": FlowRunFilterTags(all_=[inline_tag()]),
            }
        )

    def _count(self, client: SyncPrefectClient, chosen: FlowRunFilter) -> int:
        body = {"flows": self._flows.model_dump(mode="json"), "flow_runs": chosen.model_dump(mode="json")}
        return int(client.request("POST", "/flow_runs/count", json=body).json())

    def _pages(self, client: SyncPrefectClient, chosen: FlowRunFilter) -> Iterator[list[UUID]]:
        """Each is of the first runs: those of the page before must be gone by then."""
        known: set[UUID] = set()
        while not shutdown.is_stopping():
            run_ids = self._page(client, chosen)
            if not set(run_ids) - known:
                return
            known = set(run_ids)
            yield run_ids

    def _page(self, client: SyncPrefectClient, chosen: FlowRunFilter) -> list[UUID]:
        try:
            page = client.read_flow_runs(flow_filter=self._flows, flow_run_filter=chosen, limit=PAGE)
        except httpx.HTTPStatusError as e:
            if not is_of_one(e):
                raise
            # The server can't show one of them. Delete that one as well.
            return ids_of_runs(client, chosen.model_dump(mode="json"), self._flows.model_dump(mode="json"))
        return [run.id for run in page]


def idle(settings: Settings) -> OldRuns:
    """Passes that had nothing to do."""
    return OldRuns(
        (process_queue.name,),
        FlowRunFilter(
            state=FlowRunFilterState(name=FlowRunFilterStateName(any_=[IDLE])),
            end_time=FlowRunFilterEndTime(before_=_days_ago(settings.KEEP_IDLE_RUNS_DAYS)),
        ),
    )


def ended(settings: Settings) -> OldRuns:
    return OldRuns(
        FLOW_NAMES,
        FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(TERMINAL_STATES))),
            end_time=FlowRunFilterEndTime(before_=_days_ago(settings.KEEP_RUNS_DAYS)),
        ),
    )


def abandoned(settings: Settings) -> OldRuns:
    """What still counts as running, since nobody was left to say how it ended."""
    unended = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    return OldRuns(
        _SHORT_FLOWS,
        FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=unended)),
            start_time=FlowRunFilterStartTime(before_=_days_ago(max(1, settings.KEEP_RUNS_DAYS))),
        ),
    )


def _days_ago(days: int) -> Any:
    return datetime.now(UTC) - timedelta(days=days)


def _delete_artifacts(client: SyncPrefectClient, run_ids: list[UUID]) -> int:
    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=run_ids))
    deleted = 0
    while found := client.read_artifacts(artifact_filter=chosen, limit=PAGE):
        for artifact in found:
            try:
                client.delete_artifact(artifact.id)
            except ObjectNotFound:
                # Another purge was the faster.
                continue
            deleted += 1
    return deleted
