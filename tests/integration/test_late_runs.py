"""Scheduled runs that were missed are deleted; one that is begun at that very moment is not."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Pending, Scheduled

from flows.late_runs import AUTO_SCHEDULED, delete_late_runs
from tests.conftest import PrefectServer

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


class BeginsOneMeanwhile:
    """The client of a process that looks; right after each look, another process takes the first run that it saw."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client
        self.begun: list[UUID] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def read_flow_runs(self, **question: Any) -> list[FlowRun]:
        page = self._client.read_flow_runs(**question)
        if page and not self.begun:
            self.begun.append(page[0].id)
            self._client.set_flow_run_state(page[0].id, Pending())
        return page


def test_a_run_that_is_begun_between_the_look_and_the_deletion_stays(database: str, prefect_api: PrefectServer) -> None:
    with get_client(sync_client=True) as client:
        deployment_id = client.create_deployment(client.create_flow_from_name("process-queue"), "late")
        due = datetime.now(UTC) - timedelta(minutes=5)
        runs = [
            client.create_flow_run_from_deployment(
                deployment_id, state=Scheduled(scheduled_time=due), tags=[AUTO_SCHEDULED]
            ).id
            for _ in range(3)
        ]
        between: Any = BeginsOneMeanwhile(client)

        deleted = delete_late_runs(between, deployment_id, datetime.now(UTC))

        left = [run.id for run in client.read_flow_runs() if run.id in runs]
        client.delete_deployment(deployment_id)
    assert (deleted, left) == (2, between.begun)
