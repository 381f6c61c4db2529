"""The pages beside the admin's own: what they show, to whom, and what they cost."""

import re
from datetime import timedelta
from html import unescape
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils.timezone import now

from container_manager.leases import WorkLease
from container_manager.models import ContainerJob, DockerHost, JobAttempt, Status
from container_manager.pages import MOST_ENDED, MOST_RUNNING
from container_manager.queue import QueueManager
from container_manager.types import Limits
from tests.integration.conftest import logged_in
from tests.integration.test_admin import FOREIGN, in_status, staff

DASHBOARD = reverse("admin:container_manager_dashboard")
JOBS = reverse("admin:container_manager_containerjob_changelist")


@pytest.fixture
def host(database: str) -> DockerHost:
    return DockerHost.objects.create(name="a", last_seen_at=now())


def running(host: DockerHost, **fields: Any) -> ContainerJob:
    return in_status(Status.RUNNING, host, launched_at=now(), attempt=1, **fields)


def ended(job: ContainerJob, **fields: Any) -> JobAttempt:
    return JobAttempt.objects.create(job=job, number=1, host_name="a", **{"reason": "exit_code"} | fields)


def text_of(response: Any) -> str:
    """What is to be read on a page, on one line."""
    assert response.status_code == 200
    body = re.sub(r"<[^>]*>", " ", response.content.decode().split('id="content"')[1])
    return " ".join(unescape(body).split())


def test_the_dashboard_says_how_the_queue_is(client: Client, host: DockerHost, manager: QueueManager) -> None:
    manager.keep_limits(Limits(total=1, hosts={"a": 3}))
    WorkLease().acquire()
    DockerHost.objects.create(name="b", is_active=False)
    DockerHost.objects.create(name="c", last_error="connection refused")
    running(host, name="report")
    in_status(Status.QUEUED, queued_at=now() - timedelta(hours=1, seconds=1))
    ended(in_status(Status.FAILED, name="broken", reason="exit_code"), exit_code=3, error="exited with code 3")

    page = client.get(DASHBOARD)
    text = text_of(page)

    for words in (
        "ready now 1", "oldest wait 1:00:0", "scheduled 0", "launching 0", "running 1", "failed 1", "launch failed 0",
        "limit reached: tag container-job, 1 of 1", "container-job 1 · docker-host:a 3", "a pass is at work",
        "no: host b is not active", "no: host c is not reachable: connection refused",
        "report busybox a", "broken 1 a", "3 exited with code 3 Failed",
    ):  # fmt: skip
        assert words in text, words
    assert page.headers["Refresh"] == "5"
    assert "<script" not in page.content.decode().split('id="content"')[1].split('id="footer"')[0]


def test_the_dashboard_of_an_empty_queue_answers_and_makes_no_row(client: Client) -> None:
    text = text_of(client.get(DASHBOARD))

    assert "There is no Docker host: add one" in text
    assert "there is no Docker host: add one" in text
    assert "No job runs." in text


def test_the_figures_lead_to_the_jobs_that_they_count(client: Client, host: DockerHost) -> None:
    for status in (Status.QUEUED, Status.LAUNCHING, Status.STARTING, Status.RUNNING):
        in_status(status, host, queued_at=now())
    in_status(Status.FAILED, reason="launch")
    in_status(Status.SCHEDULED, scheduled_for=now() - timedelta(hours=1))
    for _ in range(3):
        in_status(Status.SCHEDULED, scheduled_for=now() + timedelta(hours=1))
    page = client.get(DASHBOARD)

    assert [figure.value for figure in page.context["figures"][:3:2]] == [2, 3]
    for figure in page.context["figures"]:
        if figure.query:
            assert f'href="{JOBS}?{figure.query}"'.replace("&", "&amp;") in page.content.decode()
            shown = client.get(f"{JOBS}?{figure.query}").context["cl"].queryset.count()
            assert shown == figure.value


def test_the_dashboard_shows_the_newest_and_costs_the_same_for_many(client: Client, host: DockerHost) -> None:
    def asked() -> int:
        with CaptureQueriesContext(connection) as queries:
            page = client.get(DASHBOARD)
        assert not [query for query in queries if re.search("stdout|stderr", query["sql"])]
        shown = (len(page.context["running"]), len(page.context["ended"]))
        assert shown == (min(jobs, MOST_RUNNING), min(jobs, MOST_ENDED))
        return len(queries)

    jobs = 1
    ended(running(host), stdout="out")
    few = asked()
    for _ in range(MOST_RUNNING):
        ended(running(host), stdout="out")
    jobs += MOST_RUNNING

    assert asked() == few


def test_who_may_see_jobs_sees_the_dashboard_and_finds_it(client: Client, host: DockerHost) -> None:
    person = staff()
    stranger = logged_in(User.objects.create_user("stranger", is_staff=True))

    assert f'href="{DASHBOARD}"' in person.get(JOBS).content.decode()
    assert person.get(DASHBOARD).status_code == 200
    assert (stranger.get(DASHBOARD).status_code, Client().get(DASHBOARD).status_code) == (403, 302)


def test_who_may_not_see_jobs_costs_the_page_no_query_on_them(client: Client, host: DockerHost) -> None:
    stranger = logged_in(User.objects.create_user("stranger", is_staff=True))

    with CaptureQueriesContext(connection) as queries:
        code = stranger.get(DASHBOARD).status_code

    assert code == 403
    assert not [query for query in queries if ContainerJob._meta.db_table in query["sql"]]


def test_who_may_see_jobs_and_not_hosts_is_told_no_hosts_errors(client: Client, host: DockerHost) -> None:
    DockerHost.objects.update(last_error="refused at 10.0.0.7")
    pinned, runs = in_status(Status.QUEUED, queued_at=now(), pinned_host=host), running(host)
    person = User.objects.create_user("person", is_staff=True)
    person.user_permissions.set(Permission.objects.filter(codename="view_containerjob"))
    pages = [
        DASHBOARD,
        JOBS,
        reverse("admin:container_manager_containerjob_change", args=(pinned.pk,)),
        reverse("admin:container_manager_live_log", args=(runs.pk,)),
    ]

    texts = [text_of(logged_in(person).get(page)) for page in pages]

    assert ["10.0.0.7" in text for text in texts] == [False] * 4
    assert [words in texts[0] for words in ("Hosts", "host a is not reachable")] == [False, True]
    assert ["host a is not reachable, not seen since" in text for text in texts[1:3]] == [True, True]
    assert "10.0.0.7" in text_of(client.get(DASHBOARD))


def test_foreign_text_on_the_dashboard_is_shown_and_not_run(client: Client, host: DockerHost) -> None:
    DockerHost.objects.create(name="b", last_error=FOREIGN)
    ended(running(host, name=FOREIGN, image=FOREIGN), error=FOREIGN)

    page = client.get(DASHBOARD).content.decode()

    assert FOREIGN not in page
    assert unescape(page).count(FOREIGN) >= 4
