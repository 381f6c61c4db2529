"""Networks that no job may join: refused by whatever Docker takes for their names, and bound to what was checked."""

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import docker
import pytest

from container_manager.containers import INSTANCE_LABEL, container_name
from container_manager.engine import DockerEngine, Engine
from container_manager.exceptions import ContainerGone, EngineError, NetworkMissing, RequestRefused
from container_manager.models import ContainerJob, DockerHost, JobAttempt, Reason, Status
from container_manager.queue import QueueManager
from container_manager.types import ContainerSpec, EngineAddress, Hardening, Network
from tests.conftest import wait_until
from tests.fake_engine import FakeEngine, one_round, queued, row


class Machine(Protocol):
    """An Engine, what a test does to its networks, and what it says of them."""

    client: Engine

    def add(self, name: str) -> str:
        """The new network's id."""

    def drop(self, network_id: str) -> None: ...

    def id_of(self, name: str) -> str: ...

    def joined(self, container_id: str) -> list[str]:
        """Ids of the networks that a running container is in."""


class RealMachine:
    def __init__(self, engine: docker.DockerClient) -> None:
        address = EngineAddress(base_url=os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
        self.client, self._engine, self._added = DockerEngine(address, 20), engine, list[str]()

    def add(self, name: str) -> str:
        network_id: str = self._engine.networks.create(name).id
        self._added.append(network_id)
        return network_id

    def drop(self, network_id: str) -> None:
        self._engine.networks.get(network_id).remove()
        self._added.remove(network_id)

    def id_of(self, name: str) -> str:
        return next(network.id for network in self._engine.networks.list() if network.name == name)

    def joined(self, container_id: str) -> list[str]:
        seen = self._engine.api.inspect_container(container_id)
        return sorted(endpoint["NetworkID"] for endpoint in seen["NetworkSettings"]["Networks"].values())

    def clear(self, instance: str) -> None:
        for container in self._engine.containers.list(all=True, filters={"label": f"{INSTANCE_LABEL}={instance}"}):
            with suppress(docker.errors.NotFound):
                container.remove(force=True, v=True)
        for network_id in list(self._added):
            self.drop(network_id)


class FakeMachine:
    def __init__(self) -> None:
        self._engine = FakeEngine()
        self.client = self._engine.client()

    def add(self, name: str) -> str:
        self._engine.networks.append(Network(id=secrets.token_hex(32), name=name, driver="bridge"))
        return self._engine.networks[-1].id

    def drop(self, network_id: str) -> None:
        self._engine.networks = [network for network in self._engine.networks if network.id != network_id]

    def id_of(self, name: str) -> str:
        return next(network.id for network in self._engine.networks if network.name == name)

    def joined(self, container_id: str) -> list[str]:
        return sorted(network.id or self.id_of(network.name) for network in self._engine.find(container_id).networks)


@pytest.fixture
def instance() -> str:
    return secrets.token_hex(4)


@pytest.fixture(params=["fake", "docker"])
def machine(request: pytest.FixtureRequest, instance: str) -> Iterator[Machine]:
    if request.param == "fake":
        yield FakeMachine()
        return
    real = RealMachine(request.getfixturevalue("engine"))
    yield real
    real.clear(instance)


def create(machine: Machine, instance: str, networks: Sequence[str], *denied: str) -> str:
    labels = {INSTANCE_LABEL: instance, "container-manager.job": "1", "container-manager.attempt": "1"}
    hardening = Hardening(pids_limit=64, cap_drop_all=False, log_driver="local", log_options={}, denied_networks=denied)
    spec = ContainerSpec(image="busybox", command=("sleep", "60"), networks=tuple(networks))
    return machine.client.create(
        container_name(instance, 1, 1), spec, environment={}, labels=labels, hardening=hardening
    )


#: What a job may call a network, by its name and its id.
CALLED: dict[str, Callable[[str, str], list[str]]] = {
    "name": lambda name, of: [name],
    "id": lambda name, of: [of],
    "12 of the id": lambda name, of: [of[:12]],
    "13 of the id": lambda name, of: [of[:13]],
    "all but one of the id": lambda name, of: [of[:-1]],
    "4 of the id": lambda name, of: [of[:4]],
    "1 of the id": lambda name, of: [of[0]],
    "twice": lambda name, of: [name, of],
    "beside the bridge": lambda name, of: ["bridge", of[:12]],
    "beside the default": lambda name, of: ["default", name],
    "before the bridge": lambda name, of: [of[:4], "bridge"],
}
#: How the setting names it.
DENIED: dict[str, Callable[[str, str], str]] = {
    "by name": lambda name, of: name,
    "by id": lambda name, of: of,
    "by 12 of its id": lambda name, of: of[:12],
}


@pytest.mark.parametrize("denied", DENIED)
@pytest.mark.parametrize("called", CALLED)
def test_a_denied_network_is_refused_whatever_it_is_called(
    machine: Machine, instance: str, called: str, denied: str
) -> None:
    name = f"cm-tests-{instance}"
    of = machine.add(name)
    # Else one digit would name the host's own network, too, which is refused in other words.
    while of[0] == machine.id_of("host")[0]:
        machine.drop(of)
        of = machine.add(name)

    with pytest.raises(RequestRefused, match=f"{name}, which no job may join"):
        create(machine, instance, CALLED[called](name, of), "no-such-network", DENIED[denied](name, of))

    assert machine.client.list(instance) == []


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("called", ["name", "id", "12 of the id", "4 of the id"])
def test_of_several_networks_of_a_denied_name_all_are_denied(
    machine: Machine, instance: str, called: str, which: int
) -> None:
    name = f"cm-tests-{instance}"
    twins = [machine.add(name), machine.add(name)]

    with pytest.raises(RequestRefused, match="no job may join"):
        create(machine, instance, CALLED[called](name, twins[which]), name)

    assert machine.client.list(instance) == []


@pytest.mark.parametrize("denied", [(), ("another",)], ids=["nothing denied", "another denied"])
@pytest.mark.parametrize("called", [name for name in CALLED if name.endswith("id")] + ["before the bridge"])
def test_the_hosts_own_network_is_refused_by_its_id_too(
    machine: Machine, instance: str, called: str, denied: tuple[str, ...]
) -> None:
    with pytest.raises(RequestRefused, match="the host's own"):
        create(machine, instance, CALLED[called]("host", machine.id_of("host")), *denied)

    assert machine.client.list(instance) == []


@pytest.mark.parametrize("networks", [[], ["default"], ["bridge"], ["{id}"], ["{id:.12}"]], ids=str)
@pytest.mark.parametrize("denied", DENIED)
def test_a_bridge_that_is_denied_is_denied_to_a_job_that_names_none_too(
    machine: Machine, instance: str, networks: list[str], denied: str
) -> None:
    of = machine.id_of("bridge")

    with pytest.raises(RequestRefused, match="bridge, which no job may join"):
        create(machine, instance, [name.format(id=of) for name in networks], DENIED[denied]("bridge", of))

    assert machine.client.list(instance) == []


#: What a job asks for beside a denied network, and the names of what it then is in.
ALLOWED: dict[str, tuple[Callable[[str, str], list[str]], list[str]]] = {
    "none named": (lambda name, of: [], ["bridge"]),
    "none at all": (lambda name, of: ["none"], ["none"]),
    "bridge": (lambda name, of: ["bridge"], ["bridge"]),
    "name": (lambda name, of: [name], ["other"]),
    "id": (lambda name, of: [of], ["other"]),
    "12 of the id": (lambda name, of: [of[:12]], ["other"]),
    "twice": (lambda name, of: [name, of], ["other"]),
    "with the bridge": (lambda name, of: ["bridge", name], ["bridge", "other"]),
    "after the bridge's id": (lambda name, of: [of, "bridge"], ["bridge", "other"]),
}


@pytest.mark.parametrize("called", ALLOWED)
def test_every_other_network_is_joined(machine: Machine, instance: str, called: str) -> None:
    # One name begins as the other, and what is as short as `db` is no id in the settings.
    denied = f"cm-tests-{instance}"
    machine.add(denied)
    other = machine.add(f"{denied}-other")
    names, expected = ALLOWED[called]

    container_id = create(machine, instance, names(f"{denied}-other", other), denied, other[:4], "no-such-network")
    machine.client.start(container_id)

    ids = {"other": other} | {name: machine.id_of(name) for name in ("bridge", "none")}
    assert machine.joined(container_id) == sorted(ids[name] for name in expected)


@pytest.mark.parametrize(
    "called",
    [str.upper, lambda name: name[:-1], lambda name: f"{name}-", lambda name: "f" * 64, lambda name: "F" * 12],
    ids=["upper case", "shorter", "longer", "no such id", "an id in upper case"],
)
def test_what_no_network_is_called_is_missing(machine: Machine, instance: str, called: Callable[[str], str]) -> None:
    denied = f"cm-tests-{instance}"
    machine.add(denied)

    with pytest.raises(NetworkMissing, match="not found"):
        create(machine, instance, [called(denied)], denied)

    assert machine.client.list(instance) == []


@pytest.mark.parametrize("before", [[], ["bridge"]], ids=["first", "second"])
@pytest.mark.parametrize("called", ["name", "id", "12 of the id"])
def test_a_network_that_takes_the_others_name_before_the_start_is_not_joined(
    machine: Machine, instance: str, called: str, before: list[str]
) -> None:
    name = f"cm-tests-{instance}"
    checked = machine.add(name)
    container_id = create(machine, instance, before + CALLED[called](name, checked), "another")

    machine.drop(checked)
    machine.add(name)

    with pytest.raises(ContainerGone, match=f"network {checked} not found"):
        machine.client.start(container_id)
    assert not machine.client.inspect(container_id).has_run


def test_a_denied_network_whose_id_begins_as_the_name_of_one_that_is_removed_is_not_joined(
    machine: Machine, instance: str
) -> None:
    denied = machine.add(f"cm-tests-{instance}")
    checked = machine.add(denied[:8])
    container_id = create(machine, instance, [denied[:8]], f"cm-tests-{instance}")

    machine.drop(checked)

    with pytest.raises(EngineError):
        machine.client.start(container_id)
    assert not machine.client.inspect(container_id).has_run


def test_of_two_networks_of_one_name_the_one_that_is_given_by_id_is_joined(machine: Machine, instance: str) -> None:
    name = f"cm-tests-{instance}"
    _, wanted = machine.add(name), machine.add(name)

    container_id = create(machine, instance, [wanted], "another")
    machine.client.start(container_id)

    assert machine.joined(container_id) == [wanted]
    with pytest.raises(RequestRefused, match="ambiguous"):
        create(machine, instance, [name], "another")


# What becomes of such a job.


@pytest.fixture
def network(engine: docker.DockerClient, instance: str) -> Iterator[Any]:
    made = engine.networks.create(f"cm-tests-{instance}")
    yield made
    made.remove()


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
@pytest.mark.parametrize("called", [name for name in CALLED if name != "name"])
def test_a_job_that_would_join_a_denied_network_fails_at_once(
    docker_host: DockerHost,
    manager: QueueManager,
    settings: Any,
    engine: docker.DockerClient,
    network: Any,
    called: str,
) -> None:
    job = queued(manager, networks=CALLED[called](network.name, network.id))
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"DENIED_NETWORKS": [network.name]}

    batch = manager.launch_next_batch()

    attempt = JobAttempt.objects.get(job=job)
    assert (batch.failed_ids, row(job).status, row(job).retry_count) == ((job.pk,), Status.FAILED, 0)
    assert (attempt.reason, attempt.container_id, attempt.error) == (Reason.LAUNCH, "", row(job).last_error)
    assert network.name in attempt.error
    assert "DENIED_NETWORKS" in attempt.error
    assert engine.containers.list(all=True, filters={"name": f"-{job.pk}-1"}) == []


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_a_job_that_was_saved_before_its_network_was_denied_is_refused_at_launch(
    docker_host: DockerHost, manager: QueueManager, settings: Any
) -> None:
    job = queued(manager, networks=["internal"])
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"DENIED_NETWORKS": ["internal"]}

    manager.launch_next_batch()

    assert (row(job).status, row(job).reason) == (Status.FAILED, Reason.LAUNCH)
    assert row(job).last_error == "not allowed: networks: internal is among the setting DENIED_NETWORKS: name another"


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_a_missing_network_is_waited_for_where_others_are_denied(
    docker_host: DockerHost, manager: QueueManager, settings: Any, engine: docker.DockerClient, instance: str
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"DENIED_NETWORKS": ["internal"]}
    job = queued(manager, command=["true"], networks=[f"cm-tests-{instance}"])
    one_round(manager)
    waiting = row(job)

    network = engine.networks.create(f"cm-tests-{instance}")
    try:
        wait_until(lambda: one_round(manager) and row(job).status == Status.COMPLETED)
    finally:
        wait_until(lambda: engine.networks.get(network.id).attrs["Containers"] == {})
        network.remove()

    assert (waiting.status, waiting.retry_count) == (Status.SCHEDULED, 1)
    assert f"network cm-tests-{instance} not found" in waiting.last_error
    assert ContainerJob.objects.get(pk=job.pk).attempts.count() == 2
