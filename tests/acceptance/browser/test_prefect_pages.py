"""What a user of Prefect does with containers there, as the README tells it, in a browser."""

import docker
from docker.models.containers import Container
from playwright.sync_api import expect

from container_manager.models import ContainerJob, Status

from .conftest import Keep
from .prefect_pages import PrefectPages

FLOWS = ("process-queue", "process-jobs", "run-container-job", "purge")


def container_of(name: str, engine: docker.DockerClient) -> Container:
    return engine.containers.get(str(ContainerJob.objects.get(name=name).container_id))


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
    prefect_pages: PrefectPages, keep: Keep, engine: docker.DockerClient
) -> None:
    prefect_pages.run("busybox", "sleep", "1000", name="endless")
    expect(prefect_pages.log).to_contain_text("is running on host local")
    container = container_of("endless", engine)

    prefect_pages.cancel_run()
    prefect_pages.expect_state("Cancelled")

    job = ContainerJob.objects.get(name="endless")
    assert (job.status, job.reason) == (Status.CANCELLED, "cancelled")
    assert container not in engine.containers.list()
