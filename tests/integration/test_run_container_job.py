"""One job as one flow run, recorded by a real Prefect server, with a real Engine below it."""

import json
import logging
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import docker
import psycopg
import pytest
from django.db import connection, connections
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import Log, State
from prefect.events.worker import EventsWorker
from prefect.flow_engine import run_flow
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Completed, Crashed, Failed, Pending, Running
from prefect.types.entrypoint import EntrypointType

from container_manager.following import LogLine
from container_manager.models import ContainerJob, Status
from container_manager.queue import queue_manager
from container_manager.types import JobResult, RunSpec
from container_manager.waiting import JobFailed, JobRefused, JobWatch, queue_spec
from deployments.demo.three_steps import three_steps
from flows.api import child_environment
from flows.process_queue import process_queue
from flows.run_container_job import container_job, result_in, run_container_job
from tests.conftest import ROOT, PrefectServer, database_url, wait_until
from tests.integration.cable import Cable
from tests.integration.conftest import Run, Serve, most_alive

pytestmark = pytest.mark.usefixtures("prefect_api", "docker_host")

on_postgres = pytest.mark.parametrize("database", ["postgres"], indirect=True)


def prefect(*arguments: str) -> None:
    """As a person types it."""
    subprocess.run(
        [sys.executable, "-m", "prefect", *arguments], env=child_environment(), check=True, capture_output=True,
    )  # fmt: skip


def spec(script: str, **fields: Any) -> RunSpec:
    return RunSpec(image="busybox", command=["sh", "-c", script], **fields)


def logs_of(flow_run_id: UUID | str) -> list[Log]:
    with get_client(sync_client=True) as client:
        chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]))
        return client.read_logs(chosen, limit=200)


def output_of(flow_run_id: UUID | str) -> list[tuple[str, int]]:
    """What the container wrote, as the run's log has it."""
    return [(log.message, log.level) for log in logs_of(flow_run_id) if log.name.startswith("job-")]


