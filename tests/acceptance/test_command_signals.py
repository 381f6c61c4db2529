"""What signals do to the command; each test a sentence of its contract."""

import ast
import inspect
import json
import signal
import textwrap
import threading
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import call_command
from django.db import connection

from container_manager.management.background import TICK_SECONDS
from container_manager.management.signals import SignalWatch
from container_manager.models import ContainerJob, Status
from tests.conftest import wait_until

from .conftest import Running, Site, unanswered

CONTINUOUS = ("--queue-mode", "--via=inline", "--poll-interval=1")


def continuous(site: Site, *more: str) -> Running:
    command = site.start(*CONTINUOUS, *more)
    command.wait_for("Prefect: ")
    return command


def test_sigterm_ends_it_gracefully_with_exit_code_0_while_containers_keep_running(site_with_api: Site) -> None:
    job = site_with_api.queue("sleep", "60")
    command = continuous(site_with_api)
    wait_until(lambda: ContainerJob.objects.running().exists())
    command.send(signal.SIGTERM)

    assert command.end(10) == 0
    assert "Received SIGTERM, shutting down gracefully..." in command.lines
    assert command.lines[-1].startswith("Queue processor finished. Processed ")
    assert command.lines[-1].endswith(" iterations, launched 1 jobs")
    job.refresh_from_db()
    assert job.status == Status.RUNNING


def test_it_goes_on_with_what_comes_in(site_with_api: Site) -> None:
    command = continuous(site_with_api, "--json")
    job = site_with_api.queue("true")
    wait_until(lambda: ContainerJob.objects.filter(pk=job.pk, status=Status.COMPLETED).exists())
    command.send(signal.SIGINT)

    assert command.end(10) == 0
    runs = [json.loads(line) for line in command.lines]
    assert sum(run["launched"] for run in runs) == 1
    assert "Received SIGINT, shutting down gracefully..." in command.errors


def test_sigusr1_gives_one_status_line_within_half_a_second(site_with_api: Site) -> None:
    site_with_api.queue("sleep", "60")
    command = continuous(site_with_api)
    wait_until(lambda: ContainerJob.objects.running().exists())
    command.send(signal.SIGUSR1)
    line = str(wait_until(lambda: next((line for line in command.lines if line.startswith("Queue status: ")), None), 2))

    status = json.loads(line.removeprefix("Queue status: "))
    assert (status["running"], status["ready_now"]) == (1, 0)
    assert command.process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(site: Site, number: signal.Signals) -> None:
    with unanswered() as url:
        command = site.start(*CONTINUOUS, PREFECT_API_URL=url)
        command.wait_for("Starting queue processor")
        command.send(number)
        command.wait_for(f"Received {number.name}")
        command.send(number)

        # A shell calls it 130 or 143.
        assert command.end(2) == -number


def test_a_flow_run_that_outlasts_the_shutdown_timeout_is_left_with_exit_code_1(site: Site) -> None:
    with unanswered() as url:
        command = site.start(*CONTINUOUS, "--shutdown-timeout=0", PREFECT_API_URL=url)
        command.wait_for("Starting queue processor")
        command.send(signal.SIGTERM)

        assert command.end(2) == 1
    assert command.errors == ["Not finished within 0 s: leases cover the rest"]


def test_the_temporary_server_is_started_once_and_ends_with_the_command_however_that_ends(site: Site) -> None:
    command = continuous(site, "--json")
    (server,) = children(command)
    wait_until(lambda: len(command.lines) >= 3)
    assert children(command) == [server]
    command.send(signal.SIGKILL)
    command.end()

    wait_until(lambda: not Path(f"/proc/{server}").exists())


def test_sigint_in_legacy_mode_says_interrupted_by_user_with_exit_code_0(site: Site) -> None:
    site.queue("true")
    with unanswered() as url:
        command = site.start("--status=pending", "--via=inline", PREFECT_API_URL=url)
        command.wait_for("Found 1 job(s) to process")
        command.send(signal.SIGINT)

        assert command.end(20) == 0
    assert "Interrupted by user" in command.lines
    assert ContainerJob.objects.queued().count() == 1


def test_a_handler_sets_plain_attributes_and_does_nothing_else() -> None:
    with SignalWatch(signal.SIGTERM, signal.SIGINT):
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    for handler in handlers:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(handler))).body
        assert isinstance(definition, ast.FunctionDef)
        for statement in definition.body:
            assert isinstance(statement, ast.Assign | ast.AugAssign)
            assert isinstance(statement.value, ast.Name | ast.Constant)


def test_the_main_loop_looks_every_fifth_of_a_second() -> None:
    assert TICK_SECONDS == 0.2


@pytest.mark.usefixtures("site")
def test_handlers_are_put_back_on_exit() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    call_command("process_container_jobs", queue_mode=True, dry_run=True, stdout=StringIO())

    assert [signal.getsignal(number) for number in numbers] == before


def test_off_the_main_thread_it_works_without_handlers(site: Site) -> None:
    said = StringIO()

    def call() -> None:
        call_command("process_container_jobs", queue_mode=True, dry_run=True, stdout=said)
        connection.close()

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()

    assert "No jobs ready for launch" in said.getvalue()


def children(command: Running) -> list[int]:
    path = Path(f"/proc/{command.process.pid}/task")
    return [int(pid) for task in path.iterdir() for pid in (task / "children").read_text().split()]
