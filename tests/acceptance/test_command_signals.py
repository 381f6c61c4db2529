"""What signals do to the command; each test a sentence of its contract."""

import json
import os
import signal
import threading
from collections.abc import Callable

import pytest
from django.core.management import call_command

from container_manager.management.background import in_background
from container_manager.management.signals import SignalWatch
from container_manager.models import ContainerJob, Status
from tests.conftest import wait_until

from .conftest import Running, Site

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
def test_a_second_signal_ends_it_at_once(site_with_api: Site, number: signal.Signals) -> None:
    with unanswered() as url:
        site_with_api.env["PREFECT_API_URL"] = url
        command = site_with_api.start(*CONTINUOUS)
        command.wait_for("Starting queue processor")
        command.send(number)
        command.wait_for(f"Received {number.name}")
        command.send(number)

        # A shell calls it 130 or 143.
        assert command.end(2) == -number
