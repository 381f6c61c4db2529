"""Flow runs that nothing picks up, or late; each test a sentence of the command's contract."""

import signal

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.states import Completed, Pending
from prefect.states import Running as Began

from container_manager.models import Status
from tests.conftest import wait_until

from .conftest import Site
from .deployed import deployed, runs_of, the_run, using

ONCE = ("--queue-mode", "--once")
BY_DEPLOYMENT = (*ONCE, "--via=deployment")


@pytest.mark.parametrize(
    ("pool", "how"), [(None, "`python -m deployments`"), ("yard", "`prefect worker start --pool yard`")]
)
def test_what_nothing_picks_up_is_cancelled_and_the_error_says_how_to_start_a_worker(
    site_with_api: Site, api: SyncPrefectClient, pool: str | None, how: str
) -> None:
    if pool:
        api.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    name = deployed(api, f"unattended-{pool}", work_pool_name=pool)
    done = site_with_api.run(*BY_DEPLOYMENT, **using(name))

    assert done.returncode == 1
    assert done.stderr == (
        f"CommandError: Command failed: no worker picked up the flow run of {name} within 2 s, so it was cancelled; "
        f"start one with {how}\n"
    )
    assert [run.state_type for run in runs_of(api, name)] == ["CANCELLED"]


def test_a_run_that_is_still_pending_is_cancelled_and_one_that_runs_is_not(
    site_with_api: Site, api: SyncPrefectClient
) -> None:
    prompt, sluggish = deployed(api, "prompt"), deployed(api, "sluggish")
    patient = site_with_api.start(*BY_DEPLOYMENT, **using(prompt, PICKUP_SECONDS=6))
    running = the_run(api, prompt)
    # What a worker says when it has begun a run, and when it has taken one.
    api.set_flow_run_state(running.id, Began(), force=True)
    impatient = site_with_api.start(*BY_DEPLOYMENT, **using(sluggish, PICKUP_SECONDS=6))
    pending = the_run(api, sluggish)
    api.set_flow_run_state(pending.id, Pending())

    assert impatient.end() == 1
    assert api.read_flow_run(pending.id).state_type == "CANCELLED"
    assert api.read_flow_run(running.id).state_type == "RUNNING"
    api.set_flow_run_state(running.id, Completed(message="{}"), force=True)
    assert patient.end() == 0
    assert patient.lines[-1] == "Processed queue: launched 0 jobs"


def test_after_a_signal_a_run_that_nothing_has_picked_up_is_cancelled_with_exit_code_0(
    site_with_api: Site, api: SyncPrefectClient
) -> None:
    name = deployed(api, "abandoned")
    command = site_with_api.start("--queue-mode", "--via=deployment", **using(name, PICKUP_SECONDS=60))
    run = the_run(api, name)
    command.send(signal.SIGTERM)

    assert command.end(10) == 0
    assert command.lines[-2:] == [
        "Received SIGTERM, shutting down gracefully...",
        "Queue processor finished. Processed 0 iterations, launched 0 jobs",
    ]
    assert [(one.id, one.state_type) for one in runs_of(api, name)] == [(run.id, "CANCELLED")]


def test_auto_runs_inline_what_nobody_has_polled_lately(site_with_api: Site, api: SyncPrefectClient) -> None:
    name = deployed(api, "unpolled")
    done = site_with_api.run(*ONCE, **using(name))

    assert done.returncode == 0
    assert f"Runs: inline (no worker has asked for flow runs of {name} lately; " in done.stdout
    assert runs_of(api, name) == []


def test_auto_runs_inline_with_one_warning_what_is_not_picked_up(site_with_api: Site, api: SyncPrefectClient) -> None:
    name = deployed(api, "polled")
    api.request(
        "POST",
        "/deployments/get_scheduled_flow_runs",
        json={"deployment_ids": [str(api.read_deployment_by_name(name).id)]},
    )
    wait_until(lambda: api.read_deployment_by_name(name).last_polled)
    job = site_with_api.queue("true")
    done = site_with_api.run(*ONCE, **using(name))

    assert done.returncode == 0
    assert done.stderr.startswith("Warning: no worker picked up the flow run")
    assert done.stderr.count("\n") == 1
    assert [run.state_type for run in runs_of(api, name)] == ["CANCELLED"]
    job.refresh_from_db()
    assert job.status == Status.RUNNING