@contextmanager
def running(call: Callable[[], Any]) -> Iterator[Future[Any]]:
    """`call` in a thread, as a flow run that goes on while the test looks."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as e:  # noqa: BLE001 (the test raises it)
            done.set_exception(e)
        finally:
            connections.close_all()

    thread = threading.Thread(target=copy_context().run, args=(run,))
    thread.start()
    try:
        yield done
    finally:
        for job in ContainerJob.objects.filter(finished_at__isnull=True):
            ContainerJob.objects.filter(pk=job.pk).update(cancel_requested_at=job.created_at)
        thread.join(60)
    assert not thread.is_alive()


def has_ended(job: ContainerJob) -> bool:
    job.refresh_from_db()
    return job.finished_at is not None


def running_job() -> ContainerJob:
    return wait_until(lambda: ContainerJob.objects.running().first(), 90)


def test_a_run_ends_as_its_job_does_and_tells_all_about_it(database: str, settings: Any) -> None:
    settings.CONTAINER_MANAGER = {"SITE_URL": "https://jobs.example"}

    state = run_container_job(
        spec("echo out; echo err >&2", name="hello", host="local", environment={"A": "b"}), return_state=True
    )

    job = ContainerJob.objects.get()
    result = state.result()
    assert (state.name, result_in(state)) == ("Completed", result)
    assert (job.flow_run_id, job.pinned_host.name, job.environment) == (
        str(state.state_details.flow_run_id), "local", {"A": "b"},
    )  # fmt: skip
    assert isinstance(result, JobResult)
    assert (result.job_id, result.name, result.status, result.exit_code, result.attempt, result.host) == (
        job.pk, "hello", "completed", 0, 1, "local",
    )  # fmt: skip
    assert (result.stdout_tail, result.stderr_tail) == ("out\n", "err\n")
    assert result.queued_at <= result.launched_at <= result.finished_at
    APILogWorker.drain_all(timeout=10)
    line = f"its job is job {job.pk}: https://jobs.example/admin/container_manager/containerjob/{job.pk}/change/"
    assert line in [log.message for log in logs_of(state.state_details.flow_run_id)]


@on_postgres
def test_what_the_container_writes_is_in_the_runs_log_while_it_runs(database: str) -> None:
    with running(lambda: run_container_job(spec("echo out; sleep 1; echo err >&2; sleep 60"))):
        job = running_job()
        wait_until(lambda: output_of(job.flow_run_id) == [("out", logging.INFO)], 30)
        wait_until(lambda: output_of(job.flow_run_id) == [("out", logging.INFO), ("err", logging.WARNING)], 30)
        job.refresh_from_db()

    assert job.status == Status.RUNNING


@on_postgres
def test_a_run_fails_with_the_exit_code_and_the_end_of_stderr(database: str) -> None:
    state = run_container_job(spec("echo why >&2; exit 3"), return_state=True)

    with pytest.raises(JobFailed, match=r"job \d+ failed on host local: exited with code 3") as caught:
        state.result()
    assert (state.type.value, state.name) == ("FAILED", "Failed")
    assert "the end of stderr:\nwhy\n" in state.message
    assert result_in(state) == caught.value.result
    assert (caught.value.result.exit_code, caught.value.result.stderr_tail) == (3, "why\n")


@on_postgres
def test_a_run_that_is_cancelled_stops_its_container(database: str) -> None:
    with running(lambda: run_container_job(spec("sleep 60", retry_exit_codes=[143]), return_state=True)) as done:
        job = running_job()
        prefect("flow-run", "cancel", job.flow_run_id)
        state = done.result(60)

    job.refresh_from_db()
    assert (job.status, job.exit_code) == (Status.CANCELLED, 143)
    assert state.is_cancelled()


def start_process(environment: dict[str, str], *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment | {"DATABASE_URL": database_url()})


def state_of(flow_run_id: UUID | str) -> State:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(UUID(str(flow_run_id))).state


@pytest.mark.parametrize(
    ("database", "number"),
    [("sqlite", signal.SIGTERM), ("postgres", signal.SIGKILL)],
    ids=["told", "killed"],
    indirect=["database"],
)
def test_a_cancelled_run_stops_its_container_whatever_becomes_of_its_process(
    database: str, engine: docker.DockerClient, environment: dict[str, str], number: signal.Signals
) -> None:
    program = "from flows.run_container_job import *; run_container_job({'image': 'busybox', 'command': 'sleep 300'})"
    process = start_process(environment, "-c", program)
    job = running_job()

    prefect("flow-run", "cancel", job.flow_run_id)
    process.send_signal(number)
    process.wait(60)
    # What was killed can do no more; the passes find the rest.
    wait_until(lambda: has_ended(job) or (process_queue() and None))

    assert (job.status, job.reason, job.exit_code) == (Status.CANCELLED, "cancelled", 143)
    assert state_of(job.flow_run_id).name == ("Cancelling" if number == signal.SIGKILL else "Cancelled")
    with pytest.raises(docker.errors.NotFound):
        engine.containers.get(job.container_id)


def recorded_run(state: State, parent: UUID | None = None) -> UUID:
    """A flow run whose process is no more."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(run_container_job, parameters={}, parent_task_run_id=parent, state=Running())
        client.set_flow_run_state(run.id, state, force=True)
        return run.id


def queue_for(flow_run_id: UUID) -> ContainerJob:
    job = ContainerJob.objects.build(image="busybox", command=["sleep", "60"])
    job.flow_run_id = str(flow_run_id)
    return queue_manager.queue_job(job)


@pytest.mark.parametrize("state", [Cancelling(), Cancelled()], ids=["cancelling", "cancelled"])
def test_a_pass_cancels_what_is_queued_for_a_cancelled_run(database: str, state: State) -> None:
    job, other = queue_for(recorded_run(state)), queue_for(recorded_run(Running()))

    process_queue()

    job.refresh_from_db()
    other.refresh_from_db()
    assert (job.status, other.status) == (Status.CANCELLED, Status.RUNNING)


@on_postgres
def test_a_pass_cancels_the_jobs_of_a_cancelled_runs_steps(database: str) -> None:
    parent = recorded_run(Cancelling())
    with get_client(sync_client=True) as client:
        step = client.create_task_run(container_job, parent, "0")
    job = queue_for(recorded_run(Running(), parent=step.id))

    process_queue()

    job.refresh_from_db()
    assert job.status == Status.CANCELLED


@on_postgres
@pytest.mark.parametrize("state", [Crashed(), Failed(), Completed()], ids=["crashed", "failed", "completed"])
def test_a_job_goes_on_without_the_run_that_waited_for_it(database: str, state: State) -> None:
    job = queue_for(recorded_run(state))

    process_queue()

    job.refresh_from_db()
    assert job.status == Status.RUNNING


