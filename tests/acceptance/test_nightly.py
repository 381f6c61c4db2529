"""The recipe of docs/nightly.md: a container every night, by a schedule that a person has added in Prefect's CLI."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule

from container_manager.conf import Settings
from container_manager.models import ContainerJob, Status
from tests.conftest import ROOT, wait_until
from tests.integration.prefect_side import apply_as_before

from .conftest import Running, Site

NAME = "run-container-job/on-demand"
ZONE = ZoneInfo("Europe/Berlin")
RESTARTS = 10
#: seconds; for how long a run is waited for that must not come.
QUIET_SECONDS = 8
#: seconds; for a run that must come, on a machine that has other things to do.
PATIENCE_SECONDS = 180
NIGHTLY = "30 2 * * *"


@pytest.fixture
def nightly_site(site_with_api: Site, api: SyncPrefectClient) -> Iterator[Site]:
    """Afterwards the server has none of its deployments any more."""
    # Its passes come seldom, and end soon when they are told to.
    settings = {"POLL_INTERVAL_SECONDS": 60, "WORK_SECONDS": 0}
    site_with_api.env |= {"CONTAINER_MANAGER": json.dumps(settings), "PYTHONPATH": str(ROOT)}
    remove_deployments(api)
    yield site_with_api
    for running in site_with_api.started:
        running.process.kill()
    remove_deployments(api)


def remove_deployments(api: SyncPrefectClient) -> None:
    """Those that another test of this server has left would be another installation's."""
    for deployment in api.read_deployments():
        api.delete_deployment(deployment.id)


def serve(site: Site) -> Running:
    served = site.start(program=[sys.executable, "-m", "deployments"])
    served.wait_for("serving purge/daily", 90)
    return served


def end(served: Running) -> None:
    served.send(signal.SIGTERM)
    assert served.end(90) == 0, served.errors


def prefect(site: Site, *arguments: str) -> Any:
    """What Prefect's CLI answers."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        env=site.env, cwd=site.folder, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def add_schedules(site: Site, *crons: str) -> None:
    """As docs/nightly.md has it."""
    deployment_id = prefect(site, "api", "GET", f"/deployments/name/{NAME}")["id"]
    schedules = [
        {
            "schedule": {"cron": cron, "timezone": "Europe/Berlin"},
            "parameters": {"spec": {"image": "busybox", "command": ["echo", cron], "name": "nightly-report"}},
        }
        for cron in crons
    ]
    prefect(site, "api", "POST", f"/deployments/{deployment_id}/schedules", "--data", json.dumps(schedules))


def deployment(api: SyncPrefectClient) -> DeploymentResponse:
    return api.read_deployment_by_name(NAME)


def seen(api: SyncPrefectClient) -> list[tuple[UUID, Any, bool, dict[str, Any]]]:
    """The schedules."""
    return sorted(
        (schedule.id, schedule.schedule, schedule.active, schedule.parameters)
        for schedule in deployment(api).schedules
    )  # fmt: skip


def runs(api: SyncPrefectClient) -> list[FlowRun]:
    """Those that have begun, by their slots."""
    begun = [run for run in runs_of(api, deployment(api).id) if run.start_time]
    return sorted(begun, key=lambda run: str(run.expected_start_time))


def runs_of(api: SyncPrefectClient, deployment_id: UUID) -> list[FlowRun]:
    chosen = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]))
    return api.read_flow_runs(flow_run_filter=chosen, limit=200)


def has_run(api: SyncPrefectClient, slot: datetime) -> bool:
    return any(run.expected_start_time == slot and run.state and run.state.is_final() for run in runs(api))


def make_slots(api: SyncPrefectClient, deployment_id: UUID, since: datetime, until: datetime) -> None:
    """As the server's own scheduler does, which looks once a minute, but at once and for times of our choice."""
    asked = {"start_time": since.isoformat(), "end_time": until.isoformat(), "min_runs": 0, "max_runs": 200}
    api.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment_id}, json=asked)


