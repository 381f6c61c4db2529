"""The pages as people use them: forms, actions, permissions, and what the pages must never do."""

import re
from datetime import timedelta
from html import unescape
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.contrib.messages import get_messages
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils.timezone import now

from container_manager.models import ALIVE, ENDED, ContainerJob, DockerHost, JobAttempt, Status
from container_manager.queue import QueueManager
from tests.integration.conftest import logged_in

FOREIGN = "<script>alert(1)</script>"
JOBS, HOSTS = "container_manager_containerjob", "container_manager_dockerhost"
FORM = {
    "name": "", "image": "busybox", "command": "[]", "entrypoint": "[]", "environment": "{}",
    "secret_environment": "{}", "mounts": "[]", "networks": "[]", "labels": "{}", "pull_policy": "missing",
    "priority": "50", "timeout_seconds": "3600", "max_retries": "3", "retry_exit_codes": "[]",
    "attempts-TOTAL_FORMS": "0", "attempts-INITIAL_FORMS": "0",
}  # fmt: skip
HOST_FORM = {"name": "there", "base_url": "unix:///var/run/docker.sock", "max_concurrent_jobs": "1"}


@pytest.fixture
def host(database: str) -> DockerHost:
    return DockerHost.objects.create(name="a")


def staff(*permissions: str) -> Client:
    """Somebody who may see and change jobs and hosts, and has these permissions besides."""
    user = User.objects.create_user("staff", is_staff=True)
    user.user_permissions.set(
        Permission.objects.filter(
            content_type__app_label="container_manager",
            codename__in=[*permissions, "view_containerjob", "change_containerjob", "view_dockerhost"],
        )
    )
    return logged_in(user)


def in_status(status: Status, host: DockerHost | None = None, **fields: Any) -> ContainerJob:
    job = ContainerJob.objects.create_job(image="busybox")
    ContainerJob.objects.filter(pk=job.pk).update(
        status=status, slot_host=host if status in ALIVE else None, **{"scheduled_for": now()} | fields
    )
    job.refresh_from_db()
    return job


def url(page: str, model: str = JOBS, *arguments: object) -> str:
    return reverse(f"admin:{model}_{page}", args=arguments)


def act(client: Client, action: str, *jobs: ContainerJob) -> list[str]:
    """The messages that the action left."""
    response = client.post(url("changelist"), {"action": action, "_selected_action": [job.pk for job in jobs]})
    return [str(message) for message in get_messages(response.wsgi_request)]


def errors(response: Any) -> dict[str, list[str]]:
    assert response.status_code == 200
    return dict(response.context["adminform"].form.errors)


def test_every_page_answers(client: Client, host: DockerHost) -> None:
    rows = [*(in_status(status, host) for status in Status), host]
    JobAttempt.objects.create(job=rows[0], number=1, host=host, host_name="a", reason="lost", stdout="out", stderr="e")

    pages = ["/admin/", f"{url('changelist')}?q=1&status__exact=failed", f"{url('changelist')}?q=no-number"]
    pages += [url("change", row._meta.label_lower.replace(".", "_"), row.pk) for row in rows]
    pages += [url("history", row._meta.label_lower.replace(".", "_"), row.pk) for row in rows]
    for model in admin.site._registry:
        pages += [url(page, model._meta.label_lower.replace(".", "_")) for page in ("changelist", "add")]

    assert {page: code for page in pages if (code := client.get(page).status_code) != 200} == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image", "BusyBox"), ("image", ""), ("command", "echo ["), ("command", '{"a": 1}'), ("command", "[1]"),
        ("environment", '{"CM_A": "b"}'), ("name", "a b"), ("priority", "101"), ("cpu_limit", "0"),
        ("mounts", '[{"type": "bind", "source": "/etc", "target": "/etc"}]'), ("networks", '["host"]'),
    ],
)  # fmt: skip
def test_a_wrong_field_is_told_at_that_field(client: Client, field: str, value: str) -> None:
    response = client.post(url("add"), FORM | {field: value})

    assert list(errors(response)) == [field]
    assert not ContainerJob.objects.exists()