@on_postgres
def test_a_cancelled_runs_job_that_is_run_anew_is_not_cancelled_again(database: str) -> None:
    job = queue_for(recorded_run(Cancelled()))
    process_queue()

    queue_manager.retry_job(job)
    process_queue()

    job.refresh_from_db()
    assert (job.status, job.flow_run_id) == (Status.RUNNING, None)


@pytest.mark.parametrize(("database", "count"), [("sqlite", 6), ("postgres", 20)], indirect=["database"])
def test_many_steps_of_a_flow_keep_to_the_tags_limit(database: str, count: int, events: list[dict]) -> None:
    prefect("concurrency-limit", "create", "container-job", "4")

    @flow
    def fan_out() -> list[JobResult]:
        return container_job.map([spec(f"echo {number}; sleep 0.3") for number in range(count)]).result()

    results = fan_out()

    assert [result.stdout_tail for result in results] == [f"{number}\n" for number in range(count)]
    assert {result.status for result in results} == {"completed"}
    assert most_alive(events) <= 4


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"host": "elsewhere"}, "host: elsewhere: no such host; there are: local"),
        ({"secret_environment": {"TOKEN": "a"}}, "secret_environment: needs the setting SECRET_RESOLVER"),
        ({"mounts": [{"type": "bind", "source": "/etc", "target": "/etc"}]}, "mounts: 0: /etc is not below"),
        ({"image": "Busy Box"}, "the job is refused: image: must be an image reference such as"),
        (
            {"priority": 500, "cpus": 1},
            "priority: Input should be less than or equal to 100; cpus: there is no such field",
        ),
        ({"privileged": True}, "the job is refused: privileged: denied: "),
        ({"devices": []}, "the job is refused: devices: denied: "),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
@on_postgres
def test_a_run_is_refused_what_is_not_allowed(database: str, fields: dict[str, Any], complaint: str) -> None:
    state = run_container_job({"image": "busybox"} | fields, return_state=True)

    with pytest.raises(JobRefused, match=re.escape(complaint)):
        state.result()
    assert (state.name, "\n" in state.message, ContainerJob.objects.count()) == ("Failed", False, 0)


@pytest.fixture
def cable(prefect_api: PrefectServer) -> Iterator[Cable]:
    """Between this process and the API."""
    cable = Cable(urlsplit(prefect_api.url).port)
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{cable.port}/api"}):
        yield cable
        # What this process has still to tell it would fail once it is cut.
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)
    cable.cut()


@on_postgres
def test_a_run_goes_on_while_the_api_is_away_and_loses_none_of_the_output(
    database: str, prefect_api: PrefectServer, cable: Cable, engine: docker.DockerClient
) -> None:
    job_spec = spec("for n in 1 2 3 4 5; do echo $n; sleep 1; done")

    with running(lambda: run_container_job(job_spec, return_state=True)) as done:
        job = running_job()
        cable.cut()
        wait_until(lambda: b"3" in engine.containers.get(job.container_id).logs())
        cable.mend()
        state = done.result(60)

    with prefect_api.used():
        assert state_of(job.flow_run_id).is_completed()
        assert [line for line, _ in output_of(job.flow_run_id)] == list("12345")
    assert state.is_completed()


@on_postgres
@pytest.mark.parametrize("has_parent", [False, True], ids=["by itself", "as a subflow"])
def test_a_run_whose_process_is_told_to_end_goes_on_in_the_next_one(
    database: str, environment: dict[str, str], has_parent: bool
) -> None:
    deployment = run_container_job.to_deployment(name="test", entrypoint_type=EntrypointType.MODULE_PATH)
    with get_client(sync_client=True) as client:
        # As `run_deployment` makes one in a flow.
        parent = client.create_task_run(container_job, None, "parent").id if has_parent else None
        run = client.create_flow_run_from_deployment(
            deployment.apply(),
            parameters={"spec": spec("echo begun; sleep 6; exit 3").model_dump(mode="json")},
            parent_task_run_id=parent,
        )
    first = start_process(environment, "-m", "prefect.engine", str(run.id))
    job = running_job()

    first.terminate()
    code = first.wait(60)
    left, status = state_of(run.id), ContainerJob.objects.get().status
    second = start_process(environment, "-m", "prefect.engine", str(run.id))
    second.wait(60)

    job.refresh_from_db()
    assert (code, left.name, left.type.value, status) == (0, "Rescheduled", "SCHEDULED", Status.RUNNING)
    assert (job.status, job.attempt) == (Status.FAILED, 1)
    assert result_in(state_of(run.id)).job_id == job.pk
    assert (state_of(run.id).name, ContainerJob.objects.count()) == ("Failed", 1)
    assert [log.message for log in logs_of(run.id) if "Traceback" in log.message] == []


