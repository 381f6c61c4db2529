"""What a job writes while it runs, on its page: read by passes, as long as somebody looks."""

import re
import threading
import time
import tracemalloc
from datetime import timedelta
from html import unescape
from typing import Any

import docker
import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils.timezone import now

from container_manager.exceptions import EngineFailed, HostUnavailable
from container_manager.hosts import Hosts
from container_manager.models import ContainerJob, DockerHost, Status, WatchedLog
from container_manager.queue import QueueManager
from container_manager.watching import END_BYTES, END_LINES, LogWatches, want
from tests.conftest import wait_until
from tests.fake_engine import FakeEngine, Fleet, Gate, launched, one_round, queued, raising, row
from tests.integration.conftest import logged_in
from tests.integration.test_admin import FOREIGN, staff

#: seconds; a round that waited for an Engine that hangs would take longer.
PROMPT = 2.0
#: bytes; no machine has a stack of this size to give to a thread.
NO_THREAD_HAS = 1 << 46


@pytest.fixture
def machine(fleet: Fleet) -> FakeEngine:
    return fleet.add_host("local")


@pytest.fixture
def in_memory(fleet: Fleet, machine: FakeEngine) -> QueueManager:
    return QueueManager(fleet)


def page_of(job: ContainerJob) -> str:
    return reverse("admin:container_manager_live_log", args=(job.pk,))


def shown(client: Client, job: ContainerJob) -> str:
    """What is to be read on the page of the job's log."""
    response = client.get(page_of(job))
    assert response.status_code == 200
    return unescape(re.sub(r"<[^>]*>", " ", response.content.decode().split('id="content"')[1]))


def writes(machine: FakeEngine, job: ContainerJob, stdout: bytes, stderr: bytes = b"") -> None:
    container = machine.containers[job.container_id or ""]
    container.stdout, container.stderr = stdout, stderr


def read_once(manager: QueueManager) -> None:
    """Rounds until the only log that is wanted was read: on a busy machine that may take more than one."""
    wait_until(lambda: one_round(manager) and WatchedLog.objects.get().read_at)


def seconds_of_a_round(manager: QueueManager) -> float:
    began = time.monotonic()
    one_round(manager)
    return time.monotonic() - began


def test_a_page_shows_what_a_job_writes_as_it_writes_it_and_then_what_was_stored(
    client: Client, docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    job = launched(
        manager, command=["sh", "-c", "echo one; echo two >&2; while [ ! -e /end ]; do sleep 0.1; done; echo 3"]
    )
    before, link = (
        shown(client, job),
        client.get(reverse("admin:container_manager_containerjob_change", args=(job.pk,))),
    )
    wait_until(lambda: one_round(manager) and "one" in shown(client, job))
    while_it_runs = client.get(page_of(job))
    engine.containers.get(row(job).container_id).exec_run(["touch", "/end"])
    wait_until(lambda: one_round(manager) and row(job).status == Status.COMPLETED)
    after = client.get(page_of(job))

    assert "Nothing yet: the next pass brings it; no pass is at work at this moment." in before
    assert f'href="{page_of(job)}"' in link.content.decode()
    assert ("two" in while_it_runs.content.decode(), while_it_runs.headers["Refresh"]) == (True, "2")
    assert ("one\n3\n" in after.content.decode(), "Refresh" in after.headers) == (True, False)


def test_a_round_asks_one_statement_more_while_nobody_looks(in_memory: QueueManager) -> None:
    launched(in_memory)
    one_round(in_memory)

    with CaptureQueriesContext(connection) as queries:
        one_round(in_memory)

    assert [query["sql"].split()[0] for query in queries if WatchedLog._meta.db_table in query["sql"]] == ["SELECT"]


def test_what_nobody_looks_at_is_not_read_and_its_row_goes(
    client: Client, machine: FakeEngine, in_memory: QueueManager
) -> None:
    job = launched(in_memory)
    shown(client, job)
    read_once(in_memory)
    WatchedLog.objects.update(wanted_until=now() - timedelta(seconds=1))

    one_round(in_memory)

    assert machine.count("read_end") == 2
    assert not WatchedLog.objects.exists()


def test_an_engine_that_hangs_holds_up_no_round_and_no_other_log(
    client: Client, machine: FakeEngine, in_memory: QueueManager
) -> None:
    hanging, other = launched(in_memory), launched(in_memory)
    writes(machine, hanging, b"late")
    writes(machine, other, b"at once")
    gate = Gate()
    want(hanging.pk)
    machine.before("read_end", gate)

    first = seconds_of_a_round(in_memory)
    want(other.pk)
    second = seconds_of_a_round(in_memory)

    assert max(first, second) < PROMPT
    wait_until(lambda: one_round(in_memory) and "at once" in shown(client, other))
    assert "Nothing yet" in shown(client, hanging)
    assert gate.most_waiting == 1
    gate.open()
    wait_until(lambda: one_round(in_memory) and "late" in shown(client, hanging))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (EngineFailed("logs: the driver keeps none"), "logs: the driver keeps none"),
        (HostUnavailable("logs: refused"), "logs: refused"),
        (RuntimeError("a defect"), "RuntimeError"),
    ],
    ids=["failing", "away", "defect"],
)
def test_whatever_an_engine_does_to_a_log_fails_no_round_and_is_told(
    client: Client, machine: FakeEngine, in_memory: QueueManager, error: Exception, told: str
) -> None:
    job = launched(in_memory)
    want(job.pk)
    machine.always("read_end", raising(error))

    stats = one_round(in_memory)
    later = queued(in_memory)
    one_round(in_memory)

    assert (stats.anomalies, row(job).status, row(later).status) == ((), Status.RUNNING, Status.RUNNING)
    wait_until(
        lambda: one_round(in_memory) and re.search(f"The Engine did not give it at .*: {told}", shown(client, job))
    )