def test_a_good_job_is_saved_pending_with_its_author(client: Client, host: DockerHost) -> None:
    client.post(url("add"), FORM | {"command": '["echo", "a b"]', "pinned_host": host.pk, "cpu_limit": "0.5"})

    job = ContainerJob.objects.get()
    assert (job.status, job.created_by, job.pinned_host, job.attempt) == (Status.PENDING, "root", host, 0)
    assert (job.command, job.cpu_limit, job.memory_limit_mib) == (["echo", "a b"], 0.5, None)


def test_fields_that_are_left_empty_ask_for_nothing(client: Client) -> None:
    lists, objects = ("command", "entrypoint", "mounts", "networks"), ("environment", "secret_environment", "labels")

    response = client.post(url("add"), FORM | dict.fromkeys((*lists, *objects, "retry_exit_codes"), ""))

    assert response.status_code == 302, errors(response)
    assert ContainerJob.objects.values_list(*lists, *objects).get() == ([], [], [], [], {}, {}, {})


def test_a_pending_job_can_be_changed(client: Client) -> None:
    job = in_status(Status.PENDING)

    client.post(url("change", JOBS, job.pk), FORM | {"image": "alpine", "status": "completed", "created_by": "x"})

    job.refresh_from_db()
    assert (job.image, job.status, job.created_by) == ("alpine", Status.PENDING, "")


def test_a_form_that_is_saved_late_moves_no_job(client: Client, rf: Any) -> None:
    job = in_status(Status.PENDING)
    QueueManager().queue_job(ContainerJob.objects.get())

    admin.site.get_model_admin(ContainerJob).save_model(rf.post("/"), job, None, True)

    assert ContainerJob.objects.get().status == Status.QUEUED


@pytest.mark.parametrize("status", [status for status in Status if status != Status.PENDING])
def test_a_settled_job_is_shown_and_not_changed(client: Client, host: DockerHost, status: Status) -> None:
    job = in_status(status, host)

    page = client.get(url("change", JOBS, job.pk))
    code = client.post(url("change", JOBS, job.pk), FORM | {"image": "alpine"}).status_code

    assert (page.status_code, b'name="image"' in page.content, code) == (200, False, 403)
    assert ContainerJob.objects.get().image == "busybox"


def test_jobs_are_queued_and_what_is_refused_is_told(client: Client, host: DockerHost) -> None:
    good, tampered, queued = in_status(Status.PENDING), in_status(Status.PENDING, image="X"), in_status(Status.QUEUED)

    messages = act(client, "queue_jobs", good, tampered, queued)

    assert list(ContainerJob.objects.order_by("pk").values_list("status", flat=True)) == ["queued", "pending", "queued"]
    assert [message.split(":")[0] for message in messages] == [
        f"Job {tampered.pk}",
        f"Job {queued.pk}",
        "1 job queued.",
    ]
    log = LogEntry.objects.get()
    assert (log.object_id, log.get_change_message(), log.user.username) == (str(good.pk), "queued", "root")


def test_jobs_are_cancelled_and_what_is_refused_is_told(client: Client, host: DockerHost) -> None:
    waiting, alive, done = in_status(Status.QUEUED), in_status(Status.RUNNING, host), in_status(Status.COMPLETED)

    messages = act(client, "cancel_jobs", waiting, alive, done)

    alive.refresh_from_db()
    assert (ContainerJob.objects.get(pk=waiting.pk).status, alive.status) == (Status.CANCELLED, Status.RUNNING)
    assert (alive.cancel_requested_at is not None, messages[0].split(":")[0]) == (True, f"Job {done.pk}")
    assert set(LogEntry.objects.values_list("object_id", flat=True)) == {str(waiting.pk), str(alive.pk)}


def test_a_running_job_is_not_called_cancelled_before_it_is(client: Client, host: DockerHost) -> None:
    [message] = act(client, "cancel_jobs", in_status(Status.RUNNING, host))

    assert message != "1 job cancelled."


def test_jobs_are_run_anew_and_what_is_refused_is_told(client: Client, host: DockerHost) -> None:
    failed, alive = in_status(Status.FAILED), in_status(Status.RUNNING, host)

    messages = act(client, "retry_jobs", failed, alive)

    assert list(ContainerJob.objects.order_by("pk").values_list("status", flat=True)) == ["queued", "running"]
    assert [message.split(":")[0] for message in messages] == [f"Job {alive.pk}", "1 job queued again."]
    assert LogEntry.objects.get().get_change_message() == "queued again"


