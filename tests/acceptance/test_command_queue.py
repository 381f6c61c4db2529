"""`--queue-mode`, once and continuous, and how it is stopped; each test a sentence of the command's contract."""

import json
import signal
import sys
import time
from io import StringIO
from typing import Any

import pytest
from django.core.management.base import OutputWrapper

from container_manager.exceptions import ContainerManagerError
from container_manager.management.processing import Options, QueueProcessor, RunFailed
from container_manager.management.queue_report import Console
from container_manager.management.signals import SignalWatch
from container_manager.models import ContainerJob, Status
from container_manager.types import FlowRunReport, JobError, LoopStats
from tests.conftest import ROOT, wait_until

from .conftest import Running, Site, objects

INLINE = ("--queue-mode", "--via=inline")
#: An image that no registry has, to be tried again or not.
NO_IMAGE = {"image": "container-manager.invalid/none", "pull_policy": "never"}

Outcome = LoopStats | Exception


class Script:
    """Flow runs that end as it is written, then ask for a stop."""

    current = ""

    def __init__(self, watch: SignalWatch, *outcomes: Outcome) -> None:
        self._watch, self._outcomes = watch, iter(outcomes)
        self.parameters: list[dict[str, Any]] = []
        self.began: list[float] = []

    def process_queue(self, parameters: dict[str, Any]) -> FlowRunReport[LoopStats]:
        self.parameters.append(parameters)
        self.began.append(time.monotonic())
        outcome = next(self._outcomes, None)
        if outcome is None:
            self._watch.stopped_by = signal.SIGTERM
            outcome = LoopStats()
        if isinstance(outcome, Exception):
            raise outcome
        return FlowRunReport(
            via="inline", flow_run_id="1", state_name="Completed", state_type="COMPLETED", report=outcome
        )

    def process_jobs(self, parameters: dict[str, Any]) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass


def follow(*outcomes: Outcome, poll_interval: int = 0, **options: Any) -> tuple[Script, list[str], list[str]]:
    """The flow runs, and what was said on stdout and stderr."""
    said, complained = StringIO(), StringIO()
    watch = SignalWatch()
    script = Script(watch, *outcomes)
    console = Console(OutputWrapper(said), OutputWrapper(complained), as_json=False)
    processor = QueueProcessor(script, console, watch, Options(poll_interval=poll_interval, **options))
    processor.process(once=False, dry_run=False)
    return script, said.getvalue().splitlines(), complained.getvalue().splitlines()


def test_errors_are_counted_and_the_last_20_kept() -> None:
    errors = [JobError(job_id=number, error="no") for number in range(1, 26)]
    runs = [LoopStats(error_count=5, errors=tuple(errors[i : i + 5])) for i in range(0, 25, 5)]
    _, said, _ = follow(*runs)

    assert said[-22:] == [
        "Queue processor finished. Processed 6 iterations, launched 0 jobs",
        "Encountered 25 errors during processing",
        *(f"  - Job {number}: no" for number in range(6, 26)),
    ]


def test_without_errors_the_line_with_how_many_ran_is_the_last() -> None:
    _, said, _ = follow(LoopStats(jobs_launched=2), LoopStats(jobs_launched=1))

    assert said[-1] == "Queue processor finished. Processed 3 iterations, launched 3 jobs"


def test_a_trouble_is_told_once_per_change_of_state_and_tried_again_with_backoff() -> None:
    away, broken = OSError("away"), RunFailed("broken", "inline", "2")
    script, said, complained = follow(away, broken, LoopStats(), ContainerManagerError("other"))

    assert complained == [
        "Queue processing failed: away",
        "Queue processing failed: broken",
        "Queue processing works again, after 2 failures",
        "Queue processing failed: other",
        "Queue processing works again, after 1 failure",
    ]
    waits = [round(later - earlier) for earlier, later in zip(script.began, script.began[1:], strict=False)]
    assert waits == [2, 4, 0, 2]
    # A flow run that was none is no iteration.
    assert "Queue processor finished. Processed 3 iterations, launched 0 jobs" in said


def test_a_flow_run_gets_these_parameters_and_stays_for_less_than_the_interval() -> None:
    script, _, _ = follow(max_concurrent=7, timeout=9)
    longer, _, _ = follow(poll_interval=60)

    assert script.parameters == [{"max_concurrent": 7, "timeout": 9, "work_seconds": 0}]
    assert longer.parameters[0]["work_seconds"] == 8


def continuous(site: Site, *flags: str) -> Running:
    command = site.start(*INLINE, *flags)
    command.wait_for("Prefect: ")
    return command


