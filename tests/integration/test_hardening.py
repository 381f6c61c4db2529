"""What the Engine really applied to a container that the queue launched, by the Engine's own account."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from container_manager.models import ContainerJob, DockerHost, Installation
from container_manager.queue import QueueManager

MIB = 1024 * 1024


def launched(manager: QueueManager, engine: docker.DockerClient, **fields: object) -> tuple[ContainerJob, Any]:
    """A running job, and what `docker inspect` says of its container."""
    job = ContainerJob.objects.create_job(**{"image": "busybox", "command": ["sleep", "60"]} | fields)
    assert manager.launch_next_batch(only=[manager.queue_job(job).pk]).launched == 1
    job.refresh_from_db()
    return job, engine.api.inspect_container(job.container_id)


@pytest.fixture
def networks(engine: docker.DockerClient, database: str) -> Iterator[tuple[str, str]]:
    made = [engine.networks.create(f"cm-tests-{database}-{number}") for number in (1, 2)]
    yield (made[0].name, made[1].name)
    for network in made:
        network.remove()


def test_a_container_gets_no_privileges_and_its_limits(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    _, seen = launched(manager, engine, memory_limit_mib=16, cpu_limit=0.5)

    applied = seen["HostConfig"]
    assert {
        "SecurityOpt": ["no-new-privileges"],
        "Init": True,
        "PidsLimit": 512,
        "Memory": 16 * MIB,
        "MemorySwap": 16 * MIB,
        "NanoCpus": 500_000_000,
        "LogConfig": {"Type": "local", "Config": {"max-size": "10m", "max-file": "3"}},
        "AutoRemove": False,
        "Privileged": False,
    }.items() <= applied.items()
    denied = (
        "Binds",
        "CapAdd",
        "CapDrop",
        "Devices",
        "VolumesFrom",
        "PidMode",
        "UTSMode",
        "UsernsMode",
        "PortBindings",
    )
    assert [name for name in denied if applied[name]] == []
    # What "by default" is called differs between versions.
    assert applied["RestartPolicy"]["Name"] in ("", "no")
    assert applied["NetworkMode"] in ("default", "bridge")
    assert applied["IpcMode"] in ("private", "shareable")
    assert seen["Config"]["Tty"] is False


def test_a_program_has_no_new_privileges_and_no_capabilities_where_they_are_dropped(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    DockerHost.objects.update(cap_drop_all=True)

    job, seen = launched(manager, engine)

    status = engine.containers.get(job.container_id).exec_run(["cat", "/proc/1/status"]).output.decode().split()
    assert seen["HostConfig"]["CapDrop"] == ["ALL"]
    assert [status[status.index(f"{name}:") + 1] for name in ("CapEff", "NoNewPrivs")] == ["0000000000000000", "1"]


def test_capabilities_are_dropped_on_every_host_by_setting(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient, settings: Any
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"CAP_DROP_ALL": True, "PIDS_LIMIT": 64}

    _, seen = launched(manager, engine)

    assert (seen["HostConfig"]["CapDrop"], seen["HostConfig"]["PidsLimit"]) == (["ALL"], 64)


@pytest.mark.parametrize(
    ("asked", "applied"),
    [({}, (32 * MIB, 32 * MIB, 250_000_000)), ({"memory_limit_mib": 16}, (16 * MIB, 16 * MIB, 250_000_000))],
)
def test_the_most_that_is_allowed_is_the_default(
    docker_host: DockerHost,
    manager: QueueManager,
    engine: docker.DockerClient,
    settings: Any,
    asked: dict[str, int],
    applied: tuple[int, int, int],
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"MAX_MEMORY_MIB": 32, "MAX_CPUS": 0.25}

    _, seen = launched(manager, engine, **asked)

    assert tuple(seen["HostConfig"][name] for name in ("Memory", "MemorySwap", "NanoCpus")) == applied


def test_a_container_is_named_and_labelled_for_its_attempt(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    job, seen = launched(manager, engine, labels={"team": "a"})

    instance = Installation.load().instance_id
    token = seen["Config"]["Labels"].pop("container-manager.token")
    assert seen["Name"] == f"/cm-{instance}-{job.pk}-1"
    assert seen["Config"]["Labels"] == {
        "team": "a",
        "container-manager.instance": instance,
        "container-manager.job": str(job.pk),
        "container-manager.attempt": "1",
    }
    assert token == job.claim_token != ""


def test_a_container_runs_what_was_asked_for(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    job, seen = launched(
        manager,
        engine,
        entrypoint=["sleep"],
        command=["60"],
        environment={"A": "b=c\nd"},
        working_dir="/tmp",
        user="nobody",
    )

    asked = seen["Config"]
    assert (asked["Entrypoint"], asked["Cmd"], asked["WorkingDir"], asked["User"]) == (
        ["sleep"],
        ["60"],
        "/tmp",
        "nobody",
    )
    assert {"A=b=c\nd", f"CM_JOB_ID={job.pk}", "CM_ATTEMPT=1"} <= set(asked["Env"])


def test_allowed_mounts_are_mounted_and_nothing_else(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient, settings: Any, tmp_path: Path
) -> None:
    settings.CONTAINER_MANAGER = settings.CONTAINER_MANAGER | {"ALLOWED_BIND_PREFIXES": [str(tmp_path)]}
    (tmp_path / "data").mkdir()
    bind = {"type": "bind", "source": str(tmp_path / "data"), "target": "/data", "read_only": True}

    _, seen = launched(manager, engine, mounts=[bind, {"type": "tmpfs", "target": "/scratch"}])

    mounts = {mount["Destination"]: (mount["Type"], mount["Source"], mount["RW"]) for mount in seen["Mounts"]}
    assert mounts == {"/data": ("bind", bind["source"], False), "/scratch": ("tmpfs", "", True)}
    assert seen["HostConfig"]["Binds"] is None


def test_a_mount_that_is_no_longer_allowed_is_refused_at_launch(
    docker_host: DockerHost, manager: QueueManager, settings: Any, tmp_path: Path
) -> None:
    usual = settings.CONTAINER_MANAGER
    settings.CONTAINER_MANAGER = usual | {"ALLOWED_BIND_PREFIXES": [str(tmp_path)]}
    bind = {"type": "bind", "source": str(tmp_path), "target": "/data"}
    job = manager.queue_job(ContainerJob.objects.create_job(image="busybox", mounts=[bind]))
    settings.CONTAINER_MANAGER = usual

    batch = manager.launch_next_batch()

    job.refresh_from_db()
    assert (batch.launched, batch.failed_ids, job.reason) == (0, (job.pk,), "launch")
    assert job.last_error.startswith("not allowed: mounts: ")


def test_a_container_joins_all_of_its_networks(
    networks: tuple[str, str], docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    _, seen = launched(manager, engine, networks=list(networks))

    assert seen["HostConfig"]["NetworkMode"] == networks[0]
    assert set(seen["NetworkSettings"]["Networks"]) == set(networks)


def test_a_container_may_have_no_network(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient
) -> None:
    _, seen = launched(manager, engine, networks=["none"])

    assert (seen["HostConfig"]["NetworkMode"], list(seen["NetworkSettings"]["Networks"])) == ("none", ["none"])
