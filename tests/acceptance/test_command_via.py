"""Where the command's flow runs run, and what it says when they can't; each test a sentence of its contract."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.db import connection
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

from container_manager.models import ContainerJob, Installation, Status
from tests.conftest import ROOT, PrefectServer, wait_until

from .conftest import Running, Site, answering, environment, objects, unanswered
from .deployed import deployed, runs_of, using

ONCE = ("--queue-mode", "--once")
NOBODY = "http://127.0.0.1:1/api"
BY_DEPLOYMENT = (*ONCE, "--via=deployment")

#: Flows that stand for ours: one that works, one that fails, one that waits for a file.
STUBS = """
import json
import time
from pathlib import Path
from prefect import flow, serve
from prefect.states import Completed

@flow
def well(max_concurrent: int, timeout: int, work_seconds: float):
    report = {"jobs_launched": max_concurrent, "job_ids": [timeout], "limit": f"stayed {work_seconds:g} s"}
    return Completed(message=f"launched\\n{json.dumps(report)}")

@flow
def broken(max_concurrent: int, timeout: int, work_seconds: float):
    raise RuntimeError("the roof is on fire")

@flow
def slow(max_concurrent: int, timeout: int, work_seconds: float):
    while not Path("go").exists():
        time.sleep(0.1)
    return Completed(message="{}")

if __name__ == "__main__":
    serve(*(f.to_deployment(name="stub") for f in (well, broken, slow)))
"""


@pytest.fixture(scope="module")
def stubs(prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which they run."""
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "stubs.py").write_text(STUBS)
    env = environment(
        **prefect_server.client,
        PREFECT_HOME=str(folder / "home"),
        PREFECT_RUNNER_POLL_FREQUENCY="1",
        PREFECT_FLOWS='{"heartbeat_frequency": null}',
    )
    site = Site(env, folder)
    server = site.start(program=[sys.executable, "stubs.py"])
    server.wait_for("being served")
    yield folder
    (folder / "go").touch()
    server.send(signal.SIGTERM)
    server.end()


def test_a_served_deployment_runs_the_queue(site_with_api: Site) -> None:
    server = site_with_api.start(program=[sys.executable, "-m", "deployments"], PYTHONPATH=str(ROOT))
    server.wait_for("serving process-jobs/on-demand")
    job = site_with_api.queue("true")
    done = wait_until(lambda: (run := site_with_api.run(*BY_DEPLOYMENT)).returncode == 0 and run, 60)

    lines = done.stdout.splitlines()
    assert lines[1] == "Runs: deployment process-queue/scheduled"
    assert lines[3] == f"Prefect: {site_with_api.env['PREFECT_API_URL'].removesuffix('/api')}"
    job.refresh_from_db()
    # Its schedule may have been quicker.
    assert job.status in (Status.RUNNING, Status.COMPLETED)
    legacy = site_with_api.run(f"--job-id={job.pk}", "--via=auto", "--verbose")
    assert "Processed: 1 jobs, Errors: 0" in legacy.stdout
    assert "Runs: deployment process-jobs/on-demand" in legacy.stderr
    server.send(signal.SIGINT)


def test_the_flow_run_gets_the_flags_and_its_report_comes_back(site_with_api: Site, stubs: Path) -> None:
    done = site_with_api.run(
        *BY_DEPLOYMENT, "--json", "--max-concurrent=3", "--timeout=17", **using("well/stub", PICKUP_SECONDS=60)
    )

    (run,) = objects(done.stdout)
    assert (run["via"], run["launched"], run["job_ids"], run["limit"]) == ("deployment", 3, [17], "stayed 0 s")


def test_a_flow_run_that_fails_makes_exit_code_1_and_its_reason_is_told(site_with_api: Site, stubs: Path) -> None:
    done = site_with_api.run(*BY_DEPLOYMENT, **using("broken/stub", PICKUP_SECONDS=60))

    assert done.returncode == 1
    assert done.stderr.startswith("CommandError: Command failed: flow run ")
    assert "ended as Failed: Flow run encountered an exception: RuntimeError: the roof is on fire" in done.stderr
    assert done.stderr.count("\n") == 1