def test_the_interval_lies_between_flow_runs_and_iterations_are_flow_runs(site_with_api: Site) -> None:
    site_with_api.queue(**NO_IMAGE, max_retries=0)
    command = site_with_api.start(*INLINE, "--poll-interval=3", "--json")
    came = []
    for count in (2, 3):
        wait_until(lambda count=count: len(command.lines) >= count)
        came.append(time.monotonic())
    command.send(signal.SIGTERM)

    assert command.end(10) == 0
    assert 2.5 < came[1] - came[0] < 5
    runs = objects("\n".join(command.lines))
    assert len({run["flow_run_id"] for run in runs}) == len(runs)
    assert [run["exit_code"] for run in runs] == [3, *(0 for _ in runs[1:])]
    assert f"Queue processor finished. Processed {len(runs)} iterations, launched 0 jobs" in command.errors
    assert "Encountered 1 errors during processing" in command.errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_the_next_poll_at_once(site_with_api: Site, number: signal.Signals) -> None:
    command = site_with_api.start(*INLINE, "--poll-interval=600", "--verbose")
    command.wait_for("Flow run ")
    time.sleep(0.3)
    command.send(number)
    asked_at = time.monotonic()

    assert command.end(10) == 0
    assert time.monotonic() - asked_at < 5
    assert command.lines[-1] == "Queue processor finished. Processed 1 iterations, launched 0 jobs"


def test_the_status_comes_within_half_a_second(any_site: Site) -> None:
    command = continuous(any_site, "--poll-interval=600")
    time.sleep(1)
    took = []
    for _ in range(4):
        seen = len(command.lines)
        asked_at = time.monotonic()
        command.send(signal.SIGUSR1)
        wait_until(lambda seen=seen: [line for line in command.lines[seen:] if line.startswith("Queue status: {")], 5)
        took.append(time.monotonic() - asked_at)
    command.send(signal.SIGTERM)

    assert command.end(10) == 0
    # The first one connects to the database; and other tests' processes may be in the way of one.
    assert sorted(took)[1] < 0.5
    status = json.loads(next(line for line in command.lines if "Queue status" in line).removeprefix("Queue status: "))
    assert status.keys() >= {"ready_now", "scheduled_future", "running", "launch_failed", "iterations", "launched"}


def test_sigterm_during_once_finishes_its_launches_with_exit_code_0(any_site: Site) -> None:
    for _ in range(30):
        any_site.queue("sleep", "60", networks=["none"])
    command = any_site.start(*INLINE, "--once", "--max-concurrent=30")
    wait_until(lambda: ContainerJob.objects.exclude(status=Status.QUEUED).exists())
    command.send(signal.SIGTERM)

    assert command.end(30) == 0
    assert "Received SIGTERM, shutting down gracefully..." in command.lines
    running = ContainerJob.objects.running().count()
    assert f"Processed queue: launched {running} jobs" in command.lines
    assert set(ContainerJob.objects.values_list("status", flat=True)) <= {Status.QUEUED, Status.RUNNING}


def test_a_launch_that_will_be_tried_again_is_no_failure(site_with_api: Site) -> None:
    job = site_with_api.queue(**NO_IMAGE | {"pull_policy": "missing"}, max_retries=3)
    done = site_with_api.run(*INLINE, "--once")

    job.refresh_from_db()
    assert (done.returncode, job.status) == (0, Status.SCHEDULED)
    assert job.last_error


@pytest.mark.parametrize("count", [1, 2])
def test_the_error_of_exit_code_3_names_the_jobs(site_with_api: Site, count: int) -> None:
    ids = [site_with_api.queue(**NO_IMAGE, max_retries=0).pk for _ in range(count)]
    done = site_with_api.run(*INLINE, "--once", DJANGO_LOG_LEVEL="CRITICAL")

    which = f"Job {ids[0]}" if count == 1 else f"Jobs {ids[0]}, {ids[1]}"
    assert (done.returncode, done.stderr) == (3, f"CommandError: {which} failed to launch\n")


def test_a_normal_end_leaves_nothing_on_stderr(site: Site) -> None:
    for _ in range(3):
        site.queue("true")
    done = site.run("--queue-mode", "--once")

    assert (done.returncode, done.stderr) == (0, "")


def test_off_the_main_thread_a_flow_run_works(site_with_api: Site) -> None:
    program = (
        "import threading, django; django.setup()\n"
        "from django.core.management import call_command\n"
        "thread = threading.Thread(target=call_command, args=['process_container_jobs'],\n"
        "    kwargs={'queue_mode': True, 'once': True, 'via': 'inline'})\n"
        "thread.start(); thread.join()\n"
    )
    job = site_with_api.queue("true")
    command = site_with_api.start(
        program=[sys.executable, "-c", program],
        DJANGO_SETTINGS_MODULE="container_manager.settings",
        PYTHONPATH=str(ROOT),
    )

    assert command.end(30) == 0
    assert command.lines[-1] == "Processed queue: launched 1 jobs"
    job.refresh_from_db()
    assert job.status == Status.RUNNING


def test_what_prefect_still_sends_at_a_normal_end_is_no_warning_on_a_terminal(site: Site) -> None:
    program = (
        "import logging; from flows import inline; inline.quiet_console()\n"
        "for name in ('EventsWorker', 'APILogWorker'):\n"
        "    logging.getLogger(name).warning('Still processing items: 3 items remaining...')\n"
        "logging.getLogger('prefect').warning('something else')\n"
    )
    command = site.start(program=[sys.executable, "-c", program], PYTHONPATH=str(ROOT))

    assert command.end(30) == 0
    assert len(command.errors) == 1
    assert "something else" in command.errors[0]