def resolve(reference: str) -> str:
    return f"value of {reference}\nin two lines"


@on_postgres
def test_a_secret_is_in_no_log_and_no_result(database: str, settings: Any) -> None:
    settings.CONTAINER_MANAGER = {"SECRET_RESOLVER": f"{__name__}.resolve"}
    job_spec = spec('echo "$TOKEN"; sleep 1; echo "$TOKEN" >&2; false', secret_environment={"TOKEN": "vault:a"})

    state = run_container_job(job_spec, return_state=True)

    run_id = state.state_details.flow_run_id
    APILogWorker.drain_all(timeout=10)
    assert [line for line, _ in output_of(run_id)] == ["***", "***"] * 2
    assert not [log.message for log in logs_of(run_id) if "value of" in log.message or "two lines" in log.message]
    assert result_in(state).stderr_tail == "***\n"
    assert "value of" not in state.message


@on_postgres
def test_what_was_masked_is_shown_by_who_can_not_say_the_secret(database: str, settings: Any) -> None:
    settings.CONTAINER_MANAGER = {"SECRET_RESOLVER": f"{__name__}.resolve"}
    job = queue_spec(spec('echo "$TOKEN"', secret_environment={"TOKEN": "vault:a"}))
    queue_manager.process_queue_continuous(5, 1, work_seconds=20)
    told: list[LogLine] = []

    # Another process launched and harvested it; here nobody can say what its secrets are.
    settings.CONTAINER_MANAGER = {"SECRET_RESOLVER": "no.such.resolver"}
    watch = JobWatch(job, lambda lines: bool(told.extend(lines)) or True)

    assert watch.has_ended()
    assert ([line.text for line in told], watch.result().stdout_tail) == (["***"], "***\n")


@on_postgres
@pytest.mark.parametrize(("code", "attempts"), [(3, 2), (0, 1)], ids=["failed", "completed"])
def test_a_run_that_is_run_again_runs_its_job_again_unless_all_is_well(database: str, code: int, attempts: int) -> None:
    parameters = {"spec": spec(f"echo done; exit {code}")}
    with get_client(sync_client=True) as client:
        run_id = client.create_flow_run(run_container_job, state=Pending()).id
        for state in (Pending(), AwaitingRetry()):
            client.set_flow_run_state(run_id, state, force=True)
            run_flow(run_container_job, client.read_flow_run(run_id), parameters=parameters, return_type="state")

    job = ContainerJob.objects.get()
    assert (job.exit_code, job.attempt, job.flow_run_id) == (code, attempts, str(run_id))
    assert len(output_of(run_id)) == 2
    assert result_in(state_of(run_id)).attempt == attempts


@on_postgres
def test_a_run_outlives_connections_that_the_database_ends(database: str) -> None:
    with running(lambda: run_container_job(spec("sleep 3"))) as done:
        running_job()
        connection.close()
        with psycopg.connect(database_url()) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        result = done.result(60)

    assert (result.status, result.exit_code) == ("completed", 0)


@on_postgres
def test_who_serves_it_runs_it_as_a_deployment_and_cancels_it(database: str, serve: Serve, run: Run) -> None:
    def deployment_run(**fields: object) -> "subprocess.CompletedProcess[str]":
        parameters = json.dumps({"spec": {"image": "busybox", "command": ["sleep", "300"]} | fields})
        return run("prefect", "deployment", "run", "run-container-job/on-demand", "--params", parameters)

    with serve() as served:
        wait_until(lambda: "serving run-container-job/on-demand" in served.log.read_text(), 90)
        refused = deployment_run(privileged=True)
        started = deployment_run()
        job = running_job()
        run("prefect", "flow-run", "cancel", job.flow_run_id)
        wait_until(lambda: state_of(job.flow_run_id).is_final(), 90)

    job.refresh_from_db()
    assert (refused.returncode, started.returncode, ContainerJob.objects.count()) == (1, 0, 1)
    assert (job.status, state_of(job.flow_run_id).name) == (Status.CANCELLED, "Cancelled")
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(UUID(job.flow_run_id)).name.startswith("busybox, ")


@on_postgres
def test_the_example_of_three_steps_does_what_it_says(database: str) -> None:
    assert three_steps() == 1 + 4 + 9
    assert sorted(job.name for job in ContainerJob.objects.all()) == ["add", "count", *["square"] * 3]
