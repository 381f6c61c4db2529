"""What people do with jobs on the site's own pages, in a browser."""

import pytest
from django.contrib.auth.models import Permission
from playwright.sync_api import Page, expect

from container_manager.models import ContainerJob, Status
from container_manager.queue import queue_manager
from tests.acceptance.conftest import Site
from tests.conftest import wait_until

from .conftest import Keep, log_in, make_user

JOBS = "/admin/container_manager/containerjob/"
FOREIGN = "<b>bold</b><script>document.title = 'taken over'</script>"


@pytest.fixture
def admin(page: Page) -> Page:
    page.goto("/")
    if page.get_by_label("Password").is_visible():
        log_in(page)
    return page


def open_jobs(page: Page) -> None:
    page.goto(JOBS)


def open_job(page: Page, job: ContainerJob) -> None:
    open_jobs(page)
    page.get_by_role("link", name=str(job.pk), exact=True).click()


def act(page: Page, name: str, action: str) -> None:
    page.get_by_role("row").filter(has_text=name).get_by_role("checkbox").check()
    page.get_by_label("Action:").select_option(action)
    page.get_by_role("button", name="Go", exact=True).click()


def ran(site: Site, script: str, **fields: object) -> ContainerJob:
    """A job that has ended, by passes of this process."""
    job = site.queue("sh", "-c", script, **fields)

    def has_ended() -> bool:
        queue_manager.process_queue_continuous(5, 1, work_seconds=2)
        job.refresh_from_db()
        return job.finished_at is not None

    wait_until(has_ended)
    return job


def test_a_job_is_added_by_the_form_and_queued_by_the_action(admin: Page, keep: Keep) -> None:
    open_jobs(admin)
    admin.get_by_role("link", name="Add container job").click()
    # The page moves the focus there once it is loaded: whatever is typed meanwhile goes there, too.
    expect(admin.get_by_label("Name:")).to_be_focused()
    admin.get_by_label("Name:").fill("by-hand")
    admin.get_by_label("Image:").fill("busybox")
    admin.get_by_label("Command:").fill('["echo", "hello"')
    admin.get_by_role("button", name="Save", exact=True).click()
    expect(admin.get_by_text("Please correct the error below.")).to_be_visible()
    keep("a command that is no list")
    admin.get_by_label("Command:").fill('["echo", "hello"]')
    admin.get_by_role("button", name="Save", exact=True).click()

    act(admin, "by-hand", "Queue selected pending jobs")

    expect(admin.get_by_text("1 job queued.")).to_be_visible()
    job = ContainerJob.objects.get(name="by-hand")
    assert (job.status, job.command, job.created_by) == (Status.QUEUED, ["echo", "hello"], "admin")


def test_a_job_that_waits_says_for_what(admin: Page, keep: Keep, site: Site) -> None:
    job = site.queue("true", name="not-here", image="no.example/nothing:1")
    queue_manager.launch_next_batch(5)

    open_jobs(admin)

    job.refresh_from_db()
    assert job.status == Status.SCHEDULED
    expect(admin.get_by_role("row").filter(has_text="not-here")).to_contain_text(job.last_error[:100])


def test_what_a_job_wrote_is_shown_as_it_is_and_can_be_downloaded(admin: Page, keep: Keep, site: Site) -> None:
    job = ran(site, f'echo "{FOREIGN}"; exit 3', name="writes")

    open_job(admin, job)

    expect(admin.get_by_text(FOREIGN, exact=True)).to_be_visible()
    assert "taken over" not in admin.title()
    with admin.expect_download() as download:
        admin.get_by_role("link", name="download").click()
    assert download.value.suggested_filename == f"job-{job.pk}-1-stdout.txt"
    assert download.value.path().read_text() == FOREIGN + "\n"


def test_a_running_job_is_cancelled_by_the_action_and_stopped_by_the_next_pass(
    admin: Page, keep: Keep, site: Site
) -> None:
    job = site.queue("sleep", "1000", name="stopped")
    queue_manager.launch_next_batch(5)
    open_jobs(admin)

    act(admin, "stopped", "Cancel selected jobs")

    expect(admin.get_by_text("1 job told to stop, by the next pass.")).to_be_visible()
    queue_manager.process_queue_continuous(5, 1, work_seconds=20)
    open_job(admin, job)
    expect(admin.locator(".field-status")).to_contain_text("cancelled", ignore_case=True)


def test_who_may_only_look_has_nothing_to_act_with(page: Page, keep: Keep, site: Site) -> None:
    job = site.queue("true", name="seen-only")
    make_user("viewer").user_permissions.set(Permission.objects.filter(codename="view_containerjob"))
    page.context.clear_cookies()
    page.goto("/")
    log_in(page, "viewer")

    open_jobs(page)

    expect(page.get_by_role("row").filter(has_text="seen-only")).to_be_visible()
    expect(page.get_by_label("Action:")).to_have_count(0)
    expect(page.get_by_role("link", name="Add container job")).to_have_count(0)
    open_job(page, job)
    expect(page.get_by_role("button", name="Save")).to_have_count(0)