def test_a_log_for_which_no_thread_is_to_be_had_is_told_and_read_later(
    fleet: Fleet, machine: FakeEngine, in_memory: QueueManager
) -> None:
    job, watches, connections = launched(in_memory), LogWatches(), Hosts(fleet).reached()
    writes(machine, job, b"later")
    want(job.pk)

    usual = threading.stack_size(NO_THREAD_HAS)
    try:
        watches.serve(connections)
    finally:
        threading.stack_size(usual)
    told = WatchedLog.objects.get().error
    wait_until(lambda: (watches.serve(connections), WatchedLog.objects.get().stdout)[1])

    assert (told, WatchedLog.objects.values_list("error", "stdout").get()) == ("RuntimeError", ("", "later"))


def test_a_database_that_fails_for_a_log_costs_the_round_nothing(in_memory: QueueManager) -> None:
    job = queued(in_memory)
    want(job.pk)

    def fail(execute: Any, sql: str, *rest: Any) -> Any:
        if WatchedLog._meta.db_table in sql:
            sql = "SELECT no_such_function_of_any_database()"
            rest = ((), *rest[1:])
        return execute(sql, *rest)

    with connection.execute_wrapper(fail):
        stats = one_round(in_memory)

    assert stats.jobs_launched == 1


def test_a_log_of_another_attempt_is_not_taken_for_this_ones(
    client: Client, machine: FakeEngine, in_memory: QueueManager
) -> None:
    job = launched(in_memory)
    want(job.pk)
    writes(machine, job, b"first")
    read_once(in_memory)
    ContainerJob.objects.filter(pk=job.pk).update(attempt=2)

    assert "first" not in shown(client, job)


def test_a_running_jobs_secrets_are_in_no_row(
    client: Client, machine: FakeEngine, in_memory: QueueManager, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"SECRET_RESOLVER": f"{__name__}.resolve"}
    job = launched(in_memory, secret_environment={"TOKEN": "vault:a"})
    writes(machine, job, b"it is value of vault:a", b"in two lines")
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"SECRET_RESOLVER": "no.such.resolver"}
    want(job.pk)

    read_once(in_memory)

    assert WatchedLog.objects.values_list("stdout", "stderr").get() == ("it is ***", "***")


def resolve(reference: str) -> str:
    return f"value of {reference}\nin two lines"


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_a_job_that_writes_without_end_costs_a_pass_neither_time_nor_memory(
    client: Client, docker_host: DockerHost, manager: QueueManager
) -> None:
    job = launched(manager, command=["sh", "-c", "yes $(printf %04000d 7)"])
    want(job.pk)
    tracemalloc.start()
    try:
        slowest = max(seconds_of_a_round(manager) for _ in range(3))
        wait_until(lambda: one_round(manager) and WatchedLog.objects.get().read_at)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    log = WatchedLog.objects.get()
    assert log.error == ""
    assert 0 < len(log.stdout) <= END_BYTES
    assert set(log.stdout) == {"0", "7", "\n"}
    assert slowest < PROMPT
    assert most < 20 * 1024 * 1024
    manager.cancel_job(row(job))
    wait_until(lambda: one_round(manager) and row(job).status == Status.CANCELLED)


def test_no_more_than_the_end_is_kept_and_text_is_shown_and_not_run(
    client: Client, machine: FakeEngine, in_memory: QueueManager
) -> None:
    job = launched(in_memory)
    writes(machine, job, b"x" * 100 + b"\nline" * (END_LINES + 1), FOREIGN.encode() + b"\0" + "é".encode() * END_BYTES)
    want(job.pk)

    read_once(in_memory)

    log = WatchedLog.objects.get()
    assert (log.stdout.count("line"), "x" in log.stdout, len(log.stderr)) == (END_LINES, False, END_BYTES // 2)
    writes(machine, job, FOREIGN.encode())
    wait_until(lambda: one_round(in_memory) and FOREIGN in shown(client, job))
    assert FOREIGN not in client.get(page_of(job)).content.decode()


def test_a_log_needs_a_job_and_the_permission_to_see_it(client: Client, in_memory: QueueManager) -> None:
    job = launched(in_memory)
    stranger = logged_in(User.objects.create_user("stranger", is_staff=True))

    codes = [visitor.get(page_of(job)).status_code for visitor in (staff(), stranger, Client())]

    assert codes == [200, 403, 302]
    assert client.get(page_of(ContainerJob(pk=job.pk + 1))).status_code == 404


def test_a_log_that_is_not_there_says_why(client: Client, in_memory: QueueManager) -> None:
    job = ContainerJob.objects.create_job(image="busybox")

    page = client.get(page_of(job))

    assert "It has not run: not queued yet." in page.content.decode()
    assert "Refresh" not in page.headers
    assert not WatchedLog.objects.exists()


def test_a_job_takes_its_wish_for_a_log_with_it(in_memory: QueueManager, settings: Any, machine: FakeEngine) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"KEEP_JOBS_DAYS": 0}
    job = launched(in_memory)
    want(job.pk)
    machine.end(job.container_id)
    one_round(in_memory)

    in_memory.purge()

    assert not ContainerJob.objects.exists()
    assert not WatchedLog.objects.exists()
