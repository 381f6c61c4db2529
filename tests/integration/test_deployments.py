"""The deployments on a real Prefect server: served and on a work pool, the same ones either way."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import DeploymentResponse
from prefect.states import Scheduled

from container_manager.conf import Settings
from container_manager.models import ContainerJob, DockerHost, Status
from container_manager.queue import QueueManager
from deployments.definitions import SCHEDULE_SLUG, Definition, definitions
from deployments.registering import register
from tests.conftest import ROOT, database_url, wait_until
from tests.integration.conftest import Run, Serve

from .prefect_side import read, runs_of

QUEUE, JOBS = "process-queue/scheduled", "process-jobs/on-demand"
DEFINITIONS = definitions(Settings())
POOL = ("container-manager", "--type", "process")

#: What the database has no part in.
on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
def pool(run: Run) -> None:
    run("prefect", "work-pool", "create", *POOL)


def pause(deployment: DeploymentResponse) -> None:
    """As the switch in the UI does."""
    with get_client(sync_client=True) as client:
        client.update_deployment_schedule(deployment.id, deployment.schedules[0].id, active=False)


def miss_runs(deployment_id: UUID, *, minutes: int) -> None:
    """What the scheduler leaves when nobody serves for so long, with an interval of twenty seconds."""
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        for seconds in range(0, minutes * 60, 20):
            client.create_flow_run_from_deployment(
                deployment_id, state=Scheduled(scheduled_time=now - timedelta(seconds=seconds)), tags=["auto-scheduled"]
            )


def seen() -> dict[str, Any]:
    """What people and the flow runs have of each deployment, and its id."""
    found = {definition.full_name: read(definition.full_name) for definition in DEFINITIONS}
    assert all(found.values())
    return {
        name: {
            "id": deployment.id,
            "parameters": deployment.parameters,
            "tags": deployment.tags,
            "description": deployment.description,
            "entrypoint": deployment.entrypoint,
            "schema": deployment.parameter_openapi_schema,
            "schedules": [(entry.slug, entry.schedule, entry.active) for entry in deployment.schedules],
        }
        for name, deployment in found.items()
    }


def has_ended(job: ContainerJob) -> bool:
    job.refresh_from_db()
    return job.status == Status.COMPLETED


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.full_name)
def test_prefect_yaml_says_what_is_served(definition: Definition) -> None:
    written = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]

    found = next(entry for entry in written if entry["entrypoint"] == definition.entrypoint)

    assert len(written) == len(DEFINITIONS)
    assert (found["name"], found["description"]) == (definition.name, definition.description)
    assert (found["parameters"], found["tags"]) == (definition.parameters, list(definition.tags))
    assert found["work_pool"] == {"name": "container-manager", "work_queue_name": definition.runner}
    schedule = {"anchor_date": definition.anchor.isoformat(), "timezone": "UTC", "slug": SCHEDULE_SLUG}
    interval = definition.interval_seconds
    assert found["schedules"] == ([{"interval": interval} | schedule] if interval else [])


@on_sqlite
def test_the_deployments_move_to_a_work_pool_and_back_and_stay_the_same_ones(
    database: str, pool: None, run: Run, serve: Serve
) -> None:
    with serve(CONTAINER_MANAGER="{}") as served:
        wait_until(lambda: read(DEFINITIONS[-1].full_name))
        pause(read(QUEUE))
        as_served = seen()
        deployed = run("prefect", "--no-prompt", "deploy", "--all")
        on_pool = seen()
        pools = {read(definition.full_name).work_queue_name for definition in DEFINITIONS}
        # The one that still served says so and ends.
        ended = served.process.wait(60)
    refused = run("deployments", DATABASE_URL=database_url())
    with serve("--take-over", CONTAINER_MANAGER="{}"):
        wait_until(lambda: not read(DEFINITIONS[-1].full_name).work_pool_name)
        taken_over = seen()

    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    assert as_served == on_pool == taken_over
    assert as_served[QUEUE]["schedules"][0][2] is False
    assert pools == {definition.runner for definition in DEFINITIONS}
    line = f"{QUEUE} is deployed on the work pool 'container-manager': start a worker with `prefect worker start --pool"
    assert (ended, served.log.read_text().splitlines()[-1].startswith(line)) == (1, True)
    assert (refused.returncode, len(refused.stderr.splitlines()), refused.stderr.startswith(line)) == (1, 1, True)


@on_sqlite
def test_a_worker_elsewhere_runs_what_was_deployed_and_of_what_was_missed_only_the_last(
    docker_host: DockerHost, manager: QueueManager, pool: None, run: Run, tmp_path: Path
) -> None:
    run("prefect", "--no-prompt", "deploy", "--all")
    deployment = read(QUEUE)
    pause(deployment)
    miss_runs(deployment.id, minutes=10)
    job = manager.queue_job(ContainerJob.objects.create_job(image="busybox", command=["true"]))

    worker = run(
        *("prefect", "worker", "start", "--pool", "container-manager", "--run-once", "--work-queue", "queue"),
        *("--limit", "1"),
        # On another machine the folder of whoever deployed is not there.
        folder=tmp_path,
        DATABASE_URL=database_url(),
    )

    assert (deployment.pull_steps or [], str(ROOT) in deployment.model_dump_json()) == ([], False)
    left = [flow_run.state.name for flow_run in runs_of(deployment.id)]
    assert has_ended(job), worker.stdout + worker.stderr
    # The worker takes the oldest; that one leaves those of the last interval alone.
    assert (left.count("Completed"), len(left) <= 3) == (1, True)


@on_sqlite
def test_on_a_pool_made_with_the_template_no_job_variable_counts(
    docker_host: DockerHost, run: Run, tmp_path: Path
) -> None:
    template = ("--base-job-template", "deployments/base-job-template.json")
    created = run("prefect", "work-pool", "create", *POOL, *template)
    synced = run("deployments", "sync", "--pool", "container-manager", DATABASE_URL=database_url())
    marker = tmp_path / "attacked"
    variables = {"command": f"touch {marker}", "env": {"DATABASE_URL": ""}, "working_dir": "/proc"}
    with get_client(sync_client=True) as client:
        path = {"id": read(JOBS).id}
        client.request("PATCH", "/deployments/{id}", path_params=path, json={"job_variables": variables})
        flow_run = client.create_flow_run_from_deployment(read(JOBS).id, job_variables=variables)

    worker = run(
        *("prefect", "worker", "start", "--pool", "container-manager", "--run-once", "--work-queue", "queue"),
        DATABASE_URL=database_url(),
    )

    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run.id).state
    assert (created.returncode, synced.returncode) == (0, 0), created.stderr + synced.stderr
    assert (state.name, marker.exists()) == ("Completed", False), worker.stdout + worker.stderr


def test_a_queued_job_runs_by_the_schedule_alone(docker_host: DockerHost, manager: QueueManager, serve: Serve) -> None:
    job = ContainerJob.objects.create_job(image="busybox", command=["true"])

    with serve() as served:
        manager.queue_job(job)
        wait_until(lambda: has_ended(job), 60)
        deployment = read(QUEUE)
        wait_until(lambda: any(run.auto_scheduled and run.state.is_completed() for run in runs_of(deployment.id)))

    assert f"serving {QUEUE}, every 3 s" in served.log.read_text()
    assert [(schedule.slug, schedule.active) for schedule in deployment.schedules] == [(SCHEDULE_SLUG, True)]


@on_sqlite
def test_prefect_deployment_run_launches_queued_jobs(
    docker_host: DockerHost, manager: QueueManager, serve: Serve, run: Run
) -> None:
    job = manager.queue_job(ContainerJob.objects.create_job(image="busybox", command=["true"]))

    with serve():
        deployment = wait_until(lambda: read(QUEUE))
        run("prefect", "deployment", "schedule", "pause", "--all")
        result = run("prefect", "deployment", "run", QUEUE)
        wait_until(lambda: has_ended(job), 60)

    assert result.returncode == 0
    assert any(not run.auto_scheduled for run in runs_of(deployment.id))


@on_sqlite
def test_after_ten_minutes_in_which_nothing_served_one_run_makes_up_for_all(
    docker_host: DockerHost, manager: QueueManager, serve: Serve
) -> None:
    with get_client(sync_client=True) as client:
        register(client, DEFINITIONS)
    deployment = read(QUEUE)
    pause(deployment)
    miss_runs(deployment.id, minutes=10)

    with serve() as served:
        wait_until(lambda: all(run.state and run.state.is_final() for run in runs_of(deployment.id)), 90)

    assert len(runs_of(deployment.id)) == 1
    assert "scheduled runs that were missed" in served.log.read_text()
    assert [schedule.active for schedule in read(QUEUE).schedules] == [False]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"PREFECT_API_URL": ""}, "no Prefect API is configured: run `prefect server start`, and set PREFECT_API_URL"),
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, "the Prefect API at http://127.0.0.1:9/api can't be reached"),
        ({}, "the database can't be used: run `python manage.py migrate` (no such table: container_manager_"),
    ],
)
def test_what_keeps_it_from_serving_is_told_in_a_line(run: Run, changes: dict[str, str], line: str) -> None:
    result = run("deployments", **changes)

    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    assert result.stderr.startswith(line)