def test_jobs_that_wait_are_taken_back_and_can_be_changed(client: Client, host: DockerHost) -> None:
    waiting, alive = in_status(Status.QUEUED), in_status(Status.RUNNING, host)

    messages = act(client, "dequeue_jobs", waiting, alive)

    assert [message.split(":")[0] for message in messages] == [f"Job {alive.pk}", "1 job taken back."]
    assert b'name="image"' in client.get(url("change", JOBS, waiting.pk)).content


@pytest.mark.parametrize(
    ("action", "verb"),
    [("queue_jobs", "launch"), ("dequeue_jobs", "launch"), ("retry_jobs", "launch"), ("cancel_jobs", "cancel")],
)
@pytest.mark.parametrize("may", [False, True])
def test_an_action_needs_its_permission(client: Client, action: str, verb: str, may: bool) -> None:
    job = in_status({"retry_jobs": Status.FAILED, "dequeue_jobs": Status.QUEUED}.get(action, Status.PENDING))
    # Without the one, the other one does not help.
    granted = verb if may else {"launch": "cancel", "cancel": "launch"}[verb]
    person = staff(f"{granted}_containerjob")

    offered = action in person.get(url("changelist")).content.decode()
    act(person, action, job)

    assert (offered, ContainerJob.objects.get().status != job.status) == (may, may)


@pytest.mark.parametrize("status", Status)
def test_only_a_job_that_is_not_alive_can_be_deleted(client: Client, host: DockerHost, status: Status) -> None:
    job = in_status(status, host)

    code = client.post(url("delete", JOBS, job.pk), {"post": "yes"}).status_code
    client.post(url("changelist"), {"action": "delete_selected", "_selected_action": [job.pk], "post": "yes"})

    assert (code, ContainerJob.objects.count()) == ((403, 1) if status in ALIVE else (302, 0))


@pytest.mark.parametrize("status", Status)
def test_a_host_goes_only_when_no_job_needs_it_and_history_stays(
    client: Client, host: DockerHost, status: Status
) -> None:
    job = in_status(status, host, pinned_host=host)
    JobAttempt.objects.create(job=job, number=1, host=host, host_name="a", reason="lost", stdout="out")

    client.post(url("delete", HOSTS, host.pk), {"post": "yes"})

    assert DockerHost.objects.exists() == (status not in ENDED)
    assert JobAttempt.objects.values_list("host_name", "stdout", "job__status").get() == ("a", "out", status)


def test_foreign_text_is_shown_and_not_run(client: Client, host: DockerHost) -> None:
    foreign = {"name": FOREIGN, "image": FOREIGN, "last_error": FOREIGN, "command": [FOREIGN], "created_by": FOREIGN}
    job = in_status(Status.FAILED, **foreign)
    JobAttempt.objects.create(
        job=job, number=1, host=host, host_name=FOREIGN, reason="lost", stdout=FOREIGN, stderr=FOREIGN, error=FOREIGN
    )
    DockerHost.objects.update(last_error=FOREIGN)
    pages = (url("changelist"), url("change", JOBS, job.pk), url("delete", JOBS, job.pk), url("changelist", HOSTS))

    texts = [client.get(page).content.decode() for page in pages]

    assert [FOREIGN in text for text in texts] == [False] * 4
    assert [unescape(text).count(FOREIGN) > 0 for text in texts] == [True] * 4


@pytest.mark.parametrize(("days", "told"), [(13, False), (15, True)])
def test_where_an_old_log_is_empty_it_is_told_that_it_may_have_been_purged(
    client: Client, days: int, told: bool
) -> None:
    job = in_status(Status.COMPLETED)
    attempt = JobAttempt.objects.create(job=job, number=1, host_name="a", stdout="out")
    JobAttempt.objects.filter(pk=attempt.pk).update(ended_at=now() - timedelta(days=days))

    page = client.get(url("change", JOBS, job.pk)).content.decode()

    assert page.count("nothing, or purged: logs are kept for 14 days (KEEP_LOGS_DAYS)") == told


