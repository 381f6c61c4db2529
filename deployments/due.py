"""Finds the flow runs of a deployment that are due, even if the API can't show one of them."""

import logging
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.responses import FlowRunResponse

from flows.api import detail_of, is_of_one
from flows.late_runs import delete_late_runs, ids_of_runs, is_of_our_schedule

from .definitions import Definition
from .running import start_time

logger = logging.getLogger("container_manager.deployments")

#: seconds; how far ahead runs are read, so that they begin on time between two looks.
_LOOK_AHEAD_SECONDS = 3.0
#: seconds; between two looks at a deployment whose runs must be read one by one.
_ONE_BY_ONE_SECONDS = 10.0


class DueRuns:
    """The due runs of one deployment.

    `until`: when another deployment took its place. Later runs of its schedules are left to that one.
    """

    def __init__(self, deployment_id: UUID, definition: Definition, *, until: datetime | None = None) -> None:
        self._id, self._definition, self._until = deployment_id, definition, until
        self._told = ""
        self._look_again_at = 0.0
        self._readable: list[FlowRunResponse] = []

    def find(self, client: SyncPrefectClient) -> list[FlowRunResponse]:
        """The runs that are due now or soon. Of our own schedule's missed runs only the last one is kept."""
        return [run for run in self._find(client) if not self._is_too_late(run)]

    def _is_too_late(self, run: FlowRunResponse) -> bool:
        """Prefect's scheduler can add runs just as a deployment is being paused."""
        return self._until is not None and run.auto_scheduled and start_time(run) > self._until

    def _find(self, client: SyncPrefectClient) -> list[FlowRunResponse]:
        if time.monotonic() < self._look_again_at:
            return self._readable
        try:
            runs = self._without_missed(client)
        except httpx.HTTPStatusError as e:
            if not is_of_one(e):
                raise
            self._look_again_at = time.monotonic() + _ONE_BY_ONE_SECONDS
            self._readable = self._one_by_one(client, e)
            return self._readable
        self._told = ""
        return runs

    def _without_missed(self, client: SyncPrefectClient) -> list[FlowRunResponse]:
        while True:
            until = datetime.now(UTC) + timedelta(seconds=_LOOK_AHEAD_SECONDS)
            runs = client.get_scheduled_flow_runs_for_deployments([self._id], scheduled_before=until)
            deleted = self._delete_missed(client, runs)
            if not deleted:
                return runs
            logger.warning("%s: deleted %d scheduled runs that were missed", self._definition.full_name, deleted)

    def _delete_missed(self, client: SyncPrefectClient, runs: list[FlowRunResponse]) -> int:
        if self._definition.interval_seconds is None:
            return 0
        now = datetime.now(UTC)
        due = [start_time(run) for run in runs if is_of_our_schedule(run) and start_time(run) <= now]
        return delete_late_runs(client, self._id, max(due)) if len(due) > 1 else 0

    def _one_by_one(self, client: SyncPrefectClient, error: httpx.HTTPStatusError) -> list[FlowRunResponse]:
        """Reads the runs one by one, because the API can't list them."""
        chosen = {
            "deployment_id": {"any_": [str(self._id)]},
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "next_scheduled_start_time": {"before_": datetime.now(UTC).isoformat()},
        }
        readable: list[FlowRunResponse] = []
        unreadable: list[str] = []
        for run_id in ids_of_runs(client, chosen):
            try:
                response = client.request("GET", "/flow_runs/{id}", path_params={"id": run_id})
            except httpx.HTTPStatusError as e:
                if not is_of_one(e):
                    raise
                unreadable.append(str(run_id))
            else:
                readable.append(FlowRunResponse.model_validate(response.json()))
        self._tell(error, unreadable)
        return readable

    def _tell(self, error: httpx.HTTPStatusError, unreadable: list[str]) -> None:
        named = ", ".join(unreadable[:5])
        what = f"it can't show flow run {named}: `prefect flow-run delete` removes it" if named else ""
        line = (
            f"{self._definition.full_name}: the Prefect API answers HTTP {error.response.status_code} for its "
            f"scheduled runs; {what or detail_of(error.response)}"
        )
        if line != self._told:
            logger.warning("%s", line)
        self._told = line
