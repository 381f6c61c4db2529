"""Two installations on one Engine, and containers that only look like ours: nobody touches what is not theirs."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import docker
import pytest
from django.conf import settings as django_settings

from container_manager.containers import INSTANCE_LABEL, JOB_LABEL, container_name
from container_manager.models import ContainerJob, DockerHost, Installation, Status
from container_manager.queue import QueueManager
from tests.conftest import IMAGE, as_default, empty_tables, missing, wait_until
from tests.fake_engine import FakeEngine, Fleet, launched, one_round, queued, row


@dataclass
class Site:
    """An installation: a database of its own, which is the default one within `opened`."""

    opened: Callable[[], AbstractContextManager[None]]
    manager: QueueManager = field(default_factory=QueueManager)
    instance_id: str = ""

    def found(self) -> Any:
        with self.opened():
            return ContainerJob.objects.get()

    def passes(self) -> None:
        with self.opened():
            one_round(self.manager)


@pytest.fixture
def sites(
    request: pytest.FixtureRequest, django_db_setup: None, django_db_blocker: Any, engine: docker.DockerClient
) -> Iterator[list[Site]]:
    """Two, on both databases, each with a host row for the one Engine."""
    if "postgres" not in django_settings.DATABASES:
        missing(request.config, "PostgreSQL (TEST_POSTGRES_URL)")
    sites = [Site(partial(as_default, alias)) for alias in ("default", "postgres")]
    with django_db_blocker.unblock(), ExitStack() as emptied:
        for site in sites:
            with site.opened():
                base_url = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
                DockerHost.objects.create(name="local", base_url=base_url)
                site.instance_id = Installation.load().instance_id
            emptied.callback(empty, site, engine)
        yield sites


def empty(site: Site, engine: docker.DockerClient) -> None:
    for container in engine.containers.list(all=True, filters={"label": f"{INSTANCE_LABEL}={site.instance_id}"}):
        with suppress(docker.errors.NotFound):
            container.remove(force=True, v=True)
    with site.opened():
        empty_tables()


def test_two_installations_with_the_same_job_on_one_engine_do_not_touch_each_others_container(
    sites: list[Site], engine: docker.DockerClient
) -> None:
    ours, theirs = sites
    for site in sites:
        with site.opened():
            job = ContainerJob(pk=1_000_000, image="busybox", command=["sleep", "60"])
            job.save(force_insert=True)
            site.manager.queue_job(job)
        site.passes()
    their_container = engine.containers.get(theirs.found().container_id)
    began = their_container.attrs["State"]["StartedAt"]
    assert (ours.found().pk, ours.found().attempt) == (theirs.found().pk, theirs.found().attempt)

    with ours.opened():
        ours.manager.cancel_job(ContainerJob.objects.get())
    wait_until(lambda: ours.passes() or ours.found().status == Status.CANCELLED)
    # A database that was emptied knows no job, whatever containers there are.
    with ours.opened():
        ContainerJob.objects.all().delete()
    ours.passes()

    their_container.reload()
    state = their_container.attrs["State"]
    assert (state["Status"], state["StartedAt"]) == ("running", began)
    theirs.passes()
    assert (theirs.found().status, theirs.found().attempt) == (Status.RUNNING, 1)
    assert their_container.name == container_name(theirs.instance_id, 1_000_000, 1)


def test_labels_that_somebody_forged_are_not_believed(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    ended = ContainerJob.objects.create_job(image="busybox")
    manager.cancel_job(ended)
    instance_id = Installation.load().instance_id
    labels = {INSTANCE_LABEL: instance_id, JOB_LABEL: str(ended.pk), "container-manager.attempt": "1"}
    forged = [
        engine.containers.create(IMAGE, ["true"], name=f"forged-{instance_id}", labels=labels),
        engine.containers.create(IMAGE, ["true"], labels=labels | {JOB_LABEL: "1 OR 1=1"}),
        engine.containers.create(IMAGE, ["true"], labels=labels | {JOB_LABEL: "9" * 30}),
        engine.containers.run(
            IMAGE, ["sleep", "60"], name=container_name(instance_id, ended.pk, 1), labels=labels, detach=True
        ),
    ]

    stats = one_round(manager)

    for container in forged:
        container.reload()
    assert [container.status for container in forged] == ["created", "created", "created", "running"]
    told = {anomaly.split(": container ")[1] for anomaly in stats.anomalies}
    assert told == {
        f"forged-{instance_id} says it is of job {ended.pk}, its name does not; left as it is",
        f"{forged[1].name} belongs to no job of this database; left as it is",
        f"{forged[2].name} belongs to no job of this database; left as it is",
        f"{forged[3].name} is running, its attempt is over; left as it is",
    }


@pytest.fixture
def host(fleet: Fleet) -> FakeEngine:
    return fleet.add_host()


@pytest.mark.parametrize("state", ["created", "running", "exited", "dead"])
def test_a_foreign_container_in_any_state_outlives_a_jobs_whole_life(
    fleet: Fleet, host: FakeEngine, state: str
) -> None:
    manager = QueueManager(fleet)
    gone, ended, waiting = launched(manager), launched(manager), queued(manager)
    foreign = []
    for job in (gone, ended, waiting):
        for attempt in (1, 2):
            labels = {INSTANCE_LABEL: "another", JOB_LABEL: str(job.pk), "container-manager.attempt": str(attempt)}
            name, spec = container_name("another", job.pk, attempt), job.validated_spec()
            container_id = host.client().create(name, spec, environment={}, labels=labels, hardening=None)
            host.containers[container_id].state = state
            foreign.append(container_id)
    host.vanish(gone.container_id)
    host.end(ended.container_id, 0)
    before = len(host.calls)

    for _ in range(2):
        one_round(manager)
    manager.cancel_job(row(waiting))
    for _ in range(2):
        one_round(manager)

    assert {row(job).status for job in (gone, ended, waiting)} == {Status.FAILED, Status.COMPLETED, Status.CANCELLED}
    assert sorted(host.containers) == sorted(foreign)
    assert {host.containers[container_id].state for container_id in foreign} == {state}
    assert not {call.subject.split()[-1] for call in host.calls[before:] if call.subject} & set(foreign)
