"""What people see of the flow runs in Prefect: names, logs, the queue's table, events; and what nobody sees there."""

import json
import time
from typing import Any

import pytest
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

from container_manager.models import ContainerJob, DockerHost
from container_manager.queue import queue_manager
from flows.process_jobs import process_jobs
from flows.process_queue import process_queue
from tests.conftest import PrefectServer, wait_until

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

SECRET = "correct-horse-battery-staple"
UNLAUNCHABLE = {"working_dir": "/etc/passwd", "max_retries": 0}


def resolve(reference: str) -> str:
    if reference == "vault:locked":
        raise ValueError(f"{SECRET} opens no vault")
    return SECRET


def queue(*command: str, **fields: Any) -> ContainerJob:
    return queue_manager.queue_job(ContainerJob.objects.create_job(image="busybox", command=list(command), **fields))


def ask(api: PrefectServer, path: str, **question: Any) -> list[dict[str, Any]]:
    found = api.ask(path, **question)
    return found["events"] if path.startswith("/events") else found


def logs_of(api: PrefectServer, state: State) -> list[str]:
    APILogWorker.drain_all(timeout=30)
    flow_run = {"flow_run_id": {"any_": [str(state.state_details.flow_run_id)]}}
    return [line["message"] for line in ask(api, "/logs/filter", logs=flow_run, sort="TIMESTAMP_ASC")]


def events_of(api: PrefectServer, job: ContainerJob) -> dict[str, dict[str, Any]]:
    """The payloads, by event."""
    EventsWorker.drain_all(timeout=30)
    chosen = {"resource": {"id": [f"container-job.{job.pk}"]}}
    return {event["event"]: event["payload"] for event in ask(api, "/events/filter", filter=chosen)}


def table_of(api: PrefectServer, state: State) -> tuple[dict[str, str], str]:
    """The cells of the queue's table that this run left, and what is said above them."""
    chosen = {"flow_run_id": {"any_": [str(state.state_details.flow_run_id)]}, "key": {"any_": ["container-queue"]}}
    (artifact,) = ask(api, "/artifacts/filter", artifacts=chosen)
    return {row["what"]: str(row["now"]) for row in json.loads(artifact["data"])}, artifact["description"]


def test_runs_are_named_for_people(docker_host: DockerHost, prefect_api: PrefectServer) -> None:
    states = [
        process_queue(return_state=True),
        process_jobs(return_state=True),
        process_jobs(job_id=17, return_state=True),
        process_jobs(status="failed", return_state=True),
    ]

    chosen = {"id": {"any_": [str(state.state_details.flow_run_id) for state in states]}}
    names = sorted(run["name"].partition(" 2")[0] for run in ask(prefect_api, "/flow_runs/filter", flow_runs=chosen))
    assert names == ["job 17,", "jobs alive,", "jobs that failed,", "pass"]


def test_the_apps_own_log_lines_are_in_the_run_with_job_and_host(
    docker_host: DockerHost, prefect_api: PrefectServer
) -> None:
    good, bad = queue("sleep", "0.3"), queue("true", **UNLAUNCHABLE)

    state = process_queue(work_seconds=30, return_state=True)

    lines = logs_of(prefect_api, state)
    assert f"job {good.pk} on host local: launched" in lines
    assert f"job {good.pk} on host local: completed (exit_code)" in lines
    assert [line for line in lines if line.startswith(f"job {bad.pk} on host local: ") and "not a directory" in line]


def test_the_table_of_the_queue_names_loads_limit_waits_and_errors(
    docker_host: DockerHost, prefect_api: PrefectServer, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"SITE_URL": "https://jobs.example"}
    bad = queue("true", **UNLAUNCHABLE, priority=100)
    running = queue("sleep", "600", priority=90)
    queue("sleep", "600")
    time.sleep(1.1)

    state = process_queue(max_concurrent=1, return_state=True)

    cells, description = table_of(prefect_api, state)
    assert (cells["ready now"], cells["running"], cells["failed to launch"]) == ("1", "1", "1")
    assert cells["alive on host local"] == "1 of 10"
    assert cells["what keeps more from starting"] == "limit reached: max_concurrent, 1 of 1"
    assert int(cells["waiting for the longest"].removesuffix(" s")) >= 1
    assert "not a directory" in cells[f"error of job {bad.pk}"]
    page = "https://jobs.example/admin/container_manager/containerjob"
    assert f"[job {bad.pk}]({page}/{bad.pk}/change/), [job {running.pk}]({page}/{running.pk}/change/)" in description


def test_each_change_of_a_job_is_an_event(docker_host: DockerHost, prefect_api: PrefectServer) -> None:
    good = queue("true")
    bad = queue("sh", "-c", "exit 3")

    process_queue(work_seconds=30)

    wait_until(lambda: len(events_of(prefect_api, good)) == len(events_of(prefect_api, bad)) == 2)
    assert events_of(prefect_api, good) == {
        "container-job.launched": {"job_id": good.pk, "url": ""},
        "container-job.completed": {
            "job_id": good.pk, "url": "", "attempt": 1, "status": "completed", "reason": "exit_code", "exit_code": 0,
            "error": "",
        },
    }  # fmt: skip
    assert events_of(prefect_api, bad)["container-job.failed"]["exit_code"] == 3


def test_no_answer_of_the_api_has_a_secret_in_it(
    docker_host: DockerHost, prefect_api: PrefectServer, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"SECRET_RESOLVER": f"{__name__}.resolve"}
    token = {"secret_environment": {"TOKEN": "vault:token"}}
    good = queue("sh", "-c", "echo $TOKEN; echo $TOKEN >&2", **token)
    # The Engine's error repeats the working folder; the resolver's own repeats the secret.
    bad = queue("true", **token | {"working_dir": f"/etc/passwd/{SECRET}", "max_retries": 0})
    locked = queue("true", secret_environment={"TOKEN": "vault:locked"}, max_retries=0)

    state = process_queue(work_seconds=30, return_state=True)
    process_jobs(job_id=good.pk)

    logs_of(prefect_api, state)
    wait_until(lambda: all(events_of(prefect_api, job) for job in (good, bad, locked)))
    paths = ("flows", "flow_runs", "task_runs", "logs", "artifacts", "events", "deployments")
    answers = {path: str(ask(prefect_api, f"/{path}/filter")) for path in paths}
    assert good.attempts.get().stdout == "***\n"
    assert [path for path, answer in answers.items() if SECRET in answer] == []
    assert str(bad.pk) in answers["events"]
