"""A third project on the Prefect server, which has nothing to do with us but flows of the same names."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, LogCreate
from prefect.flows import Flow
from prefect.states import Completed, Running, Scheduled

from .runs import Runs

FLOWS = ("purge", "process-queue", "run-container-job", "reports")
DEPLOYMENT = "of-the-data-team"
TAG = "reports"


class Stranger:
    """Its runs are as old as runs can be that are purged, or were missed long ago; nobody may touch them."""

    def __init__(self, client: SyncPrefectClient, runs: Runs) -> None:
        self._client, self._runs = client, runs
        client.upsert_global_concurrency_limit_by_name(f"tag:{TAG}", 1)
        self.run_ids = {run_id for flow in FLOWS for run_id in self._make(flow)}
        runs.age(self.run_ids)
        runs.aged -= self.run_ids
        runs.look()
        self._states = {run_id: runs.known[run_id].state_type for run_id in self.run_ids}

    def _make(self, flow: str) -> Iterator[UUID]:
        """Runs of a flow: with a deployment and without, ended and abandoned, and one that was missed."""
        deployment: Any = "/deployments/"
        body = {
            "name": DEPLOYMENT,
            "flow_id": str(self._client.create_flow_from_name(flow)),
            "parameters": {"of": "the data team"},
            "labels": {"team": "data"},
            "schedules": [{"schedule": {"cron": "0 5 * * *", "timezone": "Europe/Berlin"}, "slug": "poll"}],
        }
        deployment_id = UUID(self._client.request("POST", deployment, json=body).json()["id"])
        for state in (Completed(name="Idle"), Completed(), Running()):
            yield self._ended(self._client.create_flow_run_from_deployment(deployment_id).id, state)
            yield self._ended(self._client.create_flow_run(Flow(_nothing, name=flow)).id, state)
        long_ago = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(days=3))
        missed = self._client.create_flow_run_from_deployment(deployment_id, state=long_ago, tags=["auto-scheduled"])
        yield missed.id

    def _ended(self, run_id: UUID, state: Any) -> UUID:
        self._client.set_flow_run_state(run_id, Running(), force=True)
        self._client.set_flow_run_state(run_id, state, force=True)
        self._client.create_artifact(ArtifactCreate(type="markdown", data="theirs", flow_run_id=run_id))
        log = LogCreate(name="theirs", level=20, message="x", timestamp=datetime.now(UTC), flow_run_id=run_id)
        self._client.create_logs([log])
        return run_id

    def touched(self) -> list[str]:
        """A sentence for each thing that is not as it was, after `Runs.look`."""
        gone = sorted(map(str, self.run_ids - self._runs.present))
        found = [f"{len(gone)} of the stranger's {len(self.run_ids)} runs are gone: {gone[0]}, …"] if gone else []
        for run_id in sorted(self.run_ids & self._runs.present):
            state = self._runs.known[run_id].state_type
            if state != self._states[run_id]:
                found.append(f"the stranger's run {run_id} became {state} from {self._states[run_id]}")
        expected = len(FLOWS) * 6
        for table in ("artifact", "log"):
            if (count := self._runs.count(table, self.run_ids)) != expected:
                found.append(f"{count} rows of the stranger's {expected} are left in {table}")
        return found


def _nothing() -> None:
    pass