def next_slot(seconds: float) -> datetime:
    """The next full minute that is at least so far away: crons know no seconds."""
    ahead = datetime.now(UTC) + timedelta(seconds=seconds + 60)
    return ahead.replace(second=0, microsecond=0)


def cron_at(slot: datetime) -> str:
    return f"{slot.astimezone(ZONE):%M %H} * * *"


def sleep_until(moment: datetime) -> None:
    time.sleep(max(0.0, (moment - datetime.now(UTC)).total_seconds()))


@pytest.mark.timeout(900)
def test_a_nightly_container_survives_ten_restarts_and_runs_once_and_late_after_a_downtime(
    nightly_site: Site, api: SyncPrefectClient
) -> None:
    served = serve(nightly_site)
    add_schedules(nightly_site, NIGHTLY)
    scheduled = seen(api)
    for _ in range(RESTARTS):
        end(served)
        served = serve(nightly_site)
    survived = seen(api)

    add_schedules(nightly_site, cron_at(slot := next_slot(20)))
    # A night's run is made days ahead.
    make_slots(api, deployment(api).id, slot - timedelta(seconds=30), slot + timedelta(seconds=30))
    end(served)
    sleep_until(slot + timedelta(seconds=5))
    while_down = runs(api)
    served = serve(nightly_site)
    wait_until(lambda: has_run(api, slot), PATIENCE_SECONDS)
    end(served)
    served = serve(nightly_site)
    time.sleep(QUIET_SECONDS)
    end(served)

    assert survived == scheduled
    assert while_down == []
    (run,) = runs(api)
    (job,) = ContainerJob.objects.all()
    assert (run.expected_start_time, run.state_name, str(run.id)) == (slot, "Completed", job.flow_run_id)
    assert run.start_time is not None
    assert run.start_time > slot + timedelta(seconds=5)
    assert (job.name, job.command, job.status) == ("nightly-report", ["echo", cron_at(slot)], Status.COMPLETED)


@pytest.mark.timeout(400)
def test_a_nightly_container_survives_the_upgrade_and_the_slot_that_passed_meanwhile_runs_once(
    nightly_site: Site, api: SyncPrefectClient
) -> None:
    # What `python -m deployments` sent at each start up to the version before this one.
    apply_as_before(Settings(POLL_INTERVAL_SECONDS=60, WORK_SECONDS=0))
    known = deployment(api)
    missed = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=2)
    add_schedules(nightly_site, NIGHTLY, cron_at(missed))
    make_slots(api, known.id, missed, missed + timedelta(seconds=30))
    scheduled = [entry[1:] for entry in seen(api)]

    served = serve(nightly_site)
    wait_until(lambda: has_run(api, missed), PATIENCE_SECONDS)
    end(served)
    served = serve(nightly_site)
    time.sleep(QUIET_SECONDS)
    end(served)

    assert deployment(api).id == known.id
    assert sorted(map(str, (entry[1:] for entry in seen(api)))) == sorted(map(str, scheduled))
    assert [run.expected_start_time for run in runs(api)] == [missed]
    assert [job.command for job in ContainerJob.objects.all()] == [["echo", cron_at(missed)]]


@pytest.mark.parametrize(
    ("night", "slot"),
    [
        # What the clocks of Berlin show, and the offset from UTC then.
        ("a night like any other", "2027-01-15 02:30 +0100"),
        ("half past two does not come", "2027-03-28 01:30 +0100"),
        ("half past two comes twice", "2027-10-31 02:30 +0200"),
    ],
)
def test_prefect_makes_one_slot_each_night(api: SyncPrefectClient, night: str, slot: str) -> None:
    noon = datetime.fromisoformat(slot[:10]).replace(hour=12, tzinfo=ZONE)
    schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron=NIGHTLY, timezone="Europe/Berlin"))
    made = api.create_deployment(api.create_flow_from_name("nightly"), night, schedules=[schedule])

    make_slots(api, made, noon - timedelta(hours=24), noon)

    times = [run.expected_start_time for run in runs_of(api, made)]
    api.delete_deployment(made)
    assert [f"{at.astimezone(ZONE):%Y-%m-%d %H:%M %z}" for at in times if at] == [slot]
