"""Who can write to the Prefect API has nothing run here but our flows: what a run loads is known to who serves it."""

import gc
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.serializers import PickleSerializer

from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import QueueManager
from deployments.executing import execute
from tests.conftest import wait_until

from .conftest import Serve
from .prefect_side import DAILY, JOBS, NEW_JOB, QUEUE, patch, registered, run_now, there

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


def state_of(client: SyncPrefectClient, flow_run_id: UUID) -> Any:
    return client.read_flow_run(flow_run_id).state


@pytest.mark.timeout(400)
def test_whatever_is_written_to_a_deployment_its_runs_are_those_of_our_flow(
    docker_host: DockerHost, manager: QueueManager, api: SyncPrefectClient, serve: Serve, tmp_path: Path
) -> None:
    loot = tmp_path / "loot"
    attack = tmp_path / "attack.py"
    attack.write_text(f"from pathlib import Path\nPath({str(loot)!r}).touch()\ndef attack(): ...\n")
    shell = [{"prefect.deployments.steps.run_shell_script": {"script": f"touch {loot}"}}]
    variables = {"command": f"touch {loot}", "env": {"PYTHONSTARTUP": str(attack)}, "working_dir": str(tmp_path)}
    attacks: dict[str, dict[str, Any]] = {
        QUEUE: {"entrypoint": f"{attack}:attack"},
        JOBS: {"pull_steps": shell, "path": str(tmp_path), "entrypoint": "attack:attack"},
        DAILY: {"pull_steps": shell, "job_variables": variables, "path": str(tmp_path)},
    }
    spec = {"image": "busybox", "command": ["true"]}
    with serve(CONTAINER_MANAGER='{"POLL_INTERVAL_SECONDS": 3600}') as served:
        wait_until(lambda: f"serving {DAILY}" in served.log.read_text(), 120)
        for name, changes in attacks.items():
            patch(api, name, **changes)
        job = manager.queue_job(ContainerJob.objects.create_job(image="busybox", command=["true"]))
        runs = [run_now(api, name) for name in (QUEUE, DAILY)]
        runs.append(run_now(api, JOBS, job_variables=variables))
        runs.append(run_now(api, NEW_JOB, parameters={"spec": spec}, job_variables=variables))
        wait_until(lambda: all(state_of(api, run).is_final() for run in runs), 240)

    job.refresh_from_db()
    assert {state_of(api, run).type.value for run in runs} == {"COMPLETED"}, served.log.read_text()
    assert not loot.exists()
    assert job.status in (Status.RUNNING, Status.COMPLETED)


class Attack:
    """What unpickles it makes a file."""

    def __init__(self, loot: Path) -> None:
        self._loot = loot

    def __reduce__(self) -> Any:
        return Path.touch, (self._loot,)


# Prefect's engine leaves the client open by which it reads the run: its process ends then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", [QUEUE, JOBS, DAILY])
def test_a_result_that_is_planted_in_a_run_or_at_the_server_is_never_read(
    api: SyncPrefectClient, database: str, tmp_path: Path, name: str
) -> None:
    loot, store = tmp_path / "loot", tmp_path / "store"
    store.mkdir()
    block_id = LocalFileSystem(basepath=str(store)).save(f"planted-{name.partition('/')[0]}", overwrite=True)
    metadata = ResultRecordMetadata(
        serializer=PickleSerializer(), storage_key="planted", storage_block_id=block_id, expiration=None
    )
    (store / "planted").write_bytes(ResultRecord(result=Attack(loot), metadata=metadata).serialize())
    registered(api)
    run = run_now(api, name)
    body = {"state": {"type": "COMPLETED", "data": metadata.model_dump(mode="json")}, "force": True}
    api.request("PUT", "/admin/storage", json={"default_result_storage_block_id": str(block_id)})
    try:
        api.request("POST", "/flow_runs/{id}/set_state", path_params={"id": run}, json=body)
        flow_name = name.partition("/")[0].replace("-", "_")
        before = sorted(store.iterdir())
        for flow_run_id in (run, run_now(api, name)):
            with suppress(SystemExit):
                execute(flow_run_id, f"flows.{flow_name}:{flow_name}")
    finally:
        api.request("DELETE", "/admin/storage")

    gc.collect()
    assert not loot.exists()
    assert sorted(store.iterdir()) == before
    assert state_of(api, flow_run_id).is_completed()


def test_a_run_of_a_deployment_that_is_not_ours_is_left_alone_with_a_line(
    api: SyncPrefectClient, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    from deployments.running import FlowRunner

    foreign = api.create_deployment(api.create_flow_from_name("process-queue"), "theirs", entrypoint="x.py:x")
    run = api.create_flow_run_from_deployment(foreign)
    runner = FlowRunner(1, {}, lambda run: None)
    for _ in range(2):
        runner.offer([api.read_flow_run(run.id)])
        runner.go_on(api)

    told = [record.message for record in caplog.records]
    assert told == [f"flow run {run.id} is of a deployment that is not served here, and is left alone"]
    assert state_of(api, run.id).is_scheduled()
    assert there("process-queue/theirs").entrypoint == "x.py:x"