def started(site: Site, client: SyncPrefectClient, *flags: str) -> tuple[Running, FlowRun]:
    """A command whose flow run a worker is at."""
    command = site.start(*BY_DEPLOYMENT, *flags, **using("slow/stub", PICKUP_SECONDS=30))

    def running() -> FlowRun | None:
        return next((run for run in runs_of(client, "slow/stub") if run.state and run.state.is_running()), None)

    return command, wait_until(running)


def test_a_run_that_a_worker_has_is_waited_for_and_named_if_it_outlasts_us(
    site_with_api: Site, stubs: Path, api: SyncPrefectClient
) -> None:
    impatient, run = started(site_with_api, api, "--shutdown-timeout=0")
    impatient.send(signal.SIGTERM)

    assert impatient.end() == 1
    assert impatient.errors == [f"Not finished within 0 s: flow run {run.name} ({run.id}) goes on in its worker"]
    assert api.read_flow_run(run.id).state_type == "RUNNING"
    (stubs / "go").touch()
    wait_until(lambda: api.read_flow_run(run.id).state_type == "COMPLETED")
    (stubs / "go").unlink()

    patient, run = started(site_with_api, api)
    patient.send(signal.SIGTERM)
    patient.wait_for("Received SIGTERM")
    (stubs / "go").touch()
    assert patient.end() == 0
    assert api.read_flow_run(run.id).state_type == "COMPLETED"


def test_with_the_prefect_server_down_the_queue_still_moves(site: Site) -> None:
    job = site.queue("true")
    done = site.run(*ONCE, PREFECT_API_URL=NOBODY)

    assert done.returncode == 0
    assert f"Runs: inline (the Prefect API at {NOBODY} can't be reached" in done.stdout
    job.refresh_from_db()
    assert job.status == Status.RUNNING


def test_inline_runs_are_recorded_at_the_api_that_is_set_and_answers(
    site_with_api: Site, api: SyncPrefectClient
) -> None:
    done = site_with_api.run(*ONCE, "--via=inline", "--json")

    (run,) = objects(done.stdout)
    recorded = api.read_flow_run(run["flow_run_id"])
    assert (recorded.deployment_id, recorded.state_name) == (None, "Idle")
    assert api.read_flow(recorded.flow_id).name == "process-queue"
    # That it is to stop it learns from a context.
    assert recorded.parameters == {"max_concurrent": 5, "timeout": 30, "work_seconds": 0}


def test_a_failing_flow_run_is_reported_once_per_change_of_state_and_never_ends_the_command(
    site_with_api: Site,
) -> None:
    command = site_with_api.start("--queue-mode", "--via=inline", "--poll-interval=1", "--json")
    wait_until(lambda: len(command.lines) >= 2)
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE TRIGGER trouble BEFORE UPDATE ON container_manager_installation "
            "BEGIN SELECT RAISE(ABORT, 'disk trouble'); END"
        )
        command.wait_for("Queue processing failed: flow run ")
        failures = len(command.lines)
        wait_until(lambda: len(command.lines) > failures)
        cursor.execute("DROP TRIGGER trouble")
    command.wait_for("Queue processing works again")
    command.send(signal.SIGTERM)

    assert command.end() == 0
    assert sum("Queue processing failed" in line for line in command.errors) == 1
    runs = {run["exit_code"]: run for run in objects("\n".join(command.lines))}
    assert runs.keys() == {0, 1}
    (error,) = runs[1]["errors"]
    assert runs[1] | {"flow_run_id": "", "errors": []} == {
        "mode": "queue", "via": "inline", "flow_run_id": "", "launched": 0, "job_ids": [], "errors": [], "limit": "",
        "exit_code": 1,
    }  # fmt: skip
    assert error["job_id"] is None
    assert error["error"].startswith(f"flow run {runs[1]['flow_run_id']} ended as Failed: ")


