"""What a user of Prefect does with containers there, as the README tells it, in a browser."""

import re
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID
from zoneinfo import ZoneInfo

import docker
import pytest
from docker.models.containers import Container
from playwright.sync_api import expect
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType

from container_manager.models import ContainerJob, Status
from container_manager.queue import queue_manager
from container_manager.types import RunSpec
from tests.acceptance.conftest import Site
from tests.conftest import wait_until

from .conftest import PATIENCE_SECONDS, Keep, log_in
from .prefect_pages import PrefectPages

FLOWS = ("process-queue", "process-jobs", "run-container-job", "purge")


def has_ended(job: ContainerJob) -> bool:
    job.refresh_from_db()
    return job.finished_at is not None


def container_of(name: str, engine: docker.DockerClient) -> Container:
    return engine.containers.get(str(ContainerJob.objects.get(name=name).container_id))


def begun(api: SyncPrefectClient, **spec: object) -> UUID:
    """A flow run of `run-container-job`, for what is not about its form."""
    deployment = api.read_deployment_by_name("run-container-job/on-demand")
    return api.create_flow_run_from_deployment(deployment.id, parameters={"spec": {"image": "busybox"} | spec}).id


def test_the_deployments_are_all_there_and_say_when_they_run(prefect_pages: PrefectPages, keep: Keep) -> None:
    prefect_pages.open()
    prefect_pages.page.get_by_role("link", name="Deployments").click()

    for flow in FLOWS:
        expect(prefect_pages.row(flow)).to_contain_text("Ready")
    expect(prefect_pages.row("purge")).to_contain_text("Every 1 day")


def test_a_container_is_run_by_the_form_and_watched_in_the_log(
    prefect_pages: PrefectPages, keep: Keep, engine: docker.DockerClient
) -> None:
    until_told = "echo out; echo oops >&2; until [ -e /told ]; do sleep 0.1; done; exit 3"
    prefect_pages.run("busybox", "sh", "-c", until_told, name="watched")

    expect(prefect_pages.log_line("out")).to_contain_text("INFO")
    expect(prefect_pages.log_line("oops")).to_contain_text("WARNING")
    keep("a run while its container runs")
    container_of("watched", engine).exec_run(["touch", "/told"])
    prefect_pages.expect_state("Failed")
    message = prefect_pages.expect_message("exited with code 3")
    assert "the end of stderr: oops" in " ".join(message.split())


def test_a_run_that_is_cancelled_stops_its_container(
    prefect_pages: PrefectPages, keep: Keep, engine: docker.DockerClient, api: SyncPrefectClient
) -> None:
    prefect_pages.open_run(begun(api, name="endless", command=["sleep", "1000"]))
    expect(prefect_pages.log).to_contain_text("is running on host local")
    container = container_of("endless", engine)

    prefect_pages.cancel_run()
    prefect_pages.expect_state("Cancelled")

    job = ContainerJob.objects.get(name="endless")
    assert (job.status, job.reason) == (Status.CANCELLED, "cancelled")
    assert container not in engine.containers.list()


def test_the_form_has_the_spec_in_its_order_with_its_defaults(prefect_pages: PrefectPages, keep: Keep) -> None:
    titles = [field["title"] for field in RunSpec.model_json_schema()["properties"].values()]

    prefect_pages.open_run_form("run-container-job")
    expect(prefect_pages.field("Image")).to_be_visible()
    labels = prefect_pages.main.locator("label").all_inner_texts()

    assert [
        label.removesuffix(" (Optional)") for label in labels if label.removesuffix(" (Optional)") in titles
    ] == titles
    assert [label for label in labels if label in titles] == ["Image"]
    expect(prefect_pages.field("Priority").get_by_role("spinbutton")).to_have_value("50")


