"""Four launchers at once: the Engine's own events tell how often, and how many at a time, containers ran."""

from pathlib import Path

import docker

from container_manager.containers import INSTANCE_LABEL, JOB_LABEL
from container_manager.models import ContainerJob, DockerHost, Installation, Status
from container_manager.queue import QueueManager
from tests.conftest import wait_until
from tests.integration.conftest import most_alive
from tests.integration.launcher import start_launcher

JOBS, CAP, LAUNCHERS = 40, 10, 4


def test_four_launchers_start_each_job_once_and_keep_to_the_cap(
    docker_host: DockerHost, manager: QueueManager, engine: docker.DockerClient, events: list[dict], tmp_path: Path
) -> None:
    DockerHost.objects.update(max_concurrent_jobs=JOBS)
    build = ContainerJob.objects.build
    jobs = manager.queue_jobs([build(image="busybox", command=["sleep", "0.3"]) for _ in range(JOBS)])

    launchers = [start_launcher(tmp_path / str(number), CAP) for number in range(LAUNCHERS)]
    codes = [launcher.wait(90) for launcher in launchers]

    logs = "".join((tmp_path / str(number)).read_text() for number in range(LAUNCHERS))
    assert codes == [0] * LAUNCHERS, logs
    assert set(ContainerJob.objects.values_list("status", "attempt")) == {(Status.COMPLETED, 1)}, logs
    wait_until(lambda: [event["status"] for event in events].count("die") >= JOBS)
    started = [event["Actor"]["Attributes"][JOB_LABEL] for event in events if event["status"] == "start"]
    assert sorted(map(int, started)) == [job.pk for job in jobs]
    assert 2 < most_alive(events) <= CAP
    label = f"{INSTANCE_LABEL}={Installation.load().instance_id}"
    assert engine.containers.list(all=True, filters={"label": label}) == []