@pytest.mark.parametrize("arguments", [ONCE, BY_DEPLOYMENT, ("--job-id=1",), ("--job-id=1", "--via=deployment")])
def test_a_deployment_of_another_installation_is_refused_before_anything_is_triggered(
    site_with_api: Site, api: SyncPrefectClient, arguments: tuple[str, ...]
) -> None:
    site_with_api.queue("true")
    ours = Installation.load().instance_id
    flow_id = str(api.create_flow_from_name("process-queue"))
    labels = {"container-manager.instance": "feedc0de", "container-manager.name": "prod"}
    api.request("POST", "/deployments/", json={"name": "another's", "flow_id": flow_id, "labels": labels})

    result = site_with_api.run(*arguments, **using("process-queue/another's"))

    (line,) = [line for line in result.stderr.splitlines() if "belongs to installation" in line]
    assert (
        f"deployment process-queue/another's belongs to installation feedc0de (prod), and the database here to {ours}"
        in line
    )
    assert (result.returncode, runs_of(api, "process-queue/another's")) == (1, [])
    assert list(ContainerJob.objects.values_list("status", "attempt")) == [(Status.QUEUED, 0)]


def test_inline_needs_no_deployment_whosever_there_is(site_with_api: Site, api: SyncPrefectClient) -> None:
    site_with_api.queue("true")
    flow_id = str(api.create_flow_from_name("process-queue"))
    labels = {"container-manager.instance": "feedc0de"}
    api.request("POST", "/deployments/", json={"name": "another's", "flow_id": flow_id, "labels": labels})

    result = site_with_api.run(*ONCE, "--via=inline", **using("process-queue/another's"))

    assert (result.returncode, "Processed queue: launched 1 jobs" in result.stdout) == (0, True), result.stderr


def test_a_missing_deployment_is_named(site_with_api: Site) -> None:
    done = site_with_api.run(*BY_DEPLOYMENT, **using("process-queue/none"))

    assert (done.returncode, done.stderr) == (
        1,
        "CommandError: Command failed: the Prefect server has no deployment process-queue/none: "
        "serve it with `python -m deployments`\n",
    )


def test_refused_parameters_are_named(site_with_api: Site, api: SyncPrefectClient) -> None:
    schema = {"type": "object", "properties": {"timeout": {"type": "string"}}}
    name = deployed(api, "picky", parameter_openapi_schema=schema, enforce_parameter_schema=True)
    done = site_with_api.run(*BY_DEPLOYMENT, **using(name))

    assert done.returncode == 1
    assert f"deployment {name} refuses the parameters: " in done.stderr
    assert "Validation failed for field 'timeout'" in done.stderr


def test_an_api_that_hangs_refuses_or_is_not_configured_has_a_message_of_its_own(site: Site) -> None:
    with unanswered() as silent, answering(401) as closed, answering(500) as ill:
        messages = {
            silent: f"the Prefect API at {silent} does not answer within 3 s",
            closed: f"the Prefect API at {closed} refuses the authentication (HTTP 401): set PREFECT_API_AUTH_STRING "
            "or PREFECT_API_KEY",
            ill: f"the Prefect API at {ill} answers HTTP 500: Internal Server Error",
            NOBODY: f"the Prefect API at {NOBODY} can't be reached ([Errno 111] Connection refused): "
            "is `prefect server start` running?",
            "": "no Prefect API is configured: set PREFECT_API_URL, or run `prefect config set PREFECT_API_URL=…`",
        }
        commands = {
            message: site.start(*BY_DEPLOYMENT, **({"PREFECT_API_URL": url} if url else {}))
            for url, message in messages.items()
        }
        for message, command in commands.items():
            assert (command.end(), command.errors) == (1, [f"CommandError: Command failed: {message}"])