def test_what_is_wrong_with_a_spec_is_told_in_a_line(prefect_pages: PrefectPages, keep: Keep) -> None:
    prefect_pages.open_run_form("run-container-job")
    prefect_pages.fill("Image", "Busy Box")
    prefect_pages.fill("Priority", "500")
    prefect_pages.main.get_by_role("button", name="Submit").click()
    told = prefect_pages.field("Priority").get_by_role("spinbutton").evaluate("field => field.validationMessage")
    prefect_pages.fill("Priority", "50")
    prefect_pages.submit()
    prefect_pages.expect_state("Failed")
    message = prefect_pages.expect_message("the job is refused")
    name = prefect_pages.main.get_by_text("Busy Box, ").inner_text()
    prefect_pages.open_runs("Failed")

    assert told == "Value must be less than or equal to 100."
    assert message == (
        "the job is refused: image: must be an image reference such as `busybox`, `registry.example/team/tool:1.2`"
    )
    expect(prefect_pages.listed(name)).to_be_visible()


def test_the_limit_that_is_set_holds_from_the_next_pass_and_the_table_of_the_queue_names_it(
    prefect_pages: PrefectPages, keep: Keep, sleepers: Callable[[int], None], api: SyncPrefectClient
) -> None:
    binds = "limit reached: tag container-job, 1 of 1"
    prefect_pages.set_limit("container-job", 1)
    sleepers(3)
    wait_until(lambda: [table for table in api.read_artifacts() if binds in str(table.data)], PATIENCE_SECONDS)
    alone = ContainerJob.objects.alive().count()

    prefect_pages.open("artifacts/key/container-queue")
    expect(prefect_pages.main).to_contain_text(binds)
    prefect_pages.main.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).first.click()
    expect(prefect_pages.row("what keeps more from starting")).to_contain_text(binds)
    keep("the table of the queue")
    prefect_pages.set_limit("container-job", 2)
    wait_until(lambda: ContainerJob.objects.running().count() == 2, PATIENCE_SECONDS)

    assert (alone, ContainerJob.objects.alive().count()) == (1, 2)


@pytest.fixture
def sleepers(site: Site, prefect_pages: PrefectPages) -> Iterator[Callable[[int], None]]:
    """Jobs that do not end by themselves. Afterwards they and what the limit was made have gone."""
    jobs: list[ContainerJob] = []
    yield lambda count: jobs.extend(site.queue("sleep", "1000") for _ in range(count))
    for job in jobs:
        queue_manager.cancel_job(job)
    prefect_pages.set_limit("container-job", 10)
    wait_until(lambda: not ContainerJob.objects.alive().exists(), PATIENCE_SECONDS)


def test_a_schedule_that_is_paused_begins_no_pass_until_it_is_resumed(
    prefect_pages: PrefectPages, keep: Keep, site: Site, api: SyncPrefectClient
) -> None:
    prefect_pages.open_deployment("process-queue")
    prefect_pages.switch_schedule(on=False)
    ahead = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING)
    wait_until(lambda: not passes(api, *ahead), PATIENCE_SECONDS)
    job = site.queue("true")
    prefect_pages.main.get_by_role("tab", name="Upcoming").click()
    expect(prefect_pages.main.get_by_role("tabpanel")).to_contain_text("No runs found")
    keep("a schedule that is paused")
    waits = not has_ended(job)

    prefect_pages.switch_schedule(on=True)
    wait_until(lambda: has_ended(job), PATIENCE_SECONDS)

    assert waits


def passes(api: SyncPrefectClient, *types: StateType) -> list[FlowRun]:
    states = FlowRunFilterStateType(any_=list(types))
    runs = api.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=states)))
    queue = api.read_deployment_by_name("process-queue/scheduled").id
    return [run for run in runs if run.deployment_id == queue]