@pytest.mark.parametrize(
    ("pages", "flow_run_id", "shown"),
    [
        ("https://prefect.example/v2/", "1-2", '<a href="https://prefect.example/v2/runs/flow-run/1-2">1-2</a>'),
        ("", "1-2", "1-2"),
        ("https://prefect.example", None, "-"),
    ],
)
def test_a_job_leads_to_the_flow_run_that_waits_for_it(
    client: Client, settings: Any, pages: str, flow_run_id: str | None, shown: str
) -> None:
    settings.CONTAINER_MANAGER = {"PREFECT_UI_URL": pages}
    job = in_status(Status.RUNNING, DockerHost.objects.create(name="a"), flow_run_id=flow_run_id)

    page = client.get(url("change", JOBS, job.pk)).content.decode()

    assert f'<div class="readonly">{shown}</div>' in page.split("field-flow_run")[1].split("field-created_by")[0]


@pytest.mark.parametrize("page", [JOBS, HOSTS])
def test_a_list_asks_as_much_for_many_rows_as_for_few_and_for_no_logs(client: Client, page: str) -> None:
    def asked(count: int) -> list[str]:
        for number in range(count):
            host = DockerHost.objects.create(name=f"h{number}-{count}")
            job = in_status(Status.FAILED, pinned_host=host)
            JobAttempt.objects.create(job=job, number=1, host=host, host_name="a", reason="lost", stdout="out")
        with CaptureQueriesContext(connection) as queries:
            assert client.get(url("changelist", page)).status_code == 200
        return [query["sql"] for query in queries]

    few, many = asked(2), asked(20)

    assert len(few) == len(many)
    assert not [sql for sql in many if re.search("stdout|stderr", sql)]


def test_what_waits_says_for_what_in_the_list_and_on_its_page(client: Client, host: DockerHost) -> None:
    DockerHost.objects.update(last_seen_at=now(), max_concurrent_jobs=0)
    job = in_status(Status.QUEUED, queued_at=now())

    shown, page = (
        unescape(client.get(page).content.decode()) for page in (url("changelist"), url("change", JOBS, job.pk))
    )

    assert "waits for a slot: limit reached: max_concurrent_jobs of host a, 0 of 0" in shown
    assert "first in line; waits for a slot: limit reached: max_concurrent_jobs of host a, 0 of 0" in page


def test_a_reason_of_any_length_is_cut_in_the_list(client: Client, host: DockerHost) -> None:
    in_status(Status.QUEUED, queued_at=now(), last_error="e" * 1000)
    in_status(Status.FAILED, last_error="f" * 1000)

    shown = client.get(url("changelist")).content.decode()

    assert "the last try: eee" in shown
    assert ("e" * 150 in shown, "f" * 150 in shown, "f" * 151 in shown) == (False, True, False)


def test_a_list_looks_at_the_queue_once_for_all_that_wait_and_not_at_all_for_those_that_do_not(client: Client) -> None:
    def asked() -> int:
        with CaptureQueriesContext(connection) as queries:
            client.get(url("changelist"))
        return len(queries)

    in_status(Status.COMPLETED)
    none = asked()
    in_status(Status.QUEUED)
    one = asked()
    for status in (Status.PENDING, Status.QUEUED, Status.SCHEDULED) * 5:
        in_status(status)

    assert (one - none, asked()) == (3, one)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"base_url": "tcp://10.0.0.1:2376"}, {"tls_ca_path", "tls_cert_path", "tls_key_path"}),
        ({"base_url": "tcp://10.0.0.1:2376", "tls_ca_path": "/a", "tls_cert_path": "/b"}, {"tls_key_path"}),
        ({"base_url": "http://10.0.0.1"}, {"base_url"}),
        ({"name": "a b"}, {"name"}),
    ],
)
def test_a_host_that_is_not_safe_is_refused_at_its_field(
    client: Client, fields: dict[str, str], wrong: set[str]
) -> None:
    found = errors(client.post(url("add", HOSTS), HOST_FORM | fields))

    assert (set(found), DockerHost.objects.count()) == (wrong, 0)


def test_a_good_host_is_saved(client: Client) -> None:
    tls = {"base_url": "tcp://10.0.0.1:2376"} | {f"tls_{part}_path": f"/{part}" for part in ("ca", "cert", "key")}

    client.post(url("add", HOSTS), HOST_FORM | tls)

    assert DockerHost.objects.values_list("name", "base_url").get() == ("there", "tcp://10.0.0.1:2376")
