"""The deployments: served and on a work pool, against a real Prefect server."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

from container_manager.conf import Settings
from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import QueueManager
from deployments.definitions import SCHEDULE_SLUG, TAGS, definitions
from tests.conftest import ROOT, database_url, wait_until

QUEUE, JOBS = "process-queue/scheduled", "process-jobs/on-demand"
DEFINITIONS = definitions(Settings())

#: What the database has no part in.
on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

Serve = Callable[..., AbstractContextManager[Path]]


@pytest.fixture(autouse=True)
def without_deployments(prefect_api: str) -> Iterator[None]:
    yield
    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)


@pytest.fixture
def environment(prefect_api: str, tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "PREFECT_API_URL": prefect_api,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "DATABASE_URL": f"sqlite:///{tmp_path / 'unused.sqlite3'}",
        "DJANGO_SETTINGS_MODULE": "container_manager.settings",
        "CONTAINER_MANAGER": '{"POLL_INTERVAL_SECONDS": 3, "WORK_SECONDS": 2}',
    }


@pytest.fixture
def serve(database: str, environment: dict[str, str], tmp_path: Path) -> Serve:
    """`python -m deployments`, for as long as the context lasts; its value is the log."""

    @contextmanager
    def serving(*arguments: str) -> Iterator[Path]:
        log = tmp_path / "served.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "deployments", *arguments],
                cwd=ROOT, env=environment | {"DATABASE_URL": database_url()}, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            yield log
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)

    return serving


def run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def read(name: str) -> DeploymentResponse | None:
    with get_client(sync_client=True) as client:
        try:
            return client.read_deployment_by_name(name)
        except ObjectNotFound:
            return None


def runs_of(deployment_id: UUID) -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]))
        return client.read_flow_runs(flow_run_filter=chosen)


def has_ended(job: ContainerJob) -> bool:
    job.refresh_from_db()
    return job.status == Status.COMPLETED


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.full_name)
def test_prefect_yaml_says_what_is_served(definition: object) -> None:
    written = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]

    found = next(entry for entry in written if entry["entrypoint"] == definition.entrypoint)

    assert len(written) == len(DEFINITIONS)
    assert (found["name"], found["description"]) == (definition.name, definition.description)
    assert (found["parameters"], found["tags"]) == (definition.parameters, list(TAGS))
    assert found["work_pool"] == {"name": "container-manager", "work_queue_name": definition.runner}
    schedule = {"anchor_date": definition.anchor.isoformat(), "timezone": "UTC", "slug": SCHEDULE_SLUG}
    interval = definition.interval_seconds
    assert found["schedules"] == ([{"interval": interval} | schedule] if interval else [])


def test_prefect_deploy_takes_the_file_again_and_again(environment: dict[str, str]) -> None:
    run("prefect", "work-pool", "create", "container-manager", "--type", "process", environment=environment)

    results = [run("prefect", "--no-prompt", "deploy", "--all", environment=environment) for _ in range(2)]

    assert [result.returncode for result in results] == [0, 0], results[0].stdout + results[0].stderr
    assert (read(QUEUE).work_pool_name, read(JOBS).work_pool_name) == ("container-manager", "container-manager")
    assert [schedule.slug for schedule in read(QUEUE).schedules] == [SCHEDULE_SLUG]


@on_sqlite
def test_a_worker_of_the_pool_runs_what_was_deployed(
    docker_host: DockerHost, manager: QueueManager, environment: dict[str, str]
) -> None:
    environment |= {"DATABASE_URL": database_url()}
    run("prefect", "work-pool", "create", "container-manager", "--type", "process", environment=environment)
    run("prefect", "--no-prompt", "deploy", "--all", environment=environment)
    job = manager.queue_job(ContainerJob.objects.create_job(image="busybox", command=["true"]))

    run("prefect", "deployment", "run", QUEUE, environment=environment)
    worker = run("prefect", "worker", "start", "--pool", "container-manager", "--run-once", environment=environment)

    assert has_ended(job), worker.stdout + worker.stderr


def test_a_queued_job_runs_by_the_schedule_alone(docker_host: DockerHost, manager: QueueManager, serve: Serve) -> None:
    job = ContainerJob.objects.create_job(image="busybox", command=["true"])

    with serve() as log:
        manager.queue_job(job)
        wait_until(lambda: has_ended(job), 60)
        deployment = read(QUEUE)
        wait_until(lambda: any(run.auto_scheduled and run.state.is_completed() for run in runs_of(deployment.id)))

    assert "serving process-queue/scheduled, every 3 s" in log.read_text()
    assert [(schedule.slug, schedule.active) for schedule in deployment.schedules] == [(SCHEDULE_SLUG, True)]


@on_sqlite
def test_prefect_deployment_run_launches_queued_jobs(
    docker_host: DockerHost, manager: QueueManager, serve: Serve, environment: dict[str, str]
) -> None:
    job = manager.queue_job(ContainerJob.objects.create_job(image="busybox", command=["true"]))

    with serve():
        deployment = wait_until(lambda: read(QUEUE))
        run("prefect", "deployment", "schedule", "pause", "--all", environment=environment)
        result = run("prefect", "deployment", "run", QUEUE, environment=environment)
        wait_until(lambda: has_ended(job), 60)

    assert result.returncode == 0
    assert any(not run.auto_scheduled for run in runs_of(deployment.id))


@on_sqlite
def test_serving_creates_missing_limits_and_leaves_one_that_was_set_by_hand(
    docker_host: DockerHost, serve: Serve, environment: dict[str, str]
) -> None:
    run("prefect", "concurrency-limit", "create", "container-job", "7", environment=environment)

    with serve():
        wait_until(lambda: read(JOBS))

    with get_client(sync_client=True) as client:
        limits = {limit.name: limit.limit for limit in client.read_global_concurrency_limits(limit=200)}
    assert limits == {"tag:container-job": 7, "tag:container-launch": 2}


@on_sqlite
def test_limits_reset_sets_them_to_the_slots_of_all_hosts(docker_host: DockerHost, environment: dict[str, str]) -> None:
    environment |= {"DATABASE_URL": database_url()}
    run("prefect", "concurrency-limit", "create", "container-job", "7", environment=environment)

    result = run("deployments", "limits", "--reset", environment=environment)

    assert result.stdout.splitlines() == ["limit of tag container-launch: 2", "limit of tag container-job: 10"]


@on_sqlite
def test_a_schedule_that_was_paused_in_the_ui_stays_paused(database: str, serve: Serve) -> None:
    with serve():
        deployment = wait_until(lambda: read(QUEUE))
    with get_client(sync_client=True) as client:
        client.update_deployment_schedule(deployment.id, deployment.schedules[0].id, active=False)

    with serve():
        wait_until(lambda: read(QUEUE).updated > deployment.updated)

    assert [schedule.active for schedule in read(QUEUE).schedules] == [False]


@on_sqlite
def test_runs_that_were_missed_while_nothing_served_are_deleted(docker_host: DockerHost, serve: Serve) -> None:
    with serve():
        deployment = wait_until(lambda: read(QUEUE))
        wait_until(lambda: runs_of(deployment.id))
    # More than an interval after it was due.
    missed = wait_until(lambda: [run for run in runs_of(deployment.id) if is_missed(run)], 60)

    with serve() as log:
        wait_until(lambda: not {run.id for run in missed} & {run.id for run in runs_of(deployment.id)})

    assert "scheduled runs that were missed" in log.read_text()


def is_missed(run: FlowRun) -> bool:
    return run.state.is_scheduled() and run.estimated_start_time_delta.total_seconds() > 4


@on_sqlite
def test_deployments_of_a_work_pool_are_served_only_when_taken_over(
    database: str, serve: Serve, environment: dict[str, str]
) -> None:
    run("prefect", "work-pool", "create", "container-manager", "--type", "process", environment=environment)
    run("prefect", "--no-prompt", "deploy", "--all", environment=environment)

    refused = run("deployments", environment=environment | {"DATABASE_URL": database_url()})
    with serve("--take-over"):
        wait_until(lambda: (found := read(QUEUE)) and not found.work_pool_name)

    assert refused.returncode == 1
    assert "is deployed on the work pool 'container-manager': start a worker with" in refused.stderr


def test_without_a_prefect_api_it_says_what_to_start(environment: dict[str, str]) -> None:
    environment.pop("PREFECT_API_URL")

    result = run("deployments", environment=environment)

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("no Prefect API is configured: run `prefect server start`")