def test_a_nightly_container_is_scheduled_by_the_form_with_a_spec_of_its_own(
    prefect_pages: PrefectPages, keep: Keep, api: SyncPrefectClient
) -> None:
    # The next full minute that is not too near: crons know no seconds.
    slot = (datetime.now(UTC) + timedelta(seconds=80)).replace(second=0, microsecond=0)
    cron = f"{slot.astimezone(ZoneInfo('Europe/Berlin')):%M %H} * * *"

    prefect_pages.schedule(cron, "Europe/Berlin", "busybox", "echo", "at night", name="nightly-report")

    keep("a schedule of a person's own")
    deployment = api.read_deployment_by_name("run-container-job/on-demand")
    (schedule,) = deployment.schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone) == (cron, "Europe/Berlin")
    prefect_pages.open_run(wait_until(lambda: run_at(api, deployment.id, slot), 2 * PATIENCE_SECONDS))
    expect(prefect_pages.log_line("at night")).to_be_visible()
    prefect_pages.expect_state("Completed")
    api.delete_deployment_schedule(deployment.id, schedule.id)
    job = ContainerJob.objects.get(name="nightly-report")
    assert (job.image, job.command, job.status) == ("busybox", ["echo", "at night"], Status.COMPLETED)


def run_at(api: SyncPrefectClient, deployment_id: UUID, slot: datetime) -> UUID | None:
    """The run of this slot, once it has ended. A pass may be due at the same time."""
    of_slot = [
        run for run in api.read_flow_runs() if (run.deployment_id, run.expected_start_time) == (deployment_id, slot)
    ]
    return next((run.id for run in of_slot if run.end_time), None)


def test_runs_have_names_for_people_and_idle_passes_are_told_apart(
    prefect_pages: PrefectPages, keep: Keep, site: Site, api: SyncPrefectClient
) -> None:
    job = site.queue("true", name="seen")
    wait_until(lambda: has_ended(job), PATIENCE_SECONDS)
    wait_until(lambda: {"Idle", "Completed"} <= {run.state_name for run in passes(api, StateType.COMPLETED)})

    prefect_pages.open_runs()
    expect(prefect_pages.listed("process-queue", "pass 20", "Idle").first).to_be_visible()
    expect(prefect_pages.listed("process-queue", "pass 20", "Completed").first).to_be_visible()
    keep("all runs")
    prefect_pages.open_runs("Completed")
    expect(prefect_pages.listed("pass 20", "Completed").first).to_be_visible()
    expect(prefect_pages.listed("Idle")).to_have_count(0)


def test_a_run_leads_to_its_job_and_the_job_back_to_its_run(
    prefect_pages: PrefectPages, keep: Keep, api: SyncPrefectClient
) -> None:
    run_id = begun(api, name="linked")
    wait_until(lambda: api.read_flow_run(run_id).state.is_completed(), PATIENCE_SECONDS)
    prefect_pages.open_run(run_id)
    with prefect_pages.page.expect_popup() as popup:
        prefect_pages.log.get_by_role("link").click()
    log_in(popup.value)

    expect(popup.value.get_by_role("heading", name="linked")).to_be_visible()
    popup.value.get_by_role("link", name=str(run_id)).click()

    expect(popup.value.get_by_role("main").get_by_text("linked, ").first).to_be_visible()
    prefect_pages.main.get_by_role("tab", name="Artifacts").click()
    expect(prefect_pages.main.get_by_role("tabpanel")).to_contain_text("The pages of its jobs")


def test_a_flow_whose_steps_are_containers_shows_each_of_them(
    prefect_pages: PrefectPages, keep: Keep, site: Site
) -> None:
    example = site.start(program=[sys.executable, "-m", "deployments.demo.three_steps"])
    assert (example.end(PATIENCE_SECONDS), example.lines[-1]) == (0, "14")

    prefect_pages.open_runs()
    prefect_pages.open_listed("three-steps")
    prefect_pages.main.get_by_role("tab", name="Task Runs").click()
    expect(prefect_pages.listed("container-job")).to_have_count(3)
    keep("a flow of three steps")
    prefect_pages.main.get_by_role("tab", name="Subflow Runs").click()
    for step in ("count, ", "add, "):
        expect(prefect_pages.listed(step, "Completed")).to_be_visible()
