"""Signals in the middle of the work, many times over; each test a sentence of the command's contract."""

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import docker
import pytest

from container_manager.containers import INSTANCE_LABEL, JOB_LABEL
from container_manager.models import LEASED, ContainerJob, Installation, Status
from tests.conftest import wait_until

from .conftest import Running, Site

#: Of each of the two databases.
COMMANDS, AT_ONCE = 25, 2
CONTINUOUS = ("--queue-mode", "--via=inline", "--poll-interval=1", "--max-concurrent=20")
LEASE_SECONDS = 15
SETTINGS = f'{{"LEASE_SECONDS": {LEASE_SECONDS}, "DOCKER_TIMEOUT_SECONDS": 5}}'
SHUTDOWN_SECONDS = 15


@pytest.fixture
def starts(any_site: Site, engine: docker.DockerClient) -> Iterator[Counter[str]]:
    """Starts of containers by job, by the Engine's own word."""
    label = f"{INSTANCE_LABEL}={Installation.load().instance_id}"
    stream = engine.events(decode=True, filters={"type": "container", "label": label, "event": "start"})
    counted: Counter[str] = Counter()

    def listen() -> None:
        for event in stream:
            counted[event["Actor"]["Attributes"][JOB_LABEL]] += 1

    listener = threading.Thread(target=listen)
    listener.start()
    yield counted
    stream.close()
    listener.join(10)


def struck(site: Site, after_seconds: float) -> tuple[Running, float]:
    """A command that was sent SIGTERM this long after it began its work, and how long it took to end."""
    command = site.start(*CONTINUOUS, f"--shutdown-timeout={SHUTDOWN_SECONDS}", CONTAINER_MANAGER=SETTINGS)
    command.wait_for("Starting queue processor")
    time.sleep(after_seconds)
    command.send(signal.SIGTERM)
    asked_at = time.monotonic()
    command.end(SHUTDOWN_SECONDS + 10)
    return command, time.monotonic() - asked_at


@pytest.mark.timeout(300)
def test_sigterm_at_any_moment_over_a_busy_queue_loses_doubles_and_leaves_nothing(
    any_site: Site, starts: Counter[str]
) -> None:
    chance = random.Random(7)
    moments = [chance.uniform(0, 2.5) for _ in range(COMMANDS)]
    jobs = [any_site.queue("sleep", "0.3", networks=["none"]).pk for _ in range(60)]
    left_behind: list[tuple[int, str]] = []

    def strike(seconds: float) -> tuple[int, float, list[str]]:
        command, took = struck(any_site, seconds)
        return command.process.pid, took, [*command.lines, *command.errors, f"exit {command.process.returncode}"]

    with ThreadPoolExecutor(AT_ONCE) as executor:
        struck_down = [executor.submit(strike, seconds) for seconds in moments]
        for done in struck_down:
            pid, took, lines = done.result()
            assert lines[-1] == "exit 0", lines
            assert took < SHUTDOWN_SECONDS + 1
            left = ContainerJob.objects.filter(status__in=LEASED, claimed_by__endswith=f":{pid}")
            left_behind += left.values_list("pk", "status")
            while ContainerJob.objects.queued().count() < 30:
                jobs.append(any_site.queue("sleep", "0.3", networks=["none"]).pk)
    # Whoever ends gracefully has recorded what it claimed, or given it back.
    assert left_behind == []

    command = any_site.start(*CONTINUOUS, CONTAINER_MANAGER=SETTINGS)
    wait_until(lambda: not ContainerJob.objects.exclude(status=Status.COMPLETED).exists(), 90)
    command.send(signal.SIGTERM)
    assert command.end(30) == 0
    assert starts == Counter({str(pk): 1 for pk in jobs})
    assert not ContainerJob.objects.filter(status__in=LEASED).exists()


def test_a_thousand_sigusr1_during_queries_harm_nothing(any_site: Site) -> None:
    command = any_site.start(*CONTINUOUS)
    command.wait_for("Prefect: ")
    jobs = [any_site.queue("true", networks=["none"]).pk for _ in range(5)]
    for _ in range(1000):
        command.send(signal.SIGUSR1)
        time.sleep(0.003)
    wait_until(lambda: ContainerJob.objects.filter(pk__in=jobs, status=Status.COMPLETED).count() == len(jobs))
    asked = len(command.lines)
    command.send(signal.SIGUSR1)
    wait_until(lambda: len(command.lines) > asked, 5)
    command.send(signal.SIGTERM)

    assert command.end(15) == 0
    assert command.errors == []
    assert sum(line.startswith("Queue status: {") for line in command.lines) > 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_in_the_middle_of_launches_ends_it_at_once(site_with_api: Site, number: signal.Signals) -> None:
    for _ in range(40):
        site_with_api.queue("sleep", "60", networks=["none"])
    # All at once, so that what was begun takes seconds to be finished.
    threads = '{"LAUNCH_THREADS": 40}'
    command = site_with_api.start(
        "--queue-mode", "--once", "--via=inline", "--max-concurrent=40", CONTAINER_MANAGER=threads
    )
    wait_until(lambda: ContainerJob.objects.exclude(status=Status.QUEUED).exists())
    command.send(number)
    command.wait_for(f"Received {number.name}", 5)
    command.send(number)
    asked_at = time.monotonic()

    assert command.end(5) == -number
    assert time.monotonic() - asked_at < 1
